"""What a selection comes to: its damage and everything that limits can be put on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.solvers.nonlinearity_problem import NonlinearityProblem, Price
from graphopt.solvers.nonlinearity_table import Ints, Paths


@dataclass(frozen=True)
class Figures:
    """Of one selection.

    Attributes:
        damage: of all groups replaced.
        relus: elements kept.
        relu_sites: sites with a kept element.
        cost: sum of the prices.
        depth: levels along the longest path.
    """

    damage: float
    relus: int
    relu_sites: int
    cost: int
    depth: int


def figures(
    problem: NonlinearityProblem,
    paths: Paths,
    options: Sequence[int | None],
    kept: Sequence[Ints],
) -> Figures:
    """Adds up what the sites come to."""
    damages: list[float] = []
    relus = sites = cost = 0
    levels: list[int] = []
    for site, option, groups in zip(problem.sites, options, kept, strict=True):
        elements = len(groups) * site.size
        relus, sites = relus + elements, sites + (elements > 0)
        parts = [(site.keep or Price(), elements)]
        if option is not None:
            parts.append((site.options[option].price, site.groups * site.size - elements))
            damages += np.delete(site.options[option].damage, groups).tolist()
        used = [(price, count) for price, count in parts if count]
        cost += sum(price.fixed + count * price.element for price, count in used)
        levels.append(max(price.levels for price, _ in used))
    return Figures(math.fsum(damages), relus, sites, cost, paths.depth(levels))
