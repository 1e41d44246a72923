"""Choices whose activations stay in range.

A polynomial that fits where activations are grows without bound beyond, and the next one squares
what it gets: ranges escape where nothing stops them (Garimella et al. 2021, Sisyphus). What a score
at the source's activations can't see shows once the choice is refitted: then the polynomials in
front of the first site whose range has grown too far are withdrawn, and the choice is made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx

from graphopt.errors import VerificationError
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.refit import Refitted, Survey
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.selection import Selected, Task
from graphopt.passes.linearize.sites import Site, read_by

# How often a choice is made anew, and of how many sites in the order of calls the first time; each
# time of so many times more, since what is behind a range that has escaped tells little.
_ATTEMPTS, _FIRST, _MORE = 4, 1, 4
_AFFINE = 1
# Growth of a site's range that no fixed-point ring takes.
_REFUSED = 1e4


@dataclass(frozen=True)
class InRange:
    """A choice and its refit.

    Attributes:
        selected: The choice.
        refitted: What it became.
        avoided: What was withdrawn for it, for people to read.
    """

    selected: Selected
    refitted: Refitted
    avoided: tuple[str, ...] = ()


def grown(survey: Survey, refitted: Refitted) -> dict[Site, float]:
    """Magnitudes that sites read, relative to those of the source."""
    return {
        site: refitted.largest[site] / (survey.largest[site] or 1.0) for site in refitted.largest
    }


def escapes(growth: Mapping[Site, float], most: float) -> list[str]:
    """What to warn of.

    Raises:
        VerificationError: A range grows beyond what any fixed-point arithmetic holds.
    """
    found = []
    for site, ratio in growth.items():
        if not ratio < _REFUSED:
            raise VerificationError(
                f"activations escape at {site.name}: {ratio:.3g} times the source's range",
                claim="outputs",
                pass_name="linearize",
                hint="keep more, take replacement=affine, or fine-tune between smaller steps",
            )
        if ratio > most:
            found.append(f"the range at {site.name} grew to {ratio:.1f} times the source's")
    return found


def in_range(
    task: Task,
    selected: Selected,
    choose: Callable[[Damage], Selected | None],
    fit: Callable[[Selected], Refitted],
    most: float,
) -> InRange:
    """A choice whose ranges grow at most so much, or the least that was found.

    Args:
        task: What the choice is about.
        selected: The choice to begin with.
        choose: Chooses by other damages; None where nothing is within the limits.
        fit: Refits a choice.
        most: Growth of a range that is fine.
    """
    best = InRange(selected, fit(selected))
    now, weights, told = best, _Weights(task), []
    for attempt in range(_ATTEMPTS):
        ratios = grown(task.survey, now.refitted)
        over = [site for site in ratios if not ratios[site] <= most]
        few = over[: _FIRST * _MORE**attempt]
        told += [
            text for site in few
            for text in weights.withdraw(site, now.refitted.replacements, ratios[site] / most)
        ]  # fmt: skip
        if not told:
            break
        found = choose(weights.on(selected.damage))
        if found is None:
            break
        now = InRange(found, fit(found), tuple(dict.fromkeys(told)))
        if _worst(task, now) < _worst(task, best):
            best = now
        if _worst(task, best) <= most:
            break
    return best


def _worst(task: Task, each: InRange) -> float:
    ratios = grown(task.survey, each.refitted).values()
    return max((ratio if ratio == ratio else math.inf for ratio in ratios), default=0.0)


class _Weights:
    """What damages of polynomials count; none where they are withdrawn."""

    def __init__(self, task: Task) -> None:
        self.offered = task.survey.options
        self.factors: dict[tuple[Site, Kind], float | None] = {}

    def withdraw(self, site: Site, chosen: Mapping[Site, Replacement], excess: float) -> list[str]:
        """Makes those polynomials dearer whose values a site reads; what it did, to be read.

        Where a site has nothing tamer to offer, its damage grows with the square of the excess.
        """
        told = []
        for blamed in _polynomials_before(site, chosen):
            kind = chosen[blamed].kind
            tamer = any(
                DEGREES[k] <= _AFFINE and self.factors.get((blamed, k), 1.0)
                for k in self.offered[blamed]
            )
            before = self.factors.get((blamed, kind), 1.0)
            if tamer:
                self.factors[blamed, kind] = None
            elif before is not None and math.isfinite(excess):
                self.factors[blamed, kind] = before * max(excess, 2.0) ** 2
            told.append(f"{kind} at {blamed.name}: the range at {site.name} grew too far")
        return told

    def on(self, damage: Damage) -> Damage:
        """Damages as they count."""
        found: Damage = {}
        for site, options in damage.items():
            weighed: dict[Kind, Tensor] = {}
            for kind, values in options.items():
                factor = self.factors.get((site, kind), 1.0)
                if factor is not None:
                    weighed[kind] = values * factor
            found[site] = weighed
        return found


def _polynomials_before(site: Site, chosen: Mapping[Site, Replacement]) -> list[Site]:
    """Sites with a polynomial from which a way leads here past no other one."""
    by_node = {each.node: each for each in chosen}
    found: list[Site] = []
    stack, seen = [read_by(site.node)], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        each = by_node.get(node)
        if each is not None and _is_polynomial(chosen[each]):
            found.append(each)
        else:
            stack += node.all_input_nodes
    return found


def _is_polynomial(replacement: Replacement) -> bool:
    return not replacement.is_whole and DEGREES[replacement.kind] > _AFFINE
