"""Selective network linearization (Cho, Joshi, Reagen, Garg & Hegde, ICML 2022)."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.passes.linearize.methods.groups import damage_of, grouped
from graphopt.passes.linearize.methods.student import Course, device_of
from graphopt.passes.linearize.task import Selected, Task, solved

_THRESHOLD = 1e-2  # a slope below it counts as none
_RATE = 1e-2  # the paper's 1e-3 takes thousands of steps from 1 to 0
_STRENGTH, _RAISED = 0.1, 1.1  # of the penalty at first, and by how much it grows


def by_snl(task: Task) -> Selected:
    """Slopes driven to zero while the outputs stay the source's.

    Each group has a slope ``a``, 1 at first: ``a f(x) + (1 - a) r(x)``. Adam makes
    ``T^2 KL(source, student) + lambda sum |a|`` small over the slopes and a throw-away copy of the
    weights; lambda grows by a tenth after each epoch in which no fewer slopes were above 0.01 than
    ever before, until these are within the limits. Other than in the paper there are no labels, r
    is the fitted replacement, and a group of more elements is penalised for each.

    The damage of a group is its last slope; those that fell below the threshold come before, in the
    order in which they did.
    """
    groups = grouped(task)
    slopes = torch.ones(groups.total, device=device_of(task.reference), requires_grad=True)
    sizes = (groups.sizes / groups.sizes.sum()).to(slopes)
    course = Course(task, groups, slopes, _RATE, "slopes")
    strength, fewest, epochs = _STRENGTH * course.everything(), groups.size(slopes > 0), 0
    fell = torch.full((groups.total,), torch.inf)
    while not course.over:
        course.epoch(lambda: slopes, lambda s=strength: s * (sizes * slopes.abs()).sum())
        epochs += 1
        fell = _fallen(fell, slopes.detach().cpu(), epochs)
        size = groups.size(fell.isinf())
        if size <= groups.target:
            break
        strength *= 1.0 if size < fewest else _RAISED
        fewest = min(size, fewest)
    below = _THRESHOLD * fell / (epochs + 1)
    scores = torch.where(fell.isinf(), slopes.detach().cpu(), below)
    return solved(task, damage_of(task, groups, scores), task.limits)


def _fallen(before: Tensor, slopes: Tensor, epoch: int) -> Tensor:
    """In which epoch each slope fell below the threshold; infinite where it is above."""
    now = torch.where(before.isinf(), float(epoch), before)
    return torch.where(slopes > _THRESHOLD, torch.inf, now)
