"""Task graphs: what a rematerialization problem is made of, as plain data.

A task graph lists tasks in a topological order (the *input order*). Running a task needs one
live instance of each of its input values and creates all its output values. A plan is a
sequence of task indices; a repeated index is a recomputation.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

_MAX_INT = 2**62


class TaskGraphError(ValueError):
    """A task graph, plan or budget that makes no sense; the message says what to change."""


@dataclass(frozen=True)
class Value:
    """Something a task leaves in memory.

    Attributes:
        bytes: size while an instance of the value is live.
        producer: index of the task that creates it.
        keep: whether its last instance stays live to the end of the plan.
    """

    bytes: int
    producer: int
    keep: bool = False


@dataclass(frozen=True)
class Task:
    """One step of a plan.

    Attributes:
        duration: cost of one execution, in any unit.
        inputs: ids of the values that must be live while it runs.
        outputs: ids of the values it creates.
        workspace: bytes that are live only while it runs.
        recomputable: whether it may run more than once.
        name: for people to read.
    """

    duration: int
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    workspace: int = 0
    recomputable: bool = True
    name: str = ""


@dataclass(frozen=True)
class TaskGraph:
    """Tasks in a topological order, the values they exchange, and extra precedence.

    Attributes:
        tasks: the tasks in input order.
        values: the values; `Task.inputs` and `Task.outputs` index into them.
        after: pairs (a, b) of task indices: the first execution of b comes after that of a.
        ids: what files call the tasks; defaults to their indices.

    Raises:
        TaskGraphError: an index is out of range, a number is negative, or the input order
            contradicts a dependency.
    """

    tasks: tuple[Task, ...]
    values: tuple[Value, ...]
    after: tuple[tuple[int, int], ...] = ()
    ids: tuple[int | str, ...] = ()

    def __post_init__(self) -> None:
        """Checks the graph."""
        if not self.ids:
            object.__setattr__(self, "ids", tuple(range(len(self.tasks))))
        _check_values(self)
        _check_tasks(self)
        _check_precedence(self)
        _check_totals(self)

    @cached_property
    def duration(self) -> int:
        """Duration of running every task once."""
        return sum(task.duration for task in self.tasks)

    @classmethod
    def from_json(cls, source: str | Path | Mapping[str, Any]) -> TaskGraph:
        """Reads a task graph from a JSON file or an already parsed document.

        Two forms are read. The plain one: `nodes` (`id`, `duration`, `bytes`), `edges` (pairs of
        ids) and, optionally, `order` (ids); each node is a task with one value. The general one:
        `tasks` (fields of `Task`), `values` (fields of `Value`), optionally `after` and `ids`.

        Raises:
            TaskGraphError: the file can't be read, or holds no valid task graph.
        """
        data = source if isinstance(source, Mapping) else _load(Path(source))
        if "nodes" in data:
            return _from_plain(data)
        if "tasks" in data and "values" in data:
            return _from_general(data)
        raise TaskGraphError(
            "not a task graph: expected the keys 'nodes', 'edges' (and 'order'), "
            "or 'tasks' and 'values'"
        )

    def to_json(self) -> dict[str, Any]:
        """The general JSON form; `from_json` reads it back."""
        return {
            "tasks": [
                {
                    "duration": t.duration,
                    "inputs": list(t.inputs),
                    "outputs": list(t.outputs),
                    "workspace": t.workspace,
                    "recomputable": t.recomputable,
                    "name": t.name,
                }
                for t in self.tasks
            ],
            "values": [
                {"bytes": v.bytes, "producer": v.producer, "keep": v.keep} for v in self.values
            ],
            "after": [list(pair) for pair in self.after],
            "ids": list(self.ids),
        }

    def reordered(self, order: Sequence[int]) -> TaskGraph:
        """The same problem with `order` (a permutation of task indices) as the input order.

        Raises:
            TaskGraphError: `order` is no permutation, or not a topological order.
        """
        if sorted(order) != list(range(len(self.tasks))):
            raise TaskGraphError("an order must list every task index exactly once")
        position = {task: place for place, task in enumerate(order)}
        return TaskGraph(
            tasks=tuple(self.tasks[i] for i in order),
            values=tuple(Value(v.bytes, position[v.producer], v.keep) for v in self.values),
            after=tuple((position[a], position[b]) for a, b in self.after),
            ids=tuple(self.ids[i] for i in order),
        )


def with_end(graph: TaskGraph) -> TaskGraph:
    """The same problem without kept values: an empty last task uses them instead.

    So they may be recomputed after all other tasks, like any value before its last use. A plan
    for the result is one for `graph` once the last task is left out.
    """
    kept = tuple(index for index, value in enumerate(graph.values) if value.keep)
    if not kept:
        return graph
    end = Task(0, inputs=kept, recomputable=False, name="end")
    values = tuple(Value(value.bytes, value.producer) for value in graph.values)
    return TaskGraph((*graph.tasks, end), values, graph.after, (*range(len(graph.tasks) + 1),))


def _check_values(graph: TaskGraph) -> None:
    count = len(graph.tasks)
    if not count:
        raise TaskGraphError("the task graph has no tasks")
    if len(graph.ids) != count or len(set(graph.ids)) != count:
        raise TaskGraphError(f"'ids' must name each of the {count} tasks once")
    for index, value in enumerate(graph.values):
        _whole(value.bytes, f"bytes of value {index}")
        if not 0 <= value.producer < count:
            raise TaskGraphError(f"value {index}: no task has the index {value.producer}")
        if index not in graph.tasks[value.producer].outputs:
            raise TaskGraphError(
                f"value {index} names task {value.producer} as its producer, "
                "but that task does not list it among its outputs"
            )


def _check_tasks(graph: TaskGraph) -> None:
    for index, task in enumerate(graph.tasks):
        _whole(task.duration, f"duration of task {graph.ids[index]!r}")
        _whole(task.workspace, f"workspace of task {graph.ids[index]!r}")
        for value in task.outputs:
            if not 0 <= value < len(graph.values) or graph.values[value].producer != index:
                raise TaskGraphError(
                    f"task {graph.ids[index]!r} lists value {value} among its outputs, "
                    "but is not its producer"
                )
        if len(set(task.outputs)) != len(task.outputs):
            raise TaskGraphError(f"task {graph.ids[index]!r} lists an output twice")
        for value in task.inputs:
            if not 0 <= value < len(graph.values):
                raise TaskGraphError(f"task {graph.ids[index]!r}: no value has the index {value}")


def _check_precedence(graph: TaskGraph) -> None:
    pairs = [(graph.values[v].producer, i) for i, t in enumerate(graph.tasks) for v in t.inputs]
    for before, later in [*pairs, *graph.after]:
        if not (0 <= before < len(graph.tasks) and 0 <= later < len(graph.tasks)):
            raise TaskGraphError(f"no tasks have the indices {before}, {later}")
        if before >= later:
            raise TaskGraphError(
                f"the order puts task {graph.ids[later]!r} before task {graph.ids[before]!r}, "
                "which it depends on; give a topological order, or leave the order out"
            )


def _check_totals(graph: TaskGraph) -> None:
    """Sums must stay exact in 64-bit arithmetic and in CP-SAT's bounds."""
    if graph.duration >= 2**53:
        raise TaskGraphError("the durations sum up to 2**53 or more; use a coarser unit")
    total = sum(value.bytes for value in graph.values) + sum(t.workspace for t in graph.tasks)
    if total * len(graph.tasks) >= _MAX_INT:
        raise TaskGraphError(
            "the bytes, times the number of tasks, reach 2**62; use a coarser unit"
        )


