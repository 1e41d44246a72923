"""The single rewrites of a pass, replayed one after the other.

A pass needn't say what it rewrites: the difference of the graphs before and after it falls into
parts that don't depend on each other, such as one replaced activation, or one group of convolutions
that were narrowed together.  `replayed` makes the program with the first few of them, like
``opt-bisect-limit`` of LLVM, but for any pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import UnsupportedError
from graphopt.inspect.diff import Change, Diff, StateChange, compare, folded
from graphopt.inspect.entries import Entry
from graphopt.ir.graphs import assign, lookup
from graphopt.ir.program import Program

Item = tuple[
    str, str
]  # ("node", name in the second graph), ("gone", name in the first), ("tensor", path)


@dataclass(frozen=True)
class Rewrite:
    """What changes together.

    Attributes:
        changes: The nodes.
        state: The parameters, buffers and constants.
    """

    changes: tuple[Change, ...]
    state: tuple[StateChange, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "changes": [change.to_dict() for change in self.changes],
            "state": [change.to_dict() for change in self.state],
        }

    def __str__(self) -> str:
        """Names for people: ``relu_2 -> mul, add``."""
        before = [c.before.name for c in self.changes if c.before and c.kind != "rewired"]
        after = [c.after.name for c in self.changes if c.after and c.kind != "rewired"]
        names = f"{', '.join(before) or 'nothing'} -> {', '.join(after) or 'nothing'}"
        if before == after:
            names = ", ".join(before)
        tensors = ", ".join(change.path for change in self.state)
        parts = [names] if before or after else [c.entry.name for c in self.changes]
        return "; ".join([*parts, *([f"tensors {tensors}"] if tensors else [])])


class Replay:
    """The rewrites between two programs, in order, and the programs in between.

    Attributes:
        rewrites: The rewrites.
        diff: The difference that they are the parts of.
    """

    def __init__(self, before: Program, after: Program) -> None:
        """Take the difference of two programs apart.

        Raises:
            UnsupportedError: The programs take or give different things, or have two graphs.
        """
        _check(before, after)
        self.before, self.after = before, after
        self.diff = compare(folded(before), folded(after))
        self.parts = _Parts(self.diff, self._same_tensor)
        self.rewrites = _rewrites(self.parts)

    def program(self, count: int, *, follow: str = "before") -> Program:
        """The program with the first ``count`` rewrites.

        Args:
            count: How many.
            follow: Whose order the nodes that both graphs have stand in, ``before`` or ``after``.
        """
        module = _Hybrid(self, count, follow).module
        return self.after.replace(module=module, planner=None, slices=None, masks=None)

    def is_applied(self, item: Item, count: int) -> bool:
        """Whether an item is one of the first ``count`` rewrites."""
        part = self.parts.of(item)
        return part is not None and part < count

    def _same_tensor(self, path: str) -> int:
        """What tells tied tensors from others."""
        value = self.diff.before.state.get(path)
        return id(path) if value is None or value.value is None else value.value.data_ptr()


def _check(before: Program, after: Program) -> None:
    if before.eval_module is not None or after.eval_module is not None:
        raise UnsupportedError("a model with a graph for each mode isn't replayed")
    counts = []
    for program in (before, after):
        output = program.module.graph.output_node().args[0]
        holders = program.module.graph.find_nodes(op="placeholder")
        counts.append((len(holders), len(output) if isinstance(output, (list, tuple)) else 1))
    if counts[0] != counts[1]:
        raise UnsupportedError("the programs take or give different things")


# -- which changes belong together -----------------------------------------------------------------


def _item(change: Change) -> Item:
    if change.after is not None:
        return "node", change.after.name
    assert change.before is not None
    return "gone", change.before.name


class _Union:
    """Disjoint sets of items."""

    def __init__(self) -> None:
        self.parent: dict[Item, Item] = {}

    def find(self, item: Item) -> Item:
        root = item
        while self.parent.setdefault(root, root) != root:
            root = self.parent[root]
        self.parent[item] = root
        return root

    def join(self, one: Item, two: Item) -> None:
        self.parent[self.find(two)] = self.find(one)


class _Parts:
    """Which rewrite each changed item, and each operand of a rewired node, belongs to."""

    def __init__(self, diff: Diff, identity: Callable[[str], int]) -> None:
        self.diff = diff
        self.changes = {_item(change): change for change in diff.changes}
        self.tensors: dict[Item, StateChange] = {("tensor", c.path): c for c in diff.state}
        self.union = _Union()
        self.led: dict[tuple[str, int], Item] = {}  # operand of a rewired node -> what changes it
        self.first: dict[Item, Item] = {}  # rewired node -> what changes the first of these
        for item, change in self.changes.items():
            if change.kind == "rewired":
                self._rewired(item, change)
                continue
            self.union.find(item)
            for other in self._bound_to(change):
                self.union.join(item, other)
        same: dict[int, Item] = {}
        for item in self.tensors:
            self.union.join(same.setdefault(identity(item[1]), item), item)
        order: dict[Item, int] = {}
        for item in [*self.changes, *self.tensors]:
            order.setdefault(self.union.find(self._leader(item)), len(order))
        self.count = len(order)
        self.order = order

    def of(self, item: Item) -> int | None:
        """Number of an item's rewrite, or None if it isn't changed."""
        if item not in self.changes and item not in self.tensors:
            return None
        return self.order[self.union.find(self._leader(item))]

    def of_operand(self, name: str, place: int) -> int | None:
        """The same for one operand of a rewired node."""
        led = self.led.get((name, place))
        return None if led is None else self.order[self.union.find(led)]

    def _leader(self, item: Item) -> Item:
        return self.first.get(item, item)

    def _rewired(self, item: Item, change: Change) -> None:
        """Each operand changes with what stands there before and afterwards."""
        assert change.before is not None
        assert change.after is not None
        pairs = zip(change.before.operands, change.after.operands, strict=True)
        for place, (old, new) in enumerate(pairs):
            one, two = _old_item(old, self.diff), ("node", new)
            if one == two:
                continue
            leaders = [i for i in (one, two) if i in self.changes and self._leads(i)]
            for leader in leaders:
                self.union.join(leaders[0], leader)
            self.led[item[1], place] = self.union.find(leaders[0] if leaders else item)
            self.first.setdefault(item, self.led[item[1], place])

    def _leads(self, item: Item) -> bool:
        """Whether the readers of a node have to change with it."""
        change = self.changes[item]
        return change.before is None or change.after is None or "type" in change.fields

    def _bound_to(self, change: Change) -> Iterator[Item]:
        """The changed items without which a change makes no sense."""
        for entry in (change.before, change.after):
            for path in entry.state if entry is not None else ():
                if ("tensor", path) in self.tensors:
                    yield "tensor", path
        old = change.before.operands if change.before is not None else ()
        new = change.after.operands if change.after is not None else ()
        for place in range(max(len(old), len(new))):
            one = _old_item(old[place], self.diff) if place < len(old) else None
            two = ("node", new[place]) if place < len(new) else None
            moved = one != two and change.before is not None and change.after is not None
            for item in (one, two):
                if item in self.changes and (moved or self._leads(item)):
                    yield item


def _old_item(name: str, diff: Diff) -> Item:
    partner = diff.pairs.get(name)
    return ("gone", name) if partner is None else ("node", partner)


def _rewrites(parts: _Parts) -> tuple[Rewrite, ...]:
    changes: list[list[Change]] = [[] for _ in range(parts.count)]
    state: list[list[StateChange]] = [[] for _ in range(parts.count)]
    for item, change in parts.changes.items():
        changes[parts.of(item) or 0].append(change)
    for item, tensor in parts.tensors.items():
        state[parts.of(item) or 0].append(tensor)
    return tuple(Rewrite(tuple(c), tuple(s)) for c, s in zip(changes, state, strict=True))


# -- a graph between two graphs --------------------------------------------------------------------


class _Hybrid:
    """Builds the graph in which the first rewrites are done and the others aren't."""

    def __init__(self, replay: Replay, count: int, follow: str) -> None:
        self.replay, self.count = replay, count
        self.graph, self.root = fx.Graph(), nn.Module()
        self.done: dict[Item, fx.Node] = {}
        self.reads: dict[tuple[str, str], fx.Node] = {}
        diff = replay.diff
        self.first = {e.name: e for e in diff.before.entries}
        self.second = {e.name: e for e in diff.after.entries}
        self.partner = {two: one for one, two in diff.pairs.items()}
        self.items = {
            "before": {e.node: _old_item(e.name, diff) for e in diff.before.entries if e.node},
            "after": {e.node: ("node", e.name) for e in diff.after.entries if e.node},
        }
        self.rewired = {_item(c): c for c in diff.changes if c.kind == "rewired"}
        self.holders = self._placeholders()
        for item in self._order(follow):
            if self._is_there(item):
                self._place(item)
        self._output()
        self.module = fx.GraphModule(self.root, self.graph)

    def _placeholders(self) -> dict[fx.Node, fx.Node]:
        first, second = (
            program.module.graph.find_nodes(op="placeholder")
            for program in (self.replay.before, self.replay.after)
        )
        made = {}
        for one, two in zip(first, second, strict=True):
            made[one] = made[two] = self.graph.node_copy(two)
        return made

    def _order(self, follow: str) -> list[Item]:
        """All items, those of one graph behind what they follow in that graph."""
        diff = self.replay.diff
        ours = [_old_item(e.name, diff) for e in diff.before.entries if e.node is not None]
        theirs: list[Item] = [("node", e.name) for e in diff.after.entries if e.node is not None]
        main, other = (ours, theirs) if follow == "before" else (theirs, ours)
        known = set(main)
        behind: dict[Item | None, list[Item]] = {}
        last: Item | None = None
        for item in other:
            if item in known:
                last = item
            else:
                behind.setdefault(last, []).append(item)
        result = list(behind.get(None, ()))
        for item in main:
            result += [item, *behind.get(item, ())]
        return result

    def _is_there(self, item: Item) -> bool:
        applied = self.replay.is_applied(item, self.count)
        if item[0] == "gone":
            return not applied
        return applied or item[1] in self.partner

    def _version(self, item: Item) -> tuple[str, Entry]:
        """Which graph an item is taken from, and what it is there."""
        if item[0] == "gone":
            return "before", self.first[item[1]]
        whole = item not in self.rewired and self.replay.is_applied(item, self.count)
        if whole or item[1] not in self.partner:
            return "after", self.second[item[1]]
        return "before", self.first[self.partner[item[1]]]

    def _place(self, item: Item) -> fx.Node:
        if item not in self.done:
            side, entry = self._version(item)
            assert entry.node is not None
            made = iter(self._operands(item, side, entry.node))  # first: they stand in front
            self.done[item] = self.graph.node_copy(entry.node, lambda _: next(made))
        return self.done[item]

    def _operands(self, item: Item, side: str, node: fx.Node) -> list[fx.Node]:
        """What a node reads, in the order in which its arguments name it."""
        rewired = self.rewired.get(item)
        if rewired is None or rewired.before is None or rewired.after is None:
            return [self._value(source, side) for source in _sources(node)]
        one, two = rewired.before.node, rewired.after.node
        assert one is not None
        assert two is not None
        values = []
        place = 0  # among the operands, which reads of parameters don't count as
        for old, new in zip(_sources(one), _sources(two), strict=True):
            applied = self._is_rewired(item[1], place)
            values.append(self._value(new, "after") if applied else self._value(old, "before"))
            place += old.op != "get_attr"
        return values

    def _is_rewired(self, name: str, place: int) -> bool:
        part = self.replay.parts.of_operand(name, place)
        return part is not None and part < self.count

    def _value(self, node: fx.Node, side: str) -> fx.Node:
        if node.op == "placeholder":
            return self.holders[node]
        if node.op == "get_attr":
            return self._read(node, side)
        return self._place(self.items[side][node])

    def _read(self, node: fx.Node, side: str) -> fx.Node:
        path = str(node.target)
        program = getattr(self.replay, side)
        value = lookup(program.module, path)
        if isinstance(value, torch.Tensor):
            side = self._side_of(path, side)
            value = lookup(getattr(self.replay, side).module, path)
        if (side, path) not in self.reads:
            target = path if isinstance(value, torch.Tensor) else f"{path}_{side}"
            assign(self.root, target, value)
            new = self.graph.create_node("get_attr", target, name=node.name)
            new.meta = dict(node.meta)
            self.reads[side, path] = new
        return self.reads[side, path]

    def _side_of(self, path: str, side: str) -> str:
        """Which graph's tensor of a path counts."""
        state = self.replay.diff.before.state, self.replay.diff.after.state
        if path in state[0] and path in state[1]:
            return "after" if self.replay.is_applied(("tensor", path), self.count) else "before"
        return side

    def _output(self) -> None:
        values = []
        results = [list(_flat(p.module)) for p in (self.replay.before, self.replay.after)]
        for index, (one, two) in enumerate(zip(*results, strict=True)):
            name = f"output {index}"
            applied = self._is_rewired(name, 0) or (
                ("node", name) not in self.rewired
                and self.replay.is_applied(("node", name), self.count)
            )
            value, side = (two, "after") if applied else (one, "before")
            values.append(self._value(value, side) if isinstance(value, fx.Node) else value)
        new = self.graph.output(tuple(values))
        new.meta = dict(self.replay.after.module.graph.output_node().meta)


def _sources(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _flat(module: fx.GraphModule) -> Sequence[Any]:
    value = module.graph.output_node().args[0]
    return value if isinstance(value, (list, tuple)) else (value,)
