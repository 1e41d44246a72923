"""Which operators are non-linearities, and what is known of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """One piece of a piecewise polynomial.

    Attributes:
        low: Where it begins.
        high: Where it ends.
        coefficients: By rising power.
    """

    low: float
    high: float
    coefficients: tuple[float, ...]


Pieces = tuple[Piece, ...]


@dataclass(frozen=True)
class Activation:
    """A family of operators.

    Attributes:
        name: Of the family.
        compares: Whether it compares every element that reaches it.
        elementwise: Whether each element of the output depends on the same one of the input alone.
        pieces: The operator as a piecewise polynomial, given its scalar arguments; None: it isn't
            one.
    """

    name: str
    compares: bool = True
    elementwise: bool = True
    pieces: Callable[..., Pieces] | None = None


def _steps(*knots: float, parts: Sequence[tuple[float, ...]]) -> Pieces:
    ends = (-math.inf, *knots, math.inf)
    return tuple(
        Piece(low, high, part)
        for low, high, part in zip(ends, ends[1:], parts, strict=False)
        if low < high
    )


def _relu() -> Pieces:
    return _steps(0.0, parts=[(0.0,), (0.0, 1.0)])


def _leaky(slope: float = 0.01) -> Pieces:
    return _steps(0.0, parts=[(0.0, slope), (0.0, 1.0)])


def _hardtanh(low: float = -1.0, high: float = 1.0) -> Pieces:
    return _steps(low, high, parts=[(low,), (0.0, 1.0), (high,)])


def _clamp(low: float | None = None, high: float | None = None) -> Pieces:
    least, most = -math.inf if low is None else low, math.inf if high is None else high
    return _steps(least, most, parts=[(least,), (0.0, 1.0), (most,)])


def _threshold(threshold: float, value: float) -> Pieces:
    return _steps(threshold, parts=[(value,), (0.0, 1.0)])


def _hardswish() -> Pieces:
    return _steps(-3.0, 3.0, parts=[(0.0,), (0.0, 0.5, 1 / 6), (0.0, 1.0)])


def _hardsigmoid() -> Pieces:
    return _steps(-3.0, 3.0, parts=[(0.0,), (0.5, 1 / 6), (1.0,)])


def _hardshrink(lambd: float = 0.5) -> Pieces:
    return _steps(-lambd, lambd, parts=[(0.0, 1.0), (0.0,), (0.0, 1.0)])


def _softshrink(lambd: float = 0.5) -> Pieces:
    return _steps(-lambd, lambd, parts=[(lambd, 1.0), (0.0,), (-lambd, 1.0)])


def _abs() -> Pieces:
    return _steps(0.0, parts=[(0.0, -1.0), (0.0, 1.0)])


_FAMILIES: dict[Any, Activation] = {
    aten.relu: Activation("relu", pieces=_relu),
    aten.relu6: Activation("relu6", pieces=lambda: _hardtanh(0.0, 6.0)),
    aten.hardtanh: Activation("hardtanh", pieces=_hardtanh),
    aten.clamp: Activation("clamp", pieces=_clamp),
    aten.clip: Activation("clamp", pieces=_clamp),
    aten.clamp_min: Activation("clamp", pieces=lambda low: _clamp(low, None)),
    aten.clamp_max: Activation("clamp", pieces=lambda high: _clamp(None, high)),
    aten.threshold: Activation("threshold", pieces=_threshold),
    aten.leaky_relu: Activation("leaky_relu", pieces=_leaky),
    aten.prelu: Activation("prelu"),
    aten.rrelu: Activation("rrelu"),
    aten.abs: Activation("abs", pieces=_abs),
    aten.hardswish: Activation("hardswish", pieces=_hardswish),
    aten.hardsigmoid: Activation("hardsigmoid", pieces=_hardsigmoid),
    aten.hardshrink: Activation("hardshrink", pieces=_hardshrink),
    aten.softshrink: Activation("softshrink", pieces=_softshrink),
    aten.elu: Activation("elu"),
    aten.celu: Activation("celu"),
    aten.selu: Activation("selu"),
    aten.gelu: Activation("gelu", compares=False),
    aten.silu: Activation("silu", compares=False),
    aten.mish: Activation("mish", compares=False),
    aten.sigmoid: Activation("sigmoid", compares=False),
    aten.log_sigmoid: Activation("log_sigmoid", compares=False),
    aten.tanh: Activation("tanh", compares=False),
    aten.softplus: Activation("softplus", compares=False),
    aten.maximum: Activation("maximum"),
    aten.minimum: Activation("minimum"),
    aten.max_pool1d: Activation("max_pool", elementwise=False),
    aten.max_pool2d: Activation("max_pool", elementwise=False),
    aten.max_pool3d: Activation("max_pool", elementwise=False),
    aten.adaptive_max_pool1d: Activation("max_pool", elementwise=False),
    aten.adaptive_max_pool2d: Activation("max_pool", elementwise=False),
    aten.adaptive_max_pool3d: Activation("max_pool", elementwise=False),
    aten.max_pool2d_with_indices: Activation("max_pool", elementwise=False),
    aten.softmax: Activation("softmax", compares=False, elementwise=False),
    aten._softmax: Activation("softmax", compares=False, elementwise=False),
    aten.fmax: Activation("maximum"),
    aten.fmin: Activation("minimum"),
    aten.where: Activation("where", elementwise=False),
    aten.masked_fill: Activation("where", elementwise=False),
    aten.sign: Activation("sign"),
    aten.sgn: Activation("sign"),
    aten.heaviside: Activation("sign"),
    **{
        packet: Activation("comparison", elementwise=False)
        for packet in (aten.gt, aten.ge, aten.lt, aten.le, aten.eq, aten.ne)
    },
    **{
        packet: Activation("selection", elementwise=False)
        for packet in (
            aten.max,
            aten.min,
            aten.amax,
            aten.amin,
            aten.argmax,
            aten.argmin,
            aten.median,
            aten.cummax,
            aten.cummin,
        )
    },
    **{packet: Activation("sorting", elementwise=False) for packet in (aten.sort, aten.topk)},
}
_IN_PLACE = {
    getattr(aten, f"{packet.__name__}_"): family
    for packet, family in _FAMILIES.items()
    if hasattr(aten, f"{packet.__name__}_")
}


def family_of(node: fx.Node) -> Activation | None:
    """The family that a call belongs to, or None."""
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return None
    return _FAMILIES.get(target.overloadpacket) or _IN_PLACE.get(target.overloadpacket)


def is_in_place(node: fx.Node) -> bool:
    """Whether a call writes to what it reads."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def pieces_of(node: fx.Node) -> Pieces | None:
    """A call as a piecewise polynomial of its first argument, or None."""
    family = family_of(node)
    scalars = node.args[1:]
    if family is None or family.pieces is None:
        return None
    if not all(a is None or isinstance(a, (int, float)) for a in (*scalars, *node.kwargs.values())):
        return None
    return family.pieces(*scalars, **_renamed(node.kwargs))


_NAMES = {
    "min": "low", "max": "high", "min_val": "low", "max_val": "high", "negative_slope": "slope",
}  # fmt: skip


def _renamed(keywords: Any) -> dict[str, Any]:
    return {_NAMES.get(str(name), str(name)): value for name, value in keywords.items()}
