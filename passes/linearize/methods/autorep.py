"""AutoReP: indicators with hysteresis (Peng et al., ICCV 2023)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.passes.linearize.methods.groups import damage_of, grouped
from graphopt.passes.linearize.methods.student import Course, device_of
from graphopt.passes.linearize.task import Selected, Task, solved

_HYSTERESIS = 3e-3
_RATE = 1e-2
_START = 0.2
_STRENGTH, _RAISED, _RELAXED = 0.5, 1.1, 0.1


def by_autorep(task: Task) -> Selected:
    """Indicators learned through a straight-through estimator.

    Each group has an auxiliary number ``m`` and an indicator ``h`` of whether it is kept, which
    turns to 0 where m falls below ``-t`` and back to 1 where it rises above ``t`` (t = 0.003);
    backwards, ``dL/dm = softplus(m) dL/dh``. Adam makes the distillation loss ``T^2 KL`` plus
    ``lambda density`` small over m and a throw-away copy of the weights. Lambda grows while the
    count doesn't fall, as with `snl`, and is a tenth while the limits are kept, so that the numbers
    find their order at the budget. Other than in the paper there are no labels, and all m start
    alike, not at random. The polynomial is the survey's, fitted by least squares, as DaPa means it
    to be (the paper's code takes the variance for the deviation).

    The damage of a group is its last m, counted from the lowest.
    """
    groups = grouped(task)
    device = device_of(task.reference)
    row = torch.full((groups.total,), _START, device=device, requires_grad=True)
    kept = torch.ones(groups.total, device=device)
    sizes = (groups.sizes / groups.sizes.sum()).to(row)
    course = Course(task, groups, row, _RATE, "indicators")
    strength, fewest = _STRENGTH * course.everything(), groups.size(kept > 0)
    state = Indicators(kept)
    while not course.over:
        size = groups.size(state.kept > 0)
        if size > groups.target:
            strength *= 1.0 if size < fewest else _RAISED
            fewest = min(size, fewest)
        price = strength * (1.0 if size > groups.target else _RELAXED)
        course.epoch(
            lambda: state.turned(row),
            lambda price=price: price * (sizes * state.indicator).sum(),
        )
    scores = row.detach() - row.detach().min() + _RATE  # what is worth nothing is never kept
    return solved(task, damage_of(task, groups, scores), task.limits)


class Indicators:
    """The indicators, which remember how they stand."""

    def __init__(self, kept: Tensor) -> None:
        self.kept = self.indicator = kept

    def turned(self, row: Tensor) -> Tensor:
        """The indicators after the numbers have moved."""
        now = row.detach()
        stays = self.kept * (now > -_HYSTERESIS) + (1 - self.kept) * (now > _HYSTERESIS)
        self.kept = stays.to(row.dtype)
        self.indicator = _Indicator.apply(row, self.kept)  # type: ignore[assignment]
        return self.indicator


class _Indicator(torch.autograd.Function):
    """An indicator whose derivative is estimated straight through, times softplus."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(row)
        return kept.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (row,) = ctx.saved_tensors
        return F.softplus(row) * gradients[0], None
