"""What rules of several topics need: sizes, axes, and views of values."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.private.builder import Builder, Plain, Shared, Value


def wide(value: Any, rank: int) -> tuple[int, ...]:
    """A size for each of so many dimensions."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    return values * rank if len(values) == 1 else values


def axes(x: Value, dim: Any) -> list[int]:
    """Dimensions as a list; none given: all."""
    if dim is None or dim in ((), []):
        return list(range(len(x.shape)))
    return [dim] if isinstance(dim, int) else list(dim)


def tensors(*values: Any) -> list[Value]:
    """Numbers as public values, beside values."""
    return [
        v if isinstance(v, (Shared, Plain)) else Plain(torch.tensor(float(v), dtype=torch.float64))
        for v in values
    ]


def transposed(b: Builder, x: Value) -> Value:
    """The last two dimensions swapped."""
    return b.move(lambda t: t.transpose(-1, -2), [x], whole=False)


def by_channel(b: Builder, vector: Value, rank: int) -> Value:
    """A vector as ``(channels, 1, ...)``, for broadcasting."""
    return b.move(lambda t: t.reshape(-1, *[1] * rank), [vector], whole=False)