def _whole(number: Any, what: str) -> int:
    """A non-negative whole number, or an error that says which one is not."""
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise TaskGraphError(f"{what} must be a whole number, not {number!r}")
    if not 0 <= number < _MAX_INT:
        raise TaskGraphError(f"{what} must lie between 0 and 2**62, not {number}")
    return number


def _load(path: Path) -> Mapping[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TaskGraphError(f"can't read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise TaskGraphError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(data, dict):
        raise TaskGraphError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


def _items(data: Mapping[str, Any], key: str, kind: type, default: Any = None) -> list[Any]:
    items = data.get(key, default)
    if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
        raise TaskGraphError(f"'{key}' must be a list of {kind.__name__} entries")
    return items


def _from_plain(data: Mapping[str, Any]) -> TaskGraph:
    nodes: dict[int | str, Mapping[str, Any]] = {}
    for number, node in enumerate(_items(data, "nodes", dict)):
        identifier = node.get("id", number)
        if isinstance(identifier, bool) or not isinstance(identifier, int | str):
            raise TaskGraphError(f"node {number}: an id is a whole number or a text")
        if identifier in nodes:
            raise TaskGraphError(f"two nodes have the id {identifier!r}")
        nodes[identifier] = node
    edges = _edges(_items(data, "edges", list, []), nodes)
    order = data.get("order")
    order = topological_order(list(nodes), edges) if order is None else _order(order, nodes)
    place = {identifier: index for index, identifier in enumerate(order)}
    inputs: list[list[int]] = [[] for _ in order]
    for before, later in edges:
        inputs[place[later]].append(place[before])
    tasks, values = [], []
    for index, identifier in enumerate(order):
        node = nodes[identifier]
        what = f"of node {identifier!r}"
        values.append(Value(_whole(node.get("bytes"), f"'bytes' {what}"), index))
        tasks.append(
            Task(
                duration=_whole(node.get("duration"), f"'duration' {what}"),
                inputs=tuple(sorted(set(inputs[index]))),
                outputs=(index,),
                name=str(node.get("name", identifier)),
            )
        )
    return TaskGraph(tuple(tasks), tuple(values), ids=tuple(order))


def _edges(edges: list[Any], nodes: Mapping[int | str, Any]) -> list[tuple[Any, Any]]:
    for edge in edges:
        if len(edge) != 2 or any(isinstance(end, list | dict) or end not in nodes for end in edge):
            raise TaskGraphError(f"edge {edge!r} does not join two nodes of the file")
        if edge[0] == edge[1]:
            raise TaskGraphError(f"node {edge[0]!r} depends on itself; remove that edge")
    return [(edge[0], edge[1]) for edge in edges]


def _order(order: Any, nodes: Mapping[int | str, Any]) -> list[Any]:
    if not isinstance(order, list) or any(isinstance(i, list | dict | bool) for i in order):
        raise TaskGraphError("'order' must be a list of node ids")
    if len(order) != len(nodes) or set(order) != set(nodes):
        raise TaskGraphError("'order' must list every node id exactly once")
    return order


def topological_order(
    names: Sequence[int | str], edges: Iterable[tuple[Any, Any]]
) -> list[int | str]:
    """Names in a topological order that stays close to the given one.

    Raises:
        TaskGraphError: the edges form a cycle; the message shows one.
    """
    successors: dict[Any, list[Any]] = {name: [] for name in names}
    missing = dict.fromkeys(names, 0)
    for before, later in set(edges):
        successors[before].append(later)
        missing[later] += 1
    ready = [name for name in reversed(names) if not missing[name]]
    order = []
    while ready:
        name = ready.pop()
        order.append(name)
        for later in sorted(successors[name], key=str, reverse=True):
            missing[later] -= 1
            if not missing[later]:
                ready.append(later)
    if len(order) < len(names):
        left = {name for name in names if missing[name]}
        raise TaskGraphError(f"the graph has a cycle: {_cycle(left, successors)}")
    return order


def _cycle(left: set[Any], successors: Mapping[Any, list[Any]]) -> str:
    """One cycle among `left`, whose members all have a predecessor in `left`."""
    predecessor = {later: name for name in left for later in successors[name] if later in left}
    walk = [next(iter(sorted(left, key=str)))]
    while predecessor[walk[-1]] not in walk:
        walk.append(predecessor[walk[-1]])
    cycle = walk[walk.index(predecessor[walk[-1]]) :][::-1]
    return " -> ".join(str(name) for name in [*cycle, cycle[0]])


def _from_general(data: Mapping[str, Any]) -> TaskGraph:
    tasks = []
    for number, entry in enumerate(_items(data, "tasks", dict)):
        what = f"task {number}"
        if not isinstance(entry.get("recomputable", True), bool):
            raise TaskGraphError(f"'recomputable' of {what} must be true or false")
        tasks.append(
            Task(
                duration=_whole(entry.get("duration"), f"duration of {what}"),
                inputs=_indices(entry.get("inputs", []), f"inputs of {what}"),
                outputs=_indices(entry.get("outputs", []), f"outputs of {what}"),
                workspace=_whole(entry.get("workspace", 0), f"workspace of {what}"),
                recomputable=entry.get("recomputable", True),
                name=str(entry.get("name", "")),
            )
        )
    values = []
    for number, entry in enumerate(_items(data, "values", dict)):
        if not isinstance(entry.get("keep", False), bool):
            raise TaskGraphError(f"'keep' of value {number} must be true or false")
        size = _whole(entry.get("bytes"), f"bytes of value {number}")
        producer = _whole(entry.get("producer"), f"producer of value {number}")
        values.append(Value(size, producer, entry.get("keep", False)))
    after = [
        [_whole(task, "a task of 'after'") for task in pair]
        for pair in _items(data, "after", list, [])
    ]
    if any(len(pair) != 2 for pair in after):
        raise TaskGraphError("'after' must hold pairs of task indices")
    ids = data.get("ids", [])
    if not isinstance(ids, list) or any(not isinstance(i, int | str) for i in ids):
        raise TaskGraphError("'ids' must be a list of numbers or texts")
    pairs = tuple((pair[0], pair[1]) for pair in after)
    return TaskGraph(tuple(tasks), tuple(values), pairs, tuple(ids))


def _indices(items: Any, what: str) -> tuple[int, ...]:
    if not isinstance(items, list):
        raise TaskGraphError(f"{what} must be a list of indices")
    return tuple(dict.fromkeys(_whole(item, what) for item in items))
