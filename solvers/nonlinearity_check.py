"""The independent checker: what a selection comes to, straight from the definition.

It shares no code with the solver on purpose; keep it that way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.solvers.nonlinearity_problem import NonlinearityProblem, Selection, Site


@dataclass(frozen=True)
class NonlinearityCheck:
    """What a selection does.

    Attributes:
        objective: damage of the groups replaced.
        relus: elements kept.
        relu_sites: sites with a kept element.
        cost: sum of the prices.
        depth: levels along the longest path.
        errors: what is wrong with the selection; empty if it is within all limits.
    """

    objective: float
    relus: int
    relu_sites: int
    cost: int
    depth: int
    errors: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the selection is within all limits, and its figures are right."""
        return not self.errors


def check(problem: NonlinearityProblem, selection: Selection) -> NonlinearityCheck:
    """Figures and validity of a selection.

    Args:
        problem: what was asked.
        selection: what came back; its own figures are compared too.
    """
    errors: list[str] = []
    lost: list[float] = []
    levels: dict[int, int] = {}
    relus = relu_sites = cost = 0
    for s, (site, chosen) in enumerate(zip(problem.sites, selection.options, strict=True)):
        keeps, wrong = _keeps(site, selection.kept[s])
        errors += wrong
        if not keeps.all() and (chosen is None or not 0 <= chosen < len(site.options)):
            errors.append(f"{site.name}: groups are replaced by nothing")
            chosen = None
        option = site.options[chosen] if chosen is not None else None
        elements = int(keeps.sum()) * site.size
        relus, relu_sites = relus + elements, relu_sites + bool(elements)
        levels[s] = 0
        if elements and site.keep:
            cost += site.keep.fixed + site.keep.element * elements
            levels[s] = site.keep.levels
        if option and keeps.all():
            errors.append(f"{site.name}: an option that replaces nothing")
        elif option:
            lost.extend(option.damage[~keeps].tolist())
            replaced = int((~keeps).sum()) * site.size
            cost += option.price.fixed + option.price.element * replaced
            levels[s] = max(levels[s], option.price.levels)
    found = NonlinearityCheck(math.fsum(lost), relus, relu_sites, cost, _depth(problem, levels))
    errors += _coupling(problem, selection) + _excess(problem, found)
    for name in ("objective", "relus", "relu_sites", "cost", "depth"):
        if getattr(found, name) != getattr(selection, name):
            errors.append(
                f"{name} is {getattr(found, name)}, not {getattr(selection, name)} as stated"
            )
    if not selection.bound <= found.objective:
        errors.append(f"the bound {selection.bound} is above the damage {found.objective}")
    return NonlinearityCheck(
        found.objective, relus, relu_sites, cost, found.depth, errors=tuple(errors)
    )


def _keeps(site: Site, groups: NDArray[np.int64]) -> tuple[NDArray[np.bool_], list[str]]:
    """Which groups are kept, as a mask; and what is wrong with them."""
    errors = []
    known = groups[(groups >= 0) & (groups < site.groups)]
    keeps = np.zeros(site.groups, bool)
    keeps[known] = True
    if len(known) < len(groups) or (np.diff(groups) <= 0).any():
        errors.append(f"{site.name}: kept groups don't exist, repeat or don't rise")
    if keeps.any() and site.keep is None:
        errors.append(f"{site.name}: nothing can be kept there")
    return keeps, errors


def _excess(problem: NonlinearityProblem, found: NonlinearityCheck) -> list[str]:
    limits = (
        ("relus", found.relus, problem.relus),
        ("relu_sites", found.relu_sites, problem.relu_sites),
        ("cost", found.cost, problem.cost),
        ("max_depth", found.depth, problem.max_depth),
        ("damage", found.objective, math.nextafter(math.inf, 0)),
    )
    return [
        f"{name}: {used} exceeds {limit}"
        for name, used, limit in limits
        if limit is not None and used > limit
    ]


def _coupling(problem: NonlinearityProblem, selection: Selection) -> list[str]:
    errors = []
    for together in problem.coupled:
        first = together[0]
        for other in together[1:]:
            names = []
            for site in (first, other):
                chosen = selection.options[site]
                names.append(None if chosen is None else problem.sites[site].options[chosen].name)
            same = np.array_equal(selection.kept[first], selection.kept[other])
            if names[0] != names[1] or not same:
                pair = f"{problem.sites[first].name} and {problem.sites[other].name}"
                errors.append(f"{pair} are coupled but differ")
    return errors


def _depth(problem: NonlinearityProblem, levels: dict[int, int]) -> int:
    """By relaxation of all edges, as often as there are sites."""
    start = dict.fromkeys(levels, 0)
    for _ in range(len(levels) + 1):
        for edge in problem.edges:
            if edge.after is not None:
                before = 0 if edge.before is None else start[edge.before] + levels[edge.before]
                start[edge.after] = max(start[edge.after], before + edge.levels)
    ends = [start[site] + own for site, own in levels.items()]
    for edge in problem.edges:
        if edge.after is None:
            before = 0 if edge.before is None else start[edge.before] + levels[edge.before]
            ends.append(before + edge.levels)
    return max(ends, default=0)
