"""Rules: how the labels of an operator's outputs follow from those of its inputs.

A rule says which axes are the same axis, which are taken apart or put together, and which must
keep their size; a second function, where one is registered, adapts the literals of the call (sizes,
split points, group counts) to what is kept.  The operators of one family stand in one file of
`graphopt.passes.prune.rules`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from graphopt.cost.sizes import UnknownSizeError, concrete
from graphopt.passes.prune.units import Labels, Reason, Units

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Value:
    """A tensor's axes.

    Attributes:
        axes: Labels of each axis.
        zero: For each axis whether the tensor is zero wherever this axis is removed, once all
            parameters of what is removed are zero.
    """

    axes: tuple[Labels, ...]
    zero: tuple[bool, ...]

    @property
    def shape(self) -> Sizes:
        """Sizes, those of the example inputs for free ones."""
        return tuple(map(len, self.axes))

    def take(self, order: Sequence[int]) -> Value:
        """The value with its axes in another order, or some of them."""
        return Value(tuple(self.axes[i] for i in order), tuple(self.zero[i] for i in order))


Result = Any
"""A `Value`, a tuple of results for a node of several outputs, or None for what is no tensor."""
Analysis = Callable[["Call"], Result]
Adaptation = Callable[["Edit"], None]

_ANALYSES: dict[Any, Analysis] = {}
_ADAPTATIONS: dict[Any, Adaptation] = {}


def rule(*targets: Any) -> Callable[[Analysis], Analysis]:
    """Register how labels go through operators (overload packets or functions)."""

    def register(function: Analysis) -> Analysis:
        _ANALYSES.update(dict.fromkeys(targets, function))
        return function

    return register


def adapts(*targets: Any) -> Callable[[Adaptation], Adaptation]:
    """Register how calls of operators are adapted to smaller inputs and outputs."""

    def register(function: Adaptation) -> Adaptation:
        _ADAPTATIONS.update(dict.fromkeys(targets, function))
        return function

    return register


def analysis_of(target: Any) -> Analysis | None:
    """The rule of an operator, or None."""
    return _ANALYSES.get(getattr(target, "overloadpacket", target))


def adaptation_of(target: Any) -> Adaptation | None:
    """What adapts calls of an operator, or None where nothing has to change."""
    return _ADAPTATIONS.get(getattr(target, "overloadpacket", target))


def known(namespace: Any, *names: str) -> list[Any]:
    """The operators of these names that this version of PyTorch has."""
    return [getattr(namespace, name) for name in names if hasattr(namespace, name)]


@functools.cache
def parameters_of(target: Any) -> tuple[tuple[str, Any], ...]:
    """Names and defaults of an operator's parameters, in order."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return ()
    return tuple(
        (a.name, a.default_value if a.has_default_value() else None) for a in schema.arguments
    )


def shape_of(value: Any) -> Sizes:
    """Sizes of a fake tensor, those of the example inputs for free ones."""
    return tuple(int(concrete(size)) for size in value.shape)


