"""The weights that can be masked: parameters that a product reads, and the axes that it sums over.

A parameter is followed from where the graph reads it through casts, copies and changes of shape to
linear layers, convolutions, matrix products, einsum, bilinear forms and recurrent cells.  Biases,
norms and tables that are only looked up are no factors of a product and are left dense; a table
that is tied to the output layer is one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.graphs import lookup
from graphopt.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter that products read.

    Attributes:
        names: All its names, the first one first.
        parameter: The parameter.
        axis: The axis that the first product with it sums over (of a convolution the channels of
            one group); None where it is reshaped on the way.
    """

    names: tuple[str, ...]
    parameter: nn.Parameter
    axis: int | None

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]

    @property
    def size(self) -> int:
        """How many weights it has."""
        return self.parameter.numel()


@dataclass(frozen=True, eq=False)
class _View:
    """A value made of a parameter alone: for each of its axes the parameter's axis, or None."""

    parameter: nn.Parameter
    axes: tuple[int | None, ...]


def matrices(program: Program) -> list[Matrix]:
    """The weights of a program that can be masked, each once, in the order of their names."""
    found: dict[int, int | None] = {}
    for module in (program.module, program.eval_module):
        if module is not None:
            _Walk(module, found).run([])
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in program.skeleton.root.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        parameters[id(parameter)] = parameter
    return [
        Matrix(tuple(each), parameters[key], found[key])
        for key, each in names.items()
        if key in found and parameters[key].dim() >= 2 and parameters[key].is_floating_point()
    ]


@dataclass
class _Walk:
    """One graph; notes parameters that products read, and over which axis."""

    module: fx.GraphModule
    found: dict[int, int | None]
    views: dict[fx.Node, Any] = field(default_factory=dict)

    def run(self, operands: Sequence[Any]) -> None:
        """Follow every node; ``operands`` are what a region's placeholders stand for."""
        given = iter(operands)
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                self.views[node] = next(given, None)
            elif node.op == "get_attr":
                self.views[node] = _whole(lookup(self.module, str(node.target)))
            elif node.op == "call_function":
                self._called(node)

    def _called(self, node: fx.Node) -> None:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._regions(node)
            return
        packet = getattr(node.target, "overloadpacket", node.target)
        for view, place in _factors(packet, node, self.views):
            axis = view.axes[place] if place is not None else None
            self.found.setdefault(id(view.parameter), axis)
        change = _CHANGES.get(packet)
        source = self.views.get(node.args[0]) if node.args else None  # type: ignore[arg-type]
        if change is not None and isinstance(source, _View):
            self.views[node] = change(source, node)
        elif node.target is _GETITEM and isinstance(source, tuple):
            self.views[node] = source[node.args[1]]  # type: ignore[index]

    def _regions(self, node: fx.Node) -> None:
        """Regions read what they are handed; which placeholder is which is known for the simple."""
        graphs, operands = [], []
        for argument in _flat(node.args):
            inner = _attribute(self.module, argument)
            if isinstance(inner, fx.GraphModule):
                graphs.append(inner)
            else:
                operands.append(self.views.get(argument))
        for graph in graphs:
            fits = len(graph.graph.find_nodes(op="placeholder")) == len(operands)
            _Walk(graph, self.found).run(operands if fits else [])


def _flat(arguments: Any) -> Iterator[fx.Node]:
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            yield from _flat(argument)
        elif isinstance(argument, fx.Node):
            yield argument


def _attribute(module: fx.GraphModule, node: fx.Node) -> Any:
    return lookup(module, str(node.target)) if node.op == "get_attr" else None


def _whole(value: Any) -> _View | None:
    return _View(value, tuple(range(value.dim()))) if isinstance(value, nn.Parameter) else None


# -- products --------------------------------------------------------------------------------------

_CONVOLUTIONS = (aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution)
_TRANSPOSED = (aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d)
_RECURRENT = (aten.lstm, aten.gru, aten.rnn_tanh, aten.rnn_relu)
_PRODUCTS = (aten.matmul, aten.mm, aten.bmm, aten.mv)
_ADDED = (aten.addmm, aten.baddbmm, aten.addmv)
_GETITEM = operator.getitem


