"""A flat graph as tasks for the rematerialization solver, and its plans as flat graphs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from graphopt.cost import measure_ops
from graphopt.cost.models import FlopsCost
from graphopt.cost.sizes import Substitution
from graphopt.errors import UnsupportedError
from graphopt.ir.aliases import writes
from graphopt.ir.ops import is_repeatable
from graphopt.ir.storage import Role, StorageMap, is_tuple, storage_map
from graphopt.solvers import Task, TaskGraph, Value

# Durations are whole numbers to the solver: parts of the whole run.
_WHOLE = 10**9


@dataclass(frozen=True)
class Tasks:
    """A flat graph as a task graph.

    Attributes:
        graph: One task for each call that allocates, in the flat graph's order; views and sizes
            belong to nobody.
        calls: The call of each task.
    """

    graph: TaskGraph
    calls: tuple[fx.Node, ...]


def tasks_of(graph: fx.Graph, sizes: Substitution) -> Tasks:
    """State a flat graph as a task graph.

    Args:
        graph: A functional graph, with fake values in ``meta["val"]``.
        sizes: What stands for symbolic sizes.

    Raises:
        UnsupportedError: A call writes in place, so that it matters when others run.
    """
    for node in graph.nodes:
        if writes(node):
            raise UnsupportedError(
                "a value is written in place, so that nothing can be recomputed",
                node=node,
                hint="write the functional form, or give no memory budget",
            )
    storage = storage_map(graph)
    calls = allocating(graph)
    measured = measure_ops(calls, symbols=sizes)
    model = FlopsCost(sizes)
    seconds = {n: model.seconds(n) for n in calls}
    scale = _WHOLE / max(sum(seconds.values()), 1e-30)
    returned = {storage.base[n] for n in graph.output_node().all_input_nodes}
    values: list[Value] = []
    value_of: dict[fx.Node, int] = {}
    tasks = []
    for index, call in enumerate(calls):
        inputs = tuple(value_of[o] for o in storage.operands(call) if o in value_of)
        found = measured[call]
        parts = dict(enumerate(found.output_bytes))
        outputs = []
        for place, node in _results(call, storage).items():
            value_of[node] = len(values)
            outputs.append(len(values))
            values.append(Value(parts.pop(place, 0), index, keep=node in returned))
        tasks.append(
            Task(
                duration=round(seconds[call] * scale),
                inputs=inputs,
                outputs=tuple(outputs),
                workspace=found.workspace + sum(parts.values()),
                recomputable=is_repeatable(call),
                name=call.name,
            )
        )
    return Tasks(TaskGraph(tuple(tasks), tuple(values)), calls)


def allocating(graph: fx.Graph) -> tuple[fx.Node, ...]:
    """The calls that make values; all others are inputs, sizes and views."""
    role = storage_map(graph).role
    return tuple(n for n in graph.nodes if role[n] is Role.COMPUTE)


def _results(call: fx.Node, storage: StorageMap) -> Mapping[int, fx.Node]:
    """The values that a call makes and somebody names, by position."""
    if not is_tuple(call):
        return {0: call}
    return {
        int(user.args[1]): user  # type: ignore[arg-type]
        for user in call.users
        if storage.role[user] is Role.PROJECTION
    }


def scheduled(graph: fx.Graph, sequence: Sequence[str]) -> fx.Graph:
    """A graph that runs the calls of a flat one in another order, some of them again.

    Args:
        graph: The flat graph.
        sequence: Names of its calls that allocate, each after what it reads; whoever reads a
            value reads the newest one.

    Raises:
        KeyError: There is no call of such a name, or one is read before it has run.
    """
    return _Schedule(graph).run(sequence)


class _Schedule:
    def __init__(self, graph: fx.Graph) -> None:
        self.source = graph
        self.storage = storage_map(graph)
        self.result = fx.Graph()
        self.result.set_codegen(graph._codegen)
        self.current: dict[fx.Node, fx.Node] = {}
        self.views: dict[fx.Node, list[fx.Node]] = {}

    def run(self, sequence: Sequence[str]) -> fx.Graph:
        calls = {n.name: n for n in self.source.nodes if self.storage.role[n] is Role.COMPUTE}
        for node in self.source.find_nodes(op="placeholder"):
            self._copy(node)
        for node in self.source.nodes:  # sizes of inputs come first, as in the source
            if self.storage.role[node] is Role.SYMBOL and self._is_ready(node):
                self._copy(node)
        for name in sequence:
            self._call(calls[name])
        self._copy(self.source.output_node())
        return self.result

    def _is_ready(self, node: fx.Node) -> bool:
        return all(n in self.current for n in node.all_input_nodes)

    def _call(self, node: fx.Node) -> None:
        parts = [u for u in node.users if u.target is operator.getitem]
        for value in (node, *parts):
            for view in self.views.pop(value, ()):
                self.current.pop(view, None)
        self._copy(node)
        for part in parts:
            self._copy(part)

    def _copy(self, node: fx.Node) -> fx.Node:
        self.current[node] = copy = self.result.node_copy(node, self._resolve)
        return copy

    def _resolve(self, node: fx.Node) -> fx.Node:
        """The newest instance of a node; views and sizes are made where they are missing."""
        if node not in self.current:
            if self.storage.role[node] in (Role.COMPUTE, Role.PROJECTION, Role.INPUT):
                raise KeyError(f"{node} is read before it is computed")
            self._copy(node)
            owner = self.storage.base[node]
            if owner is not node:
                self.views.setdefault(owner, []).append(node)
        return self.current[node]
