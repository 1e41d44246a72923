"""Choices whose activations stay in range.

What stands in for a bounded function isn't bounded: the identity hands on what saturation held,
and a polynomial that fits where activations are grows beyond, and the next one squares what it
gets (Garimella et al. 2021, Sisyphus). What a score at the source's activations can't see shows
once the choice is refitted: then the replacements in front of the first site whose range has grown
too far are withdrawn, and the choice is made anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from graphopt.errors import VerificationError
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.refit import Refitted, Survey
from graphopt.passes.linearize.replacements import Kind, Replacement
from graphopt.passes.linearize.sites import Site, read_by
from graphopt.passes.linearize.task import Selected, Task

# How often a choice is made anew, and of how many sites in the order of calls the first time; each
# time of so many times more, since what is behind a range that has escaped tells little.
_ATTEMPTS, _FIRST, _MORE = 4, 1, 4
# Growth of a site's range that no fixed-point ring takes.
_REFUSED = 1e4
# So much more than at calibration a range may grow on larger inputs.
_LEEWAY = 4.0
_DEAREST = 1e3  # a factor for each attempt, squared


@dataclass(frozen=True)
class InRange:
    """A choice and its refit.

    Attributes:
        selected: The choice; None where there was none to make.
        refitted: What it became.
        avoided: What was withdrawn for it, for people to read.
    """

    selected: Selected | None
    refitted: Refitted
    avoided: tuple[str, ...] = ()


def grown(survey: Survey, refitted: Refitted) -> dict[Site, float]:
    """Magnitudes that sites read, relative to those of the source."""
    return {site: now / (survey.largest[site] or 1.0) for site, now in refitted.largest.items()}


def _strained(survey: Survey, refitted: Refitted) -> dict[Site, float]:
    """The same, or what is worse: a part of the growth on larger inputs, where some is natural."""
    return {
        site: max(ratio, refitted.beyond.get(site, 0.0) / _LEEWAY)
        for site, ratio in grown(survey, refitted).items()
    }


def escapes(survey: Survey, refitted: Refitted, most: float) -> list[str]:
    """What to warn of.

    Args:
        survey: Of the source.
        refitted: What became of it.
        most: Growth of a range that is fine.

    Raises:
        VerificationError: A range grows beyond what any fixed-point arithmetic holds.
    """
    found = []
    for site, ratio in grown(survey, refitted).items():
        beyond = refitted.beyond.get(site, 0.0)
        if not ratio < _REFUSED:
            raise VerificationError(
                f"activations escape at {site.name}: {ratio:.3g} times the source's range",
                claim="outputs",
                pass_name="linearize",
                hint="keep more, take replacement=affine, or fine-tune between smaller steps",
            )
        if ratio > most:
            found.append(f"the range at {site.name} grew to {ratio:.1f} times the source's")
        elif beyond > _LEEWAY * most:
            found.append(
                f"the range at {site.name} grows to {beyond:.3g} times the source's on inputs a "
                "quarter larger than the calibration data"
            )
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
    now, weights = best, _Weights(task)
    told: list[str] = []
    for attempt in range(_ATTEMPTS):
        ratios = _strained(task.survey, now.refitted)
        over = [site for site in ratios if not ratios[site] <= most]
        few = over[: _FIRST * _MORE**attempt]
        withdrawn = [
            text for site in few
            for text in weights.withdraw(site, now.refitted.replacements, ratios[site] / most)
        ]  # fmt: skip
        if not withdrawn:
            break
        told += withdrawn
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
    ratios = _strained(task.survey, each.refitted).values()
    return max((ratio if ratio == ratio else math.inf for ratio in ratios), default=0.0)


class _Weights:
    """What damages of replacements count; None where they are withdrawn."""

    def __init__(self, task: Task) -> None:
        self.offered = task.survey.options
        self.factors: dict[tuple[Site, Kind], float | None] = {}

    def withdraw(self, site: Site, chosen: Mapping[Site, Replacement], excess: float) -> list[str]:
        """Withdraws the replacements whose values a site reads; what it did, to be read.

        Where there is nothing else, the damage grows with the square of the excess, so that more
        is kept there.
        """
        told = []
        for blamed in _replaced_before(site, chosen):
            kind = chosen[blamed].kind
            others = [
                other for other in self.offered[blamed]
                if other != kind and self.factors.get((blamed, other), 1.0) is not None
            ]  # fmt: skip
            before = self.factors.get((blamed, kind), 1.0)
            if others:
                self.factors[blamed, kind] = None
            elif before is not None:
                self.factors[blamed, kind] = before * min(max(excess, 2.0), _DEAREST) ** 2
            told.append(f"{kind} at {blamed.name}: the range at {site.name} grew too far")
        return told

    def on(self, damage: Damage) -> Damage:
        """Damages as they count."""
        factors = {key: self.factors.get(key, 1.0) for key in _keys(damage)}
        return {
            site: {k: v * f for k, v in kinds.items() if (f := factors[site, k]) is not None}
            for site, kinds in damage.items()
        }


def _keys(damage: Damage) -> list[tuple[Site, Kind]]:
    return [(site, kind) for site, kinds in damage.items() for kind in kinds]


def _replaced_before(site: Site, chosen: Mapping[Site, Replacement]) -> list[Site]:
    """Replaced sites from which a way leads here past no other one."""
    by_node = {each.node: each for each in chosen if not chosen[each].is_whole}
    found: list[Site] = []
    stack, seen = [read_by(site.node)], set[fx.Node]()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        each = by_node.get(node)
        if each is not None:
            found.append(each)
        else:
            stack += node.all_input_nodes
    return found
