"""Values that are zero but for a part of one dimension, as that part.

Where one place of a sequence is explained (the last token, a class token), relevance is zero at all
others until an attention spreads it.  What hands it on works place by place, so that it need only
run at that one: on the same numbers, in a fraction of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.cost.sizes import same_shape, same_size
from graphopt.ir.graphs import copy_place
from graphopt.ir.interpret import call
from graphopt.passes.relevance.marks import MARK

aten = torch.ops.aten

END = 2**63 - 1
"""Where a slice to the end stops."""


@dataclass(frozen=True)
class Part:
    """What is left of a value without its zeros.

    Attributes:
        core: The part that may be other than zero.
        shape: A shape of the whole value, of which its own may be a view.
        dim: The dimension of that shape along which zeros are left out.
        start: Where the part begins, as `slice` takes it.
        stop: Where it ends.
    """

    core: fx.Node
    shape: tuple[Any, ...]
    dim: int
    start: int
    stop: int

    def fits(self, other: Part) -> bool:
        """Whether another part is of a value of the same number of dimensions, and the same one."""
        place = (self.dim, self.start, self.stop) == (other.dim, other.start, other.stop)
        return place and len(self.shape) == len(other.shape) and self._is_as_long(other)

    def _is_as_long(self, other: Part) -> bool:
        return same_size(self.shape[self.dim], other.shape[other.dim])


Rule = Callable[["Padding", fx.Node], "Part | fx.Node | None"]
"""Says what a call gives for parts: a part, a whole value, or nothing that it knows of."""

RULES: dict[Any, Rule] = {}
"""The rule of each operator; `graphopt.passes.relevance.cropping` fills it."""


class Padding:
    """The parts of the values of one graph, and calls on them.

    Args:
        graph: Changed in place; has fake values in ``meta["val"]``.

    Attributes:
        parts: Value -> its part.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.parts: dict[fx.Node, Part] = {}
        self._wholes: dict[fx.Node, fx.Node] = {}
        self._sizes: dict[Any, fx.Node] = {}

    def run(self) -> None:
        """Let calls work on parts as far as they can."""
        for node in list(self.graph.nodes):
            if isinstance(node.meta.get("val"), torch.SymInt):
                self._sizes.setdefault(node.meta["val"].node.expr, node)
            padded = [a for a in node.all_input_nodes if a in self.parts]
            if padded and node not in self.parts:
                found = RULES[node.target](self, node) if node.target in RULES else None
                if isinstance(found, fx.Node):
                    node.replace_all_uses_with(found)
                elif found is not None and self._is_writable(found, node.meta["val"].shape):
                    self.parts[node] = found
                else:
                    for value in padded:
                        node.replace_input_with(value, self.whole(value, node))
            if node not in self.parts:
                self._begin(node)
        self.graph.eliminate_dead_code()

    def _begin(self, node: fx.Node) -> None:
        """Take note of a value that is made by putting zeros around another one."""
        arguments: Any = node.args
        if node.target is aten.select_backward.default:
            gradient, _, dim, index = arguments
            if not isinstance(index, int):
                return
            shape = tuple(node.meta["val"].shape)
            stop = END if index == -1 else index + 1
            dim = dim % len(shape)
            found = Part(gradient, shape, dim, index, stop)
            if self._is_writable(found, shape) and not same_size(shape[dim], 1):
                core = self.emit(node, aten.unsqueeze.default, gradient, dim)
                self.parts[node], self._wholes[node] = replace(found, core=core), node
        elif node.target is aten.slice_backward.default:
            gradient, _, dim, start, stop, step = arguments
            shape = tuple(node.meta["val"].shape)
            found = Part(gradient, shape, dim % len(shape), start, stop)
            known = isinstance(start, int) and isinstance(stop, int) and step == 1
            if known and _is_small(found) and self._is_writable(found, shape):
                self.parts[node], self._wholes[node] = found, node

    # --- what rules use -----------------------------------------------------------------------

    def part(self, node: Any, *, plain: bool = True) -> Part | None:
        """The part of a value.

        Args:
            node: The value, or any other argument.
            plain: Only where it is a part of the value's own shape.
        """
        found = self.parts.get(node) if isinstance(node, fx.Node) else None
        if found is None or not plain or same_shape(found.shape, node.meta["val"].shape):
            return found
        return None

    def emit(self, at: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Put a call in front of another one."""
        with self.graph.inserting_before(at):
            made = self.graph.call_function(target, args, kwargs)
        copy_place(made, at, MARK)
        made.meta["val"] = _value_of(made)
        return made

    def viewed(self, at: fx.Node, value: fx.Node, sizes: Sequence[Any]) -> fx.Node:
        """A view of a value, or of a copy where its layout doesn't allow one."""
        try:
            return self.emit(at, aten.view.default, value, list(sizes))
        except RuntimeError:
            copy = self.emit(at, aten.clone.default, value, memory_format=torch.contiguous_format)
            return self.emit(at, aten.view.default, copy, list(sizes))

    def cropped(self, at: fx.Node, value: Any, part: Part) -> Any:
        """What an argument that is broadcast to a value has at its part."""
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), torch.Tensor):
            return value
        if value in self.parts:
            return self.parts[value].core
        shape = value.meta["val"].shape
        dim = part.dim - len(part.shape) + len(shape)
        if dim < 0 or same_size(shape[dim], 1):
            return value
        return self.emit(at, aten.slice.Tensor, value, dim, part.start, part.stop)

    def whole(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """The value itself, made of its part."""
        if node not in self._wholes:
            part = self.parts[node]
            sizes = [self._size(s) for s in part.shape]
            args = (part.core, sizes, part.dim, part.start, part.stop, 1)
            made = self.emit(at, aten.slice_backward.default, *args)
            shape = node.meta["val"].shape
            if not same_shape(part.shape, shape):
                copy_place(made, node, MARK)
                made = self.viewed(at, made, [self._size(s) for s in shape])
            copy_place(made, node, MARK)
            self._wholes[node] = made
        return self._wholes[node]

    def _size(self, size: Any) -> Any:
        """A size as an argument; -1, which a view finds out, where the graph doesn't know it."""
        return self._sizes.get(size.node.expr, -1) if isinstance(size, torch.SymInt) else size

    def _is_writable(self, part: Part, shape: Sequence[Any]) -> bool:
        """Whether the whole value, of some shape, can be made of a part."""
        own, viewed = ([self._size(s) for s in sizes] for sizes in (part.shape, shape))
        return -1 not in own and viewed.count(-1) < 2


def count(sizes: Sequence[Any]) -> Any:
    """The product of some sizes."""
    return math.prod(sizes)


def _is_small(part: Part) -> bool:
    """Whether less than half is left, so that it is worth it."""
    length = part.core.meta["val"].shape[part.dim]
    return statically_known_true(2 * length < part.shape[part.dim])


@torch.no_grad()
def _value_of(node: fx.Node) -> Any:
    return call(node, lambda n: n.meta["val"])