def _factors(
    packet: Any, node: fx.Node, views: Mapping[fx.Node, Any]
) -> Iterator[tuple[_View, int | None]]:
    """The weights among a product's operands, and the axis of each that is summed over."""

    def view(place: int) -> Any:
        argument = node.args[place] if place < len(node.args) else None
        return views.get(argument) if isinstance(argument, fx.Node) else None

    places: list[tuple[Any, int | None]] = []
    if packet is aten.linear:
        places = [(view(1), -1)]
    elif packet in _CONVOLUTIONS or packet in _TRANSPOSED:
        transposed = packet in _TRANSPOSED or (packet is aten.convolution and bool(node.args[6]))
        places = [(view(1), 0 if transposed else 1)]
    elif packet in _PRODUCTS or packet in _ADDED:
        first = 1 if packet in _ADDED else 0
        places = [(view(first), -1), (view(first + 1), -2)]
    elif packet is aten.einsum:
        operands = node.args[1] if isinstance(node.args[1], (list, tuple)) else ()
        places = [(views.get(o), None) for o in operands if isinstance(o, fx.Node)]
    elif packet is aten.bilinear:
        places = [(view(2), 1)]
    elif packet in _RECURRENT:
        lists = [a for a in node.args if isinstance(a, (list, tuple))]
        places = [(views.get(p), -1) for a in lists for p in a if isinstance(p, fx.Node)]
    for found, axis in places:
        if isinstance(found, _View) and found.parameter.dim() > 1:
            fits = axis is not None and -len(found.axes) <= axis < len(found.axes)
            yield found, axis if fits else None


# -- changes of shape ------------------------------------------------------------------------------


def _same(view: _View, node: fx.Node) -> _View:
    return view


def _transposed(view: _View, node: fx.Node) -> _View:
    i, j = (node.args[1], node.args[2]) if len(node.args) > 2 else (0, -1)
    axes = list(view.axes)
    if len(axes) > 1:
        axes[i], axes[j] = axes[j], axes[i]  # type: ignore[index]
    return _View(view.parameter, tuple(axes))


def _permuted(view: _View, node: fx.Node) -> _View:
    return _View(view.parameter, tuple(view.axes[i] for i in node.args[1]))  # type: ignore[union-attr]


def _reshaped(view: _View, node: fx.Node) -> _View:
    """Axes at both ends that keep their size are still the parameter's."""
    shape = tuple(node.meta["val"].shape)
    before = tuple(node.args[0].meta["val"].shape)  # type: ignore[union-attr]
    axes: list[int | None] = [None] * len(shape)
    if all(isinstance(n, int) for n in (*shape, *before)):
        count = min(len(shape), len(before))
        for side in (range(count), range(-1, -count - 1, -1)):
            for i in side:
                if shape[i] != before[i]:
                    break
                axes[i] = view.axes[i]
    return _View(view.parameter, tuple(axes))


def _unsqueezed(view: _View, node: fx.Node) -> _View:
    place = int(node.args[1]) % (len(view.axes) + 1)  # type: ignore[arg-type]
    return _View(view.parameter, (*view.axes[:place], None, *view.axes[place:]))


def _parts(view: _View, node: fx.Node) -> tuple[_View, ...]:
    return (view,) * len(node.meta["val"])


def _selected(view: _View, node: fx.Node) -> _View:
    axis = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    place = axis % len(view.axes)
    return _View(view.parameter, (*view.axes[:place], *view.axes[place + 1 :]))


def _unbound(view: _View, node: fx.Node) -> tuple[_View, ...]:
    return (_selected(view, node),) * len(node.meta["val"])


_RULES: dict[Callable[[_View, fx.Node], Any], str] = {
    _same: "to _to_copy clone contiguous detach alias slice narrow type_as",
    _transposed: "t transpose numpy_T swapaxes",
    _permuted: "permute",
    _reshaped: "view reshape _unsafe_view flatten unflatten squeeze",
    _unsqueezed: "unsqueeze",
    _parts: "split split_with_sizes chunk",
    _selected: "select",
    _unbound: "unbind",
}
_CHANGES = {
    getattr(aten, name): change
    for change, names in _RULES.items()
    for name in names.split()
    if hasattr(aten, name)
}
