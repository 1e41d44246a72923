"""The groups of all sites in one row, and what a score of each means to the solver."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.passes.linearize.choice import Granularity, groups
from graphopt.passes.linearize.fisher import Damage, fisher
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.sites import Site
from graphopt.passes.linearize.task import Task


@dataclass(frozen=True)
class Groups:
    """Groups of positions that are kept or replaced as one, those of all sites in one row.

    Attributes:
        sites: The sites, in the order of their calls.
        kinds: What replaces each while the method runs: the nearest of its replacements.
        unit: What a group is; whole sites where nothing but their number is limited.
        of_positions: For each site the group of each position, counted within the site.
        counts: How many groups each site has.
        sizes: What each group takes of the limit: elements, or one call. Float64 ``[groups]``.
        target: How much of that may be kept.
    """

    sites: tuple[Site, ...]
    kinds: Mapping[Site, Kind]
    unit: Granularity
    of_positions: Mapping[Site, Tensor]
    counts: tuple[int, ...]
    sizes: Tensor
    target: float

    @property
    def total(self) -> int:
        """How many groups there are."""
        return len(self.sizes)

    def split(self, row: Tensor) -> dict[Site, Tensor]:
        """Each site's part of a row."""
        return dict(zip(self.sites, row.split(self.counts), strict=True))

    def size(self, kept: Tensor) -> float:
        """What the groups take at which a row is true."""
        return float(self.sizes[kept.cpu()].sum())

    def replacements(self, task: Task, kept: Tensor) -> dict[Site, Replacement]:
        """What becomes of each site where a row is false."""
        found = {}
        for site, own in self.split(kept.cpu()).items():
            positions = own[self.of_positions[site]].nonzero().squeeze(1)
            kind = self.kinds[site]
            coefficients = task.survey.options[site][kind]
            found[site] = Replacement(site, positions, kind, coefficients)
        return found


def grouped(task: Task) -> Groups:
    """The groups of a task."""
    sites = tuple(task.survey.options)
    limits = task.limits
    calls_only = limits.relus is None and limits.cost is None
    unit: Granularity = "site" if calls_only else task.granularity
    of_positions = {site: groups(site, unit) for site in sites}
    counts = tuple(int(own.max()) + 1 for own in of_positions.values())
    sizes = [
        torch.full((count,), 1.0 if calls_only else site.per_sample / count, dtype=torch.float64)
        for site, count in zip(sites, counts, strict=True)
    ]
    kinds: dict[Site, Kind] = {
        site: max(own, key=DEGREES.__getitem__) for site, own in task.survey.options.items()
    }
    row = torch.cat(sizes)
    return Groups(sites, kinds, unit, of_positions, counts, row, _share(task) * float(row.sum()))


def _share(task: Task) -> float:
    """The share of all non-linearities that the tightest of the limits leaves."""
    sites, limits = list(task.survey.options), task.limits
    shares = [1.0]
    if limits.relus is not None:
        shares.append(limits.relus / sum(site.per_sample for site in sites))
    if limits.relu_sites is not None:
        shares.append(limits.relu_sites / len(sites))
    if limits.cost is not None:
        keep = [(task.prices[site].keep, site.per_sample) for site in sites]
        shares.append(limits.cost / max(1, sum(p.fixed + p.element * count for p, count in keep)))
    return min(shares)


def damage_of(task: Task, groups_: Groups, scores: Tensor) -> Damage:
    """Scores as the damage of every replacement.

    A score is what a group is worth for each element (or call) that is kept for it. Of several
    replacements of a site, one that loses more Fisher information than the nearest one has so many
    times the damage.

    Args:
        task: The task.
        groups_: Its groups.
        scores: Not negative, ``[groups]``.

    Returns:
        For each site and replacement ``[groups]``, float64, by the task's granularity.
    """
    ratios = _ratios(task, groups_.kinds)
    found: Damage = {}
    for site, own in groups_.split(scores.detach().double().cpu() * groups_.sizes).items():
        if groups_.unit != task.granularity:
            count = int(groups(site, task.granularity).max()) + 1
            own = own.expand(count) / count
        found[site] = {kind: own * ratio for kind, ratio in ratios[site].items()}
    return found


def _ratios(task: Task, nearest: Mapping[Site, Kind]) -> dict[Site, dict[Kind, float]]:
    options = task.survey.options
    if all(len(kinds) == 1 for kinds in options.values()):
        return {site: dict.fromkeys(kinds, 1.0) for site, kinds in options.items()}
    lost = fisher(task.reference, options, "site", task.seed)
    rounding = 1e-12 * max(float(v.sum()) for own in lost.values() for v in own.values())
    return {
        site: {
            kind: (float(v.sum()) + rounding) / (float(own[nearest[site]].sum()) + rounding or 1.0)
            for kind, v in own.items()
        }
        for site, own in lost.items()
    }


def ranks(order: Sequence[Tensor], total: int) -> Tensor:
    """Scores that rise from the first groups of an order to the last; those left out are above.

    Args:
        order: Indices of groups, those that may go first in front.
        total: How many groups there are.
    """
    scores = torch.full((total,), float(len(order) + 1), dtype=torch.float64)
    for place, indices in enumerate(order):
        scores[indices] = place + 1.0
    return scores