class Arguments:
    """A node's arguments by the names of the operator's schema."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        self.names = parameters_of(node.target)

    def raw(self, name: str) -> Any:
        """The argument as it stands in the graph, or its default; None where there is none."""
        for index, (known_name, default) in enumerate(self.names):
            if known_name == name:
                if index < len(self.node.args):
                    return self.node.args[index]
                return self.node.kwargs.get(name, default)
        return None

    def has(self, name: str) -> bool:
        """Whether the operator has a parameter of this name."""
        return any(name == known_name for known_name, _ in self.names)

    def first(self, *names: str) -> Any:
        """The argument of the first of these names that the operator has."""
        return next((self.raw(name) for name in names if self.has(name)), None)


class Call(Arguments):
    """A node whose outputs' labels are asked for.

    Attributes:
        node: The node.
        units: The store.
        values: What is known of the nodes before it.
        compensates: Whether norms may lose places of the axes that they normalise.
    """

    def __init__(
        self,
        node: fx.Node,
        units: Units,
        values: Mapping[fx.Node, Result],
        *,
        compensates: bool = True,
    ) -> None:
        super().__init__(node)
        self.units = units
        self.values = values
        self.compensates = compensates

    def __getitem__(self, name: str) -> Any:
        """An argument by name; nodes are replaced by their values."""
        return self.value(self.raw(name))

    def value(self, argument: Any) -> Any:
        """What an argument stands for: nodes are replaced by their values."""
        if isinstance(argument, fx.Node):
            return self.values[argument]
        if isinstance(argument, (list, tuple)):
            return [self.value(item) for item in argument]
        return argument

    @property
    def inputs(self) -> list[Value]:
        """All tensors among the inputs."""
        return [v for node in self.node.all_input_nodes for v in values_in(self.values.get(node))]

    @property
    def output(self) -> Any:
        """The fake output."""
        return self.node.meta.get("val")

    @property
    def shape(self) -> Sizes:
        """Sizes of the one output."""
        return shape_of(self.output)

    def why(self, text: str) -> Reason:
        """A reason that names this node."""
        return Reason(text, self.node.name, str(self.node.target))

    def unify(self, one: Labels, other: Labels, text: str) -> None:
        """Couple two axes; those of size 1 are broadcast, and couple nothing."""
        if len(one) == len(other) and len(one) != 1:
            self.units.unify(one, other, self.why(text))

    def freeze(self, labels: Labels, text: str) -> None:
        """Let an axis keep its size."""
        self.units.freeze(labels, self.why(text))

    def is_zero(self, value: Value, axis: int) -> bool:
        """Whether a value is zero where an axis of it is removed, or nothing is."""
        return value.zero[axis] or not self.units.is_free(value.axes[axis])

    def must_be_zero(self, value: Value, axis: int, text: str) -> None:
        """Freeze an axis that is summed over unless nothing comes from what is removed."""
        if not self.is_zero(value, axis):
            self.freeze(value.axes[axis], text)

    def split(self, labels: Labels, outer: int, inner: int) -> tuple[Labels, Labels]:
        """Take an axis apart."""
        return self.units.split(labels, outer, inner, self.why("it is taken apart in two ways"))

    def opaque(self, text: str) -> Result:
        """All axes of all inputs and outputs keep their sizes."""
        for value in self.inputs:
            for labels in value.axes:
                self.freeze(labels, text)
        return fixed(self.output)


def values_in(result: Result) -> Iterator[Value]:
    """All tensors of a result."""
    if isinstance(result, Value):
        yield result
    elif isinstance(result, (tuple, list)):
        for part in result:
            yield from values_in(part)


def fixed(fake: Any) -> Result:
    """Values of which every axis keeps its size."""
    if isinstance(fake, torch.Tensor):
        try:
            sizes = shape_of(fake)
        except UnknownSizeError:  # depends on the data: nothing of it is removed
            sizes = (1,) * fake.ndim
        return Value(tuple(np.zeros(n, dtype=np.int64) for n in sizes), (True,) * len(sizes))
    if isinstance(fake, (list, tuple)):
        return tuple(fixed(item) for item in fake)
    return None


def axis_of(index: int, rank: int) -> int:
    """An axis that may be counted from the end."""
    return index + rank if index < 0 else index


def axes_of(indices: int | Sequence[int] | None, rank: int) -> list[int]:
    """Axes that may be counted from the end; all of them for None or none."""
    if isinstance(indices, int):
        indices = [indices]
    return [axis_of(i, rank) for i in indices] if indices else list(range(rank))


def provenance(node: fx.Node) -> dict[str, Any]:
    """What a new node has of the one for which it stands: where it came from."""
    return {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}


class Edit(Arguments):
    """A node of the new graph that is adapted to what is kept.

    Attributes:
        node: The node, with the old call.
        original: The node that it was copied from.
        units: The store.
        values: What is known of the original nodes.
        removed: The units that are removed.
        compensated: Norms that are written out, by their weights' names or their own; grows.
    """

    def __init__(
        self,
        node: fx.Node,
        original: fx.Node,
        units: Units,
        values: Mapping[fx.Node, Result],
        removed: frozenset[int],
        compensated: list[str] | None = None,
    ) -> None:
        super().__init__(node)
        self.original = original
        self.units = units
        self.values = values
        self.removed = removed
        self.compensated = [] if compensated is None else compensated

    @property
    def graph(self) -> fx.Graph:
        """The new graph."""
        return self.node.graph

    @property
    def output(self) -> Any:
        """The value of the original node."""
        return self.values[self.original]

    def input(self, name: str) -> Any:
        """The value of an argument."""
        argument = Arguments(self.original).raw(name)
        if isinstance(argument, (list, tuple)):
            return [self.values[a] if isinstance(a, fx.Node) else a for a in argument]
        return self.values[argument] if isinstance(argument, fx.Node) else argument

    def kept(self, labels: Labels) -> Any:
        """Which positions of an axis stay."""
        return self.units.kept(labels, self.removed)

    def count(self, labels: Labels) -> int:
        """How many positions of an axis stay."""
        return int(self.kept(labels).sum())

    def size(self, old: Any, labels: Labels) -> Any:
        """The size of an axis, given what stands for it: a number, -1, or a node."""
        left, total = self.count(labels), len(labels)
        if left == total or (isinstance(old, int) and old == -1):
            return old
        if not isinstance(old, fx.Node):
            return left
        with self.graph.inserting_before(self.node):
            scaled = self.graph.call_function(operator.mul, (old, left))
            return self.graph.call_function(operator.floordiv, (scaled, total))

    def sizes(self, old: Sequence[Any], axes: Sequence[Labels]) -> list[Any]:
        """The sizes of several axes."""
        return [self.size(size, labels) for size, labels in zip(old, axes, strict=True)]

    def set(self, name: str, value: Any) -> None:
        """Replace an argument."""
        index = [known_name for known_name, _ in self.names].index(name)
        if index < len(self.node.args):
            self.node.update_arg(index, value)
        else:
            self.node.update_kwarg(name, value)

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before the present one."""
        with self.graph.inserting_before(self.node):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = provenance(self.node)
        return node

    def replace(self, node: fx.Node) -> None:
        """Let another node stand for the present one."""
        self.node.replace_all_uses_with(node)
        self.graph.erase_node(self.node)

    def replace_parts(self, nodes: Sequence[fx.Node]) -> None:
        """Let other nodes stand for the outputs of the present one."""
        for user in list(self.node.users):
            user.replace_all_uses_with(nodes[user.args[1]])  # type: ignore[index]
            self.graph.erase_node(user)
        self.graph.erase_node(self.node)
