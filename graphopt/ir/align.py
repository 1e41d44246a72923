"""Compare two traces of one model: which nodes correspond, and in which arguments they differ.

Traces of one model in two modes, dtypes or on two devices differ in literals, and in ops that do
nothing in one of them: ``contiguous`` is recorded only where it copies, and a ``to`` that converts
nothing is an alias of its input, so that the tracer may wire its users to either.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.ir.graphs import lookup
from graphopt.ir.ops import is_size
from graphopt.ir.stand_ins import StandIns, number_of

Values = dict[str, tuple[Any, Any]]

_CONVERSIONS = frozenset({"aten::to", "aten::type_as"})
_LAYOUT = frozenset({"aten::contiguous"})
_IDENTITIES = frozenset({"aten::contiguous", "aten::lift_fresh_copy", "aten::lift_fresh"})
_DROPOUTS = frozenset(
    f"aten::{name}{suffix}"
    for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
    for suffix in ("", "_")
)


@dataclass
class Comparison:
    """How the second of two traces differs from the first.

    Attributes:
        pairs: Corresponding nodes, in order, sub-graphs included.
        values: Nodes of the first graph -> literal arguments that differ: place -> (first, second).
        alone: Nodes that only the first graph has, other than ops that change nothing.
        branching: Nodes (of either graph) that differ in more than literals.
    """

    pairs: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)
    values: dict[fx.Node, Values] = field(default_factory=dict)
    alone: list[fx.Node] = field(default_factory=list)
    branching: list[fx.Node] = field(default_factory=list)


def compare(
    first: fx.GraphModule, second: fx.GraphModule, sizes: StandIns | None = None
) -> Comparison:
    """Compare two traces.

    The first graph is completed where that changes nothing: it gets the layout copies that only
    the second one recorded, and where it took an alias of a value, it takes the value that the
    second one does.

    Args:
        first: The first trace.
        second: The second one.
        sizes: What stands for the first one's free sizes in the second, if that has none: sizes
            are then no literals, and traces that differ in one differ in more than literals.
    """
    return _Comparer(first, second, sizes or {}).result


class _Comparer:
    def __init__(self, first: fx.GraphModule, second: fx.GraphModule, sizes: StandIns) -> None:
        self.result = Comparison()
        self.sizes = sizes
        self.partner: dict[fx.Node, fx.Node] = {}  # of the second graph -> of the first
        self.paired: set[fx.Node] = set()
        self.mine: list[fx.Node] = []
        self.other: list[fx.Node] = []
        self._align(first, second)
        for node in self.other:
            self._adopt(node)
        for node in self.mine:
            if not _is_alias(node):
                self.result.alone.append(node)
        for one, two in self.result.pairs:
            self._compare(one, two)

    def _align(self, first: fx.GraphModule, second: fx.GraphModule) -> None:
        mine, theirs = self._computing(first), self._computing(second)
        my_keys = [_key(first, node) for node in mine]
        their_keys = [_key(second, node) for node in theirs]
        pairs: list[tuple[fx.Node, fx.Node]] = []
        if my_keys == their_keys:
            pairs = list(zip(mine, theirs, strict=True))
        else:
            matcher = difflib.SequenceMatcher(None, my_keys, their_keys, autojunk=False)
            for tag, a, b, c, d in matcher.get_opcodes():
                if tag == "equal":
                    pairs += zip(mine[a:b], theirs[c:d], strict=True)
                else:
                    self.mine += mine[a:b]
                    self.other += theirs[c:d]
        for one, two in pairs:
            self.result.pairs.append((one, two))
            self.partner[two] = one
            self.paired.add(one)
            for a, b in zip(_inner(first, one), _inner(second, two), strict=False):
                self._align(a, b)

    def _computing(self, module: fx.GraphModule) -> list[fx.Node]:
        """All nodes but those that are compared where they are used.

        Those are reads of parameters and sub-graphs, and where sizes have stand-ins, sizes, and
        indexing with ``[:]``, which is recorded only where sizes are free.
        """
        nodes = [node for node in module.graph.nodes if node.op != "get_attr"]
        if not self.sizes:
            return nodes
        return [node for node in nodes if not is_size(node) and not _is_whole(node)]

    def _adopt(self, node: fx.Node) -> None:
        """Copy an op that does nothing in the first trace, and is only in the second, into it."""
        name = name_of(node)
        source = node.args[0] if node.args else None
        mine = self.partner.get(source) if isinstance(source, fx.Node) else None
        if name in _CONVERSIONS and mine is not None and _follows(mine, source, node):
            new = self._insert(node, mine)
            self.result.pairs.append((new, node))
        elif name not in _IDENTITIES:
            self.result.branching.append(node)
        elif name in _LAYOUT and mine is not None:
            self._insert(node, mine)

    def _insert(self, node: fx.Node, mine: fx.Node) -> fx.Node:
        """Put a copy of a node of the second graph into the first, where the second has it."""
        value = mine.meta["val"]
        place: fx.Node = node
        while (
            place.op != "output"
            and getattr(self.partner.get(place), "graph", None) is not mine.graph
        ):
            place = place.next
        before = self.partner.get(place) or mine.graph.output_node()

        def mapped(arg: Any) -> Any:
            if isinstance(arg, torch.dtype):
                return value.dtype
            return value.device if isinstance(arg, torch.device) else arg

        args = (mine, *(mapped(arg) for arg in node.args[1:]))
        kwargs = {key: mapped(arg) for key, arg in node.kwargs.items()}
        with mine.graph.inserting_before(before):
            new = mine.graph.create_node("call_function", node.target, args, kwargs)
        new.meta = {**node.meta, "val": value}
        self.partner[node] = new
        self.paired.add(new)
        return new

    def _compare(self, one: fx.Node, two: fx.Node) -> None:
        _spell_out(one, two)
        found: Values = {}
        rewired: dict[fx.Node, fx.Node] = {}
        matching = self._arguments("args", one.args, two.args, found, rewired)
        matching &= self._arguments("kwargs", dict(one.kwargs), dict(two.kwargs), found, rewired)
        if not matching:
            self.result.branching.append(one)
            return
        for old, new in rewired.items():
            one.replace_input_with(old, new)
        if found:
            self.result.values[one] = found

    def _arguments(
        self, place: str, a: Any, b: Any, found: Values, rewired: dict[fx.Node, fx.Node]
    ) -> bool:
        sizes = [number_of(x, self.sizes) for x in (a, b)] if self.sizes else [None]
        if None not in sizes:
            return sizes[0] == sizes[1]
        if isinstance(a, fx.Node) or isinstance(b, fx.Node):
            nodes = isinstance(a, fx.Node) and isinstance(b, fx.Node)
            return nodes and self._same(a, b, rewired)
        if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
            if len(a) != len(b):
                return False
            parts = enumerate(zip(a, b, strict=True))
            return all(self._arguments(f"{place}.{i}", x, y, found, rewired) for i, (x, y) in parts)
        if isinstance(a, dict) and isinstance(b, dict):
            if list(a) != list(b):
                return False
            return all(self._arguments(f"{place}.{k}", a[k], b[k], found, rewired) for k in a)
        if isinstance(a, slice) and isinstance(b, slice):
            before = len(found)
            parts = [(a.start, b.start), (a.stop, b.stop), (a.step, b.step)]
            same = all(self._arguments(place, x, y, found, rewired) for x, y in parts)
            return same and len(found) == before
        if not _equal(a, b):
            found[place] = (a, b)
        return True

    def _same(self, one: fx.Node, two: fx.Node, rewired: dict[fx.Node, fx.Node]) -> bool:
        if one.op == "get_attr" and two.op == "get_attr":
            return _same_read(one, two)
        partner = self.partner.get(two)
        if partner is one:
            return True
        mine, chain = self._root(one)
        theirs = self._plain_root(two)
        if theirs.op == "get_attr" or mine.op == "get_attr":
            if not (theirs.op == mine.op and _same_read(mine, theirs)):
                return False
        elif self.partner.get(theirs) is not mine and (
            partner is None or self._root(partner)[0] is not mine
        ):
            return False
        if partner is not None and all(node in self.paired for node in chain):
            rewired[one] = partner
        return True

    def _root(self, node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
        """Follow a value through ops that change nothing; also the ops that were passed."""
        chain = []
        while node not in self.paired or self._is_alias(node):
            alone = node not in self.paired and name_of(node) in _DROPOUTS
            if not (alone or self._is_alias(node)) or not isinstance(node.args[0], fx.Node):
                break
            chain.append(node)
            node = node.args[0]
        return node, chain

    def _plain_root(self, node: fx.Node) -> fx.Node:
        while self._is_alias(node) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        return node

    def _is_alias(self, node: fx.Node) -> bool:
        return _is_alias(node) or (bool(self.sizes) and _is_whole(node))


def _follows(mine: fx.Node, source: Any, node: fx.Node) -> bool:
    """Whether a conversion in the second graph is one to the dtype that the model has there."""
    a, b, c = (n.meta.get("val") for n in (mine, source, node))
    if a is None or b is None or c is None or not isinstance(c, torch.Tensor):
        return False
    return c.dtype not in (a.dtype, b.dtype) or (c.dtype == b.dtype and c.device != a.device)


def _is_alias(node: fx.Node) -> bool:
    """Whether a node's value is its input's: a conversion to what it was already, a layout op."""
    name = name_of(node)
    if name in _IDENTITIES:
        return True
    if name not in _CONVERSIONS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return False
    return before.dtype == after.dtype and before.device == after.device


def _is_whole(node: fx.Node) -> bool:
    """Whether a node is all of its input, whatever the size."""
    name = name_of(node)
    if name == "aten::slice":
        given = dict(zip(("input", "dim", "start", "end", "step"), node.args, strict=False))
        cut = (given.get("start"), given.get("end"), given.get("step", 1))
        return cut == (0, sys.maxsize, 1) and not node.kwargs
    return name == "aten::alias"


def name_of(node: fx.Node) -> str:
    """``aten::relu`` for a call of an op, else an empty text."""
    target = node.target
    return target._schema.name if isinstance(target, torch._ops.OpOverload) else ""


def is_dropout(node: fx.Node) -> bool:
    """Whether a node is a dropout called as ``(input, p, train)``."""
    return name_of(node) in _DROPOUTS and len(node.args) == 3


def _spell_out(one: fx.Node, two: fx.Node) -> None:
    """Write out default arguments where only one of two calls does."""
    if not isinstance(one.target, torch._ops.OpOverload):
        return
    if len(one.args) == len(two.args) and set(one.kwargs) == set(two.kwargs):
        return
    schema = one.target._schema.arguments
    positional = [a for a in schema if not a.kwarg_only]
    count = max(len(one.args), len(two.args))
    names = [a.name for a in schema if a.name in one.kwargs or a.name in two.kwargs]
    for node in (one, two):
        kwargs = dict(node.kwargs)
        args = list(node.args)
        missing = positional[len(args) : count]
        args += [kwargs.pop(argument.name, argument.default_value) for argument in missing]
        defaults = {a.name: a.default_value for a in schema}
        filled = positional[:count]
        keep = [name for name in names if all(name != a.name for a in filled)]
        node.args = tuple(args)
        node.kwargs = {name: kwargs.get(name, defaults[name]) for name in keep}


def _key(module: fx.GraphModule, node: fx.Node) -> Any:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    target = str(node.target) if node.op == "call_function" else node.op
    return target, stack[-1][0] if stack else "", len(_inner(module, node))


def _inner(module: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
        return []
    sources = [n for n in node.all_input_nodes if n.op == "get_attr"]
    values = [lookup(module, str(n.target)) for n in sources]
    return [value for value in values if isinstance(value, fx.GraphModule)]


def _equal(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _same_read(first: fx.Node, second: fx.Node) -> bool:
    values = [lookup(n.graph.owning_module, str(n.target)) for n in (first, second)]
    if isinstance(values[0], fx.GraphModule) or isinstance(values[1], fx.GraphModule):
        return isinstance(values[0], fx.GraphModule) and isinstance(values[1], fx.GraphModule)
    same = first.target == second.target or (is_constant(first) and is_constant(second))
    return same and values[0].shape == values[1].shape


def is_constant(node: fx.Node) -> bool:
    """Whether a node reads a tensor that the model's code makes anew in each call."""
    return node.op == "get_attr" and "lifted_tensor" in str(node.target)


def all_graphs(module: fx.GraphModule) -> Iterator[fx.GraphModule]:
    """A graph module and the sub-graphs that it reads, at any depth."""
    yield module
    for node in module.graph.find_nodes(op="get_attr"):
        value = lookup(module, str(node.target))
        if isinstance(value, fx.GraphModule):
            yield from all_graphs(value)
