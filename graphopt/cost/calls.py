"""A node's call as plain data, and the same call on synthesized inputs.

Two nodes that run the same op on tensors of the same shapes, strides, types and devices, with the
same other arguments, cost the same; their `Call` has the same key.  `Call.synthesize` builds inputs
for it: floating values are random in [0, 1) (valid as probabilities and under logarithms), integers
are zero (valid as indices), and strides are as in the graph.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graphopt.cost.sizes import Substitution, concrete

_PATTERN = 1 << 16


class CallError(ValueError):
    """A call that can't be rebuilt on synthesized inputs."""


@dataclass(frozen=True)
class TensorSpec:
    """What a synthesized tensor must look like; ``slot`` tells equal arguments from shared ones."""

    slot: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def build(self) -> torch.Tensor:
        """A tensor of this shape and these strides, overlapping ones included."""
        last = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        count = last + 1 if all(self.shape) else 0
        flat = torch.empty(count, dtype=self.dtype, device=self.device)
        _fill(flat)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class _Module:
    """A sub-graph handed to a higher-order op; the same object is the same argument."""

    module: Any = field(hash=False, compare=False)
    identity: int = 0


@dataclass(frozen=True)
class Call:
    """One op call on described inputs.

    Attributes:
        target: The op.
        args: Positional arguments as nested tuples of `TensorSpec` and plain values.
        kwargs: ``(name, argument)`` pairs.
        key: Equal for calls that cost the same.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    @property
    def key(self) -> Hashable:
        """Hashable description of the call."""
        return (str(self.target), id(self.target), _freeze(self.args), _freeze(self.kwargs))

    @property
    def device(self) -> torch.device:
        """Device of the first tensor argument that isn't on the CPU, else the CPU."""
        return next((s.device for s in self.specs() if s.device.type != "cpu"), torch.device("cpu"))

    def specs(self) -> list[TensorSpec]:
        """The tensor arguments."""
        found: list[TensorSpec] = []
        _collect(self.args, found)
        _collect([value for _, value in self.kwargs], found)
        return found

    def synthesize(self) -> tuple[list[Any], dict[str, Any]]:
        """Fresh arguments for the call; an argument given twice is one tensor."""
        built: dict[int, torch.Tensor] = {}
        args = [_build(_placed(self.target, i, arg), built) for i, arg in enumerate(self.args)]
        if self.target in _WITH_WORKSPACE:
            args[-1] = _rnn_workspace(args)
        return args, {name: _build(value, built) for name, value in self.kwargs}


# Their last argument is opaque memory that only the forward op can fill: they crash on anything
# else, and its fake value has no size.
_WITH_WORKSPACE = {
    op.default
    for op in (getattr(torch.ops.aten, "mkldnn_rnn_layer_backward", None),)
    if op is not None
}


_READ_BY_HOST = frozenset({"philox_seed", "philox_offset"})


def _placed(target: Any, place: int, argument: Any) -> Any:
    """An argument on the device where the op reads it.

    The backward ops of fused attention read the random state of dropout on the host, where the
    forward ones leave it; fake values say that it is on the device, and reading that crashes.
    """
    if not (isinstance(argument, TensorSpec) and isinstance(target, torch._ops.OpOverload)):
        return argument
    on_host = argument.shape == () and argument.dtype == torch.int64
    if on_host and target._schema.arguments[place].name in _READ_BY_HOST:
        return replace(argument, device=torch.device("cpu"))
    return argument


def _rnn_workspace(args: list[Any]) -> torch.Tensor:
    """The workspace that `mkldnn_rnn_layer` hands to the backward call with these arguments."""
    (tensors, rest) = args[:7], args[13:22]
    reverse, mode, hidden, layers, biases, _, bidirectional, batch_sizes, batch_first = rest
    forward = torch.ops.aten.mkldnn_rnn_layer.default
    return forward(
        *tensors, reverse, batch_sizes, mode, hidden, layers, biases, bidirectional, batch_first,
        True,
    )[3]  # fmt: skip


def describe(node: fx.Node, symbols: Substitution | None = None) -> Call:
    """Describe the call that a ``call_function`` node makes.

    Args:
        node: A node whose inputs carry fake tensors in ``meta["val"]``.
        symbols: What stands for symbolic sizes; default: the hints.

    Raises:
        CallError: An input has no strided tensor value, or an argument is of an unknown kind.
        graphopt.cost.sizes.UnknownSizeError: A size depends on the data.
    """
    slots: dict[fx.Node, int] = {}

    def convert(value: Any) -> Any:
        if isinstance(value, fx.Node):
            slot = slots.setdefault(value, len(slots))
            return _from_value(node_value(value), slot, symbols)
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        if isinstance(value, dict):
            return {name: convert(item) for name, item in value.items()}
        if isinstance(value, slice):
            return slice(convert(value.start), convert(value.stop), convert(value.step))
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return concrete(value, symbols)
        return value

    kwargs = tuple((name, convert(value)) for name, value in node.kwargs.items())
    return Call(node.target, tuple(convert(arg) for arg in node.args), kwargs)


def node_value(node: fx.Node) -> Any:
    """What a node stands for: its fake value, or for a ``get_attr`` without one the attribute."""
    if "val" in node.meta:
        return node.meta["val"]
    owner = node.graph.owning_module
    if node.op == "get_attr" and owner is not None:
        found: Any = owner
        for part in str(node.target).split("."):
            found = getattr(found, part)
        return found
    raise CallError(f"node {node.name} carries no value")


def _from_value(value: Any, slot: int, symbols: Substitution | None) -> Any:
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_quantized:
            raise CallError(f"a tensor of layout {value.layout} can't be synthesized")
        shape = tuple(concrete(size, symbols) for size in value.shape)
        stride = tuple(concrete(size, symbols) for size in value.stride())
        return TensorSpec(slot, shape, stride, value.dtype, value.device)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return concrete(value, symbols)
    if isinstance(value, torch.nn.Module):
        return _Module(value, id(value))
    if value is None or isinstance(value, (int, float, bool, str, complex)):
        return value
    raise CallError(f"an argument of type {type(value).__name__} can't be synthesized")


def _fill(flat: torch.Tensor) -> None:
    if flat.dtype.is_complex:
        _fill(torch.view_as_real(flat).view(-1))
    elif flat.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        # Random numbers cost more than many an op: a block of them is repeated.
        head = flat[:_PATTERN].uniform_()
        whole = flat.numel() // _PATTERN * _PATTERN
        if whole > _PATTERN:
            flat[:whole].view(-1, _PATTERN)[1:].copy_(head)
        if _PATTERN <= whole < flat.numel():
            flat[whole:].copy_(head[: flat.numel() - whole])
    else:
        flat.untyped_storage().fill_(0)


def _build(value: Any, built: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, TensorSpec):
        if value.slot not in built:
            built[value.slot] = value.build()
        return built[value.slot]
    if isinstance(value, _Module):
        return value.module
    if isinstance(value, (list, tuple)):
        return [_build(item, built) for item in value]
    if isinstance(value, dict):
        return {name: _build(item, built) for name, item in value.items()}
    return value


def _collect(value: Any, found: list[TensorSpec]) -> None:
    if isinstance(value, TensorSpec):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for item in value:
            _collect(item, found)
    elif isinstance(value, dict):
        _collect(list(value.values()), found)


def _freeze(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return ("seq", *(_freeze(item) for item in value))
    if isinstance(value, dict):
        return ("map", *((name, _freeze(item)) for name, item in value.items()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, float):
        return ("float", repr(value))  # NaN must equal itself, 0.0 not -0.0
    return (type(value).__name__, value)
