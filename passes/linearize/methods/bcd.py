"""Block coordinate descent (Rakhlin, Jevnisek & Avidan, arXiv 2511.11781)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from graphopt.passes.linearize.calibration import Reference
from graphopt.passes.linearize.methods.groups import Groups, damage_of, grouped, ranks
from graphopt.passes.linearize.methods.student import Student, device_of, lessons
from graphopt.passes.linearize.refit import refit
from graphopt.passes.linearize.sites import Site
from graphopt.passes.linearize.task import Selected, Task, solved

_BLOCKS = 64  # removed one by one
_REFITS = 16  # in between
_EAGER = 2.0  # how much rather groups are drawn whose replacement changes little
_LEAST_CHANGE = 1e-12


def by_bcd(task: Task) -> Selected:
    """Blocks of groups removed one by one, each the least harmful of some that were tried.

    A block is drawn at random, in turn from one site and from all of them. What its removal loses
    is measured: the distillation loss on the calibration inputs, by forward passes alone. The
    masks are binary throughout, so that nothing is lost at a threshold. In place of the paper's
    fine-tuning the replacements are refitted one after the other, up to sixteen times on the way.
    Few blocks are tried, so groups are not all drawn alike, but by ``1 / c^2``, with c what the
    replacement changes of the group's own values.

    The damage of a group is its place in the order of removal. There are at most 64 blocks, and so
    64 passes through the calibration inputs for each trial.
    """
    groups = grouped(task)
    run = _Descent(task, groups)
    order: list[Tensor] = []
    total = groups.size(run.kept)
    quota = (total - groups.target) / _BLOCKS
    while run.left > 0 and bool(run.kept.any()):
        done = 1 - run.left / max(total - groups.target, 1e-9)
        task.progress("removing blocks of non-linearities", done)
        if len(order) * _REFITS // _BLOCKS > run.refits:
            run.refit()
        order.append(run.step(min(quota, run.left)))
    return solved(task, damage_of(task, groups, ranks(order, groups.total)), task.limits)


class _Descent:
    """Masks, and the network with them."""

    def __init__(self, task: Task, groups: Groups) -> None:
        self.task, self.groups = task, groups
        self.kept = torch.ones(groups.total, dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(task.seed)
        self.device = device_of(task.reference)
        self.lessons = lessons(task.reference, groups.sites)
        self.refits = 0
        counts = torch.tensor(groups.counts)
        self.sites = torch.repeat_interleave(torch.arange(len(counts)), counts)
        coefficients = {s: task.survey.options[s][groups.kinds[s]] for s in groups.sites}
        self._set(task.reference, coefficients)

    def _set(self, reference: Reference, coefficients: Mapping[Site, Tensor | None]) -> None:
        self.student = Student(reference, self.groups, coefficients, reference.attribute)
        gates = self.kept.float().to(self.device)
        changes = self.student.changes(self.lessons, gates).double().cpu()
        self.likely = -_EAGER * (changes / self.groups.sizes).clamp_min(_LEAST_CHANGE).log()

    @property
    def left(self) -> float:
        """What is to be removed still."""
        return self.groups.size(self.kept) - self.groups.target

    def step(self, quota: float) -> Tensor:
        """Remove the least harmful of some blocks.

        Args:
            quota: What a block takes of the limit, at least.

        Returns:
            The groups that are gone.
        """
        blocks = [self._drawn(trial, quota) for trial in range(self.task.trials)]
        losses = [self._lost(block) for block in blocks]
        best = blocks[min(range(len(blocks)), key=lambda index: losses[index])]
        self.kept[best] = False
        return best

    def refit(self) -> None:
        """Fit the replacements to what the replaced part in front of them gives."""
        self.refits += 1
        reference = self.task.reference
        chosen = self.groups.replacements(self.task, self.kept)
        found = refit(reference, chosen, softmaxes=self.task.softmaxes)
        coefficients = {
            site: self.student.coefficients[site] if each.is_whole else each.coefficients
            for site, each in found.replacements.items()
        }
        statistics = {**reference.statistics, **found.here}
        present = dataclasses.replace(reference, statistics=statistics, stand_ins=found.stand_ins())
        self._set(present, coefficients)

    def _drawn(self, trial: int, quota: float) -> Tensor:
        """A block: groups of one site, or of any."""
        places = self.kept.nonzero().squeeze(1)
        if trial % 2 == 0:
            sites = self.sites[places]
            present = sites.unique()
            site = present[torch.randint(len(present), (), generator=self.generator)]
            places = places[sites == site]
        # Gumbel's noise: the largest are a draw without replacement by exp(likely).
        drawn = torch.rand(len(places), generator=self.generator, dtype=torch.float64)
        noise = -(-drawn.clamp_min(1e-12).log()).log()
        mixed = places[(self.likely[places] + noise).argsort(descending=True)]
        enough = self.groups.sizes[mixed].cumsum(0) >= quota - 1e-9
        return mixed[: int(enough.int().argmax()) + 1] if bool(enough.any()) else mixed

    @torch.no_grad()
    def _lost(self, block: Tensor) -> float:
        gates = self.kept.float()
        gates[block] = 0.0
        gates = gates.to(self.device)
        found = sum(float(self.student.lost(each, gates)) for each in self.lessons)
        return found if math.isfinite(found) else math.inf
