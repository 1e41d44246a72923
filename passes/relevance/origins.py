"""What elementwise functions are at zero: there the quotient ``f(x) / x`` needs a limit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op, is_getitem


@dataclass(frozen=True)
class Origin:
    """A function at zero, where it and its derivative are finite and the same for all elements.

    Attributes:
        value: ``f(0)``.
        slope: ``f'(0)``.
    """

    value: float
    slope: float


def origins(ops: Iterable[Op], values: Mapping[fx.Node, Any]) -> dict[Op, Origin]:
    """The origins of the activations among operations.

    Args:
        ops: Operations.
        values: The value of each node in one run; only shapes and settings count.
    """
    found = {}
    for op in ops:
        if op.family is Family.ACTIVATION and not is_getitem(op.node) and len(op.operands) == 1:
            origin = _origin(op, values)
            if origin is not None:
                found[op] = origin
    return found


def _origin(op: Op, values: Mapping[fx.Node, Any]) -> Origin | None:
    (operand,) = op.operands
    leaf = torch.zeros_like(values[operand]).requires_grad_()
    with torch.enable_grad():
        result = op.run(lambda n: leaf if n is operand else values[n])
    if not isinstance(result, Tensor) or result.shape != leaf.shape or not leaf.numel():
        return None
    value = _common(result.detach())
    if value is None or not result.requires_grad:
        return None if value is None else Origin(value, 0.0)
    (grad,) = torch.autograd.grad(result.sum(), leaf)
    slope = _common(grad)
    return None if slope is None else Origin(value, slope)


def _common(value: Tensor) -> float | None:
    """What all elements are, if they are the same finite number."""
    first = value.flatten()[0]
    return float(first) if bool(first.isfinite()) and bool((value == first).all()) else None
