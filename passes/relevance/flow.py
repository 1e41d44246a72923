"""Relevance on its way from an output to the inputs, in one of two forms."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Form = Literal["quotient", "relevance"]


@dataclass(frozen=True)
class Flow:
    """Relevance that arrives at a value ``x``.

    Rules that share in proportion to contributions need no division, and often no value, where the
    quotient ``c = R / x`` is handed on instead of ``R``: it goes backwards through a linear map as
    a gradient does.

    Attributes:
        tensor: ``c`` or ``R``, of the value's shape.
        form: Which of them.
    """

    tensor: Tensor
    form: Form = "quotient"

    @property
    def is_quotient(self) -> bool:
        """Whether the tensor is ``R / x``."""
        return self.form == "quotient"

    def relevance(self, value: Tensor) -> Tensor:
        """``R``, given the value."""
        return times(self.tensor, value) if self.is_quotient else self.tensor

    @property
    def least(self) -> float:
        """The smallest normal number of the tensor's type, once for each element."""
        return torch.finfo(self.tensor.dtype).tiny * self.tensor.numel()

    def exact(self, value: Tensor) -> Tensor:
        """``R`` in double precision, in which products of single precision aren't rounded."""
        return Flow(_double(self.tensor), self.form).relevance(_double(value)).double()


def _double(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float64))


def merged(first: Flow | None, second: Flow, value: Tensor) -> Flow:
    """The sum of what arrives at one value."""
    if first is None:
        return second
    if first.form == second.form:
        return Flow(first.tensor + second.tensor, first.form)
    return Flow(first.relevance(value) + second.relevance(value), "relevance")


def times(quotient: Tensor, value: Tensor) -> Tensor:
    """``c * x``; zero where ``c`` is, also for an infinite ``x`` (a masked score)."""
    if quotient.is_complex() or value.is_complex():
        return torch.where(quotient == 0, 0, quotient * value)
    # relu's derivative masks without a tensor of truth values, several times faster on a CPU
    return quotient * torch.ops.aten.threshold_backward(value, quotient.abs(), 0)


def signed(value: Tensor, eps: Tensor | float) -> Tensor:
    """``x`` moved away from zero by ``eps``; zero counts as positive."""
    return value + torch.where(value >= 0, eps, -eps)
