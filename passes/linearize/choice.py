"""Sites and their damage as a selection problem, and its answer as replacements."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.replacements import Kind, Replacement
from graphopt.passes.linearize.sites import Site
from graphopt.solvers import nonlinearity as solver

Granularity = Literal["element", "channel", "site"]


@dataclass(frozen=True)
class SitePrices:
    """What a site costs.

    Attributes:
        keep: Its kept elements.
        replace: Its replaced ones, by what replaces them.
    """

    keep: solver.Price
    replace: Mapping[Kind, solver.Price]


Prices = Mapping[Site, SitePrices]
_FREE = solver.Price()


@dataclass(frozen=True)
class Edge:
    """A way from one site to the next.

    Attributes:
        before: A site; None: the inputs.
        after: A site; None: the outputs.
        levels: Used up in between.
    """

    before: Site | None
    after: Site | None
    levels: int


@dataclass(frozen=True)
class Structure:
    """How sites stand to each other.

    Attributes:
        edges: The ways between them, where levels are limited.
        coupled: Sites that make the same choice.
    """

    edges: tuple[Edge, ...] = ()
    coupled: tuple[tuple[Site, ...], ...] = ()


_APART = Structure()


@dataclass(frozen=True)
class Limits:
    """What may be kept.

    Attributes:
        relus: Elements of all sites, those that have to stay included.
        relu_sites: Sites with a kept element, those that have to stay included.
        cost: What all sites may cost by their prices.
        levels: Multiplicative levels along every path, linear layers included.
    """

    relus: int | None = None
    relu_sites: int | None = None
    cost: int | None = None
    levels: int | None = None

    def without(self, fixed: Sequence[Site]) -> Limits:
        """What is left for sites that can be replaced."""
        return self.less(sum(site.per_sample for site in fixed), len(fixed))

    def less(self, elements: int, sites: int) -> Limits:
        """What is left where so much is spent otherwise."""
        return dataclasses.replace(
            self,
            relus=None if self.relus is None else self.relus - elements,
            relu_sites=None if self.relu_sites is None else self.relu_sites - sites,
        )

    def eased(self, sites: Sequence[Site], prices: Prices, share: float) -> Limits:
        """Limits on the way from everything to these: geometrically, ``share`` of it gone."""

        def between(limit: int | None, full: int) -> int | None:
            if limit is None or limit >= full:
                return limit
            return round(full * (max(limit, 1) / full) ** share)

        elements = sum(site.per_sample for site in sites)
        keep = [(prices[site].keep, site.per_sample) for site in sites if site in prices]
        return Limits(
            between(self.relus, elements),
            between(self.relu_sites, len(sites)),
            between(self.cost, sum(p.fixed + p.element * count for p, count in keep)),
            self.levels,
        )


def groups(site: Site, granularity: Granularity) -> Tensor:
    """The group of each position, int64 ``[positions]``."""
    if granularity == "element":
        return torch.arange(site.positions)
    if granularity == "channel" and site.channel is not None:
        return site.channel_of_positions()
    return torch.zeros(site.positions, dtype=torch.int64)


def problem(
    damage: Damage,
    limits: Limits,
    granularity: Granularity,
    prices: Prices,
    structure: Structure = _APART,
) -> solver.NonlinearityProblem:
    """What to keep, as plain data."""
    described = []
    for site, options in damage.items():
        own = prices.get(site, SitePrices(_FREE, {}))
        offered = tuple(
            solver.Option(kind, values.double().numpy(), own.replace.get(kind, _FREE))
            for kind, values in options.items()
        )
        count = int(groups(site, granularity).max()) + 1
        size = site.per_sample // count
        described.append(solver.Site(site.name, count, size, offered, own.keep))
    places: dict[Site | None, int | None] = {site: place for place, site in enumerate(damage)}
    places[None] = None
    return solver.NonlinearityProblem(
        tuple(described), limits.relus, limits.relu_sites, limits.cost, limits.levels,
        tuple(
            solver.Edge(places[edge.before], places[edge.after], edge.levels)
            for edge in structure.edges
        ),
        tuple(
            tuple(place for site in together if (place := places[site]) is not None)
            for together in structure.coupled
        ),
    )  # fmt: skip


def replacements(
    selection: solver.Selection,
    damage: Damage,
    coefficients: Mapping[Site, Mapping[Kind, Tensor | None]],
    granularity: Granularity,
) -> dict[Site, Replacement]:
    """A selection as what becomes of each site."""
    found = {}
    for site, option, kept in zip(damage, selection.options, selection.kept, strict=True):
        kinds = list(damage[site])
        kind = kinds[0 if option is None else option]
        own = groups(site, granularity).numpy()
        chosen = np.ones(len(own), bool) if option is None else np.isin(own, kept)
        positions = torch.from_numpy(chosen.nonzero()[0])
        found[site] = Replacement(site, positions, kind, coefficients[site][kind])
    return found
