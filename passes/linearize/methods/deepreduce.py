"""DeepReDuce: stages culled, then thinned (Jha, Ghodsi, Garg & Reagen, ICML 2021)."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passes.linearize.distillation import distance, floating
from graphopt.passes.linearize.fisher import fisher
from graphopt.passes.linearize.methods.groups import Groups, damage_of, grouped
from graphopt.passes.linearize.methods.student import TEMPERATURE
from graphopt.passes.linearize.refit import refit
from graphopt.passes.linearize.replacements import Kind, Replacement
from graphopt.passes.linearize.sites import Site
from graphopt.passes.linearize.task import Selected, Task, solved

_COUNT_POWER = 0.07  # the paper's w
_MOST_STAGES = 12
Plan = list[tuple[Site, ...]]


@dataclass(frozen=True)
class Stage:
    """Sites that follow each other at the same resolution.

    Attributes:
        sites: In the order of their calls.
        criticality: What keeping them alone recovers, for ``count^0.07``.
        lost: What replacing them alone loses, for the same.
        first: Which of alternate sites are thinned first: 0, those at even places; 1, at odd ones.
    """

    sites: tuple[Site, ...]
    criticality: float
    lost: float
    first: int

    @property
    def elements(self) -> int:
        """Non-linearities of one sample."""
        return sum(site.per_sample for site in self.sites)

    @property
    def alternate(self) -> tuple[Site, ...]:
        """Sites that thinning drops."""
        return self.sites[self.first :: 2]


def by_deepreduce(task: Task) -> Selected:
    """The least critical stages go first, then every other site of the rest.

    A stage is a run of sites of the same spatial or sequence size. Its criticality is the share of
    the distillation loss of the network without any non-linearity that comes back where this
    stage's alone are kept, divided by ``count^0.07``. Without training a stage may recover nothing
    alone, so a second order is what replacing each alone loses. Stages are culled, those needed
    least first, then those left are thinned: every other site goes, or, unless sites are kept or
    replaced whole, the same share of all of them. Which order, how many stages are culled, and
    which thinning follows is what loses least within the limits (the paper's Pareto set). Within a
    site the Fisher score decides.

    Other than in the paper nothing is trained and no labels are used: it trains a network for each
    stage and each candidate and goes by accuracy, here replacements are refitted and distillation
    losses compared. It thins by whole sites alone, which without training falls behind a random
    choice of elements. Its third step changes the architecture, which a pass can't do for a trained
    network: that becomes advice, as in DeepReShape (Jha & Reagen, TMLR 2024).

    The damage of a group is its site's place in the order in which sites are dropped, and within
    that its Fisher score's rank.
    """
    groups = grouped(task)
    judge = _Judge(task, groups)
    stages = judge.stages(_runs(groups.sites))
    ties = _ties(task, groups)
    best: Selected | None = None
    least = math.inf
    plans = list(_plans(stages, groups.unit == "site"))
    hasty = dataclasses.replace(task, time_limit=task.time_limit / len(plans))
    for number, plan in enumerate(plans):
        task.progress("comparing orders of stages", number / len(plans))
        found = solved(hasty, damage_of(task, groups, _scores(groups, plan, ties)), task.limits)
        lost = judge.lost(found.replacements) if len(plans) > 1 else 0.0
        if best is None or lost < least:
            best, least = found, lost
    assert best is not None
    return dataclasses.replace(best, advice=advice(stages))


class _Judge:
    """Measures what is lost with some sites kept, after a refit."""

    def __init__(self, task: Task, groups: Groups) -> None:
        self.task, self.groups = task, groups

    def lost(self, chosen: Mapping[Site, Replacement]) -> float:
        """The distillation loss on the calibration inputs; infinite where values escape."""
        teacher, student = refit(self.task.reference, chosen, softmaxes=self.task.softmaxes).outputs
        pairs = zip(teacher, student, strict=True)
        found = [distance(floating(b), floating(a), TEMPERATURE) for a, b in pairs]
        mean = float(torch.stack(found).mean())
        return mean if math.isfinite(mean) else math.inf

    def without(self, kept: Sequence[Site]) -> float:
        """The same where these sites are kept whole and no others."""
        rows = [
            torch.full((count,), site in kept)
            for site, count in zip(self.groups.sites, self.groups.counts, strict=True)
        ]
        return self.lost(self.groups.replacements(self.task, torch.cat(rows)))

    def stages(self, runs: Sequence[tuple[Site, ...]]) -> list[Stage]:
        """Runs of sites with their criticality, in the order of their calls."""
        none = self.without(())
        found = []
        for number, run in enumerate(runs):
            self.task.progress("measuring stages", number / len(runs))
            back = 1 - self.without(run) / none if 0 < none < math.inf else 0.0
            halves = [self.without(run[1::2]), self.without(run[::2])] if len(run) > 1 else [0, 1]
            first = 0 if halves[0] < halves[1] else 1
            lost = self.without([site for site in self.groups.sites if site not in run])
            count = sum(site.per_sample for site in run) ** _COUNT_POWER
            found.append(Stage(run, max(back, 0.0) / count, lost / count, first))
        return found


def _runs(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites that follow each other at one resolution; the smallest neighbours joined if many."""
    runs = [tuple(run) for _, run in itertools.groupby(sites, _resolution)]
    while len(runs) > _MOST_STAGES:
        sums = [len(a) + len(b) for a, b in itertools.pairwise(runs)]
        place = sums.index(min(sums))
        runs[place : place + 2] = [runs[place] + runs[place + 1]]
    return runs


def _resolution(site: Site) -> tuple[int, ...]:
    """Sizes besides the samples and the channels."""
    return tuple(size for axis, size in enumerate(site.shape) if axis > 0 and axis != site.channel)


def _plans(stages: Sequence[Stage], whole_sites: bool) -> Iterator[Plan]:
    """Orders in which sites may be dropped, those of one entry alike."""
    for by_need in _by_need(stages):
        for culled in range(len(by_need)):
            order = [(site,) for stage in by_need[:culled] for site in stage.sites]
            rest = [site for stage in by_need[culled:] for site in stage.sites]
            thinned = [site for stage in by_need[culled:] for site in stage.alternate]
            yield [*order, *((s,) for s in thinned), *((s,) for s in rest if s not in thinned)]
            if not whole_sites:
                yield [*order, tuple(rest)]


def _by_need(stages: Sequence[Stage]) -> Iterator[list[Stage]]:
    """Stages, those that are needed least in front."""
    recovered = sorted(stages, key=lambda stage: (stage.criticality, stage.lost))
    yield recovered
    lost = sorted(stages, key=lambda stage: stage.lost)
    if lost != recovered:
        yield lost


def _scores(groups: Groups, plan: Plan, ties: Tensor) -> Tensor:
    """Scores that rise along a plan, within an entry by what is given in [0, 1)."""
    places = {site: place for place, alike in enumerate(plan) for site in alike}
    rows = [
        torch.full((count,), places[site] + 1.0, dtype=torch.float64)
        for site, count in zip(groups.sites, groups.counts, strict=True)
    ]
    return torch.cat(rows) + ties


def _ties(task: Task, groups: Groups) -> Tensor:
    """The rank of each group within its site by Fisher's score, in [0, 1)."""
    options: dict[Site, dict[Kind, Tensor | None]] = {
        site: {kind: task.survey.options[site][kind]} for site, kind in groups.kinds.items()
    }
    scores = fisher(task.reference, options, groups.unit, task.seed)
    rows = [
        scores[site][kind].argsort().argsort().double() / count
        for (site, kind), count in zip(groups.kinds.items(), groups.counts, strict=True)
    ]
    return torch.cat(rows)


def advice(stages: Sequence[Stage]) -> tuple[str, ...]:
    """What a new design of the network could do (DeepReShape), as sentences."""
    if len(stages) < 2:
        return ()
    total = sum(stage.elements for stage in stages)
    least, *_, most = sorted(stages, key=lambda stage: (stage.criticality, stage.lost))
    return (
        f"{_share(least, total)} of the non-linearities sit in the least critical stage "
        f"({_place(least)}): fewer channels or a smaller feature map there save most of them",
        f"{_share(most, total)} sit in the most critical stage ({_place(most)}): widen the "
        f"network there first",
    )


def _share(stage: Stage, total: int) -> str:
    return f"{100 * stage.elements / total:.0f} %"


def _place(stage: Stage) -> str:
    first, last = stage.sites[0], stage.sites[-1]
    size = "x".join(map(str, _resolution(first)))
    names = first.name if first is last else f"{first.name} to {last.name}"
    return f"{names}, {size}" if size else names
