"""Which positions keep their non-linearity: named methods behind one interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from graphopt.passes.linearize.calibration import Reference
from graphopt.passes.linearize.choice import (
    Granularity,
    Limits,
    Prices,
    Structure,
    problem,
    replacements,
)
from graphopt.passes.linearize.fisher import Damage, fisher
from graphopt.passes.linearize.normalisers import Softmaxes
from graphopt.passes.linearize.refit import Refitted, Survey, refit
from graphopt.passes.linearize.replacements import Replacement
from graphopt.passes.linearize.sites import Site
from graphopt.pipeline import Progress
from graphopt.solvers import nonlinearity as solver


@dataclass(frozen=True)
class Task:
    """What a method is given.

    Attributes:
        reference: The graph in eval mode and calibration inputs.
        survey: Replacements fitted to the model itself.
        limits: Of the sites that can be replaced.
        prices: What sites cost, where that is limited.
        granularity: What is kept or replaced as one.
        rounds: In how many rounds, for methods that score anew on what is left.
        time_limit: Seconds for the solver.
        seed: Of everything random.
        progress: Told what goes on.
        softmaxes: Those that are replaced whatever is chosen.
        structure: How sites stand to each other.
    """

    reference: Reference
    survey: Survey
    limits: Limits
    prices: Prices
    granularity: Granularity
    rounds: int
    time_limit: float
    seed: int
    progress: Progress
    softmaxes: Softmaxes | None = None
    structure: Structure = field(default_factory=Structure)


@dataclass(frozen=True)
class Selected:
    """What a method found.

    Attributes:
        replacements: What becomes of each site; coefficients are fitted anew afterwards.
        answer: The solver's last answer.
        damage: By which it was chosen.
        again: Chooses as the method does at the end, by other damages or within other limits.
    """

    replacements: Mapping[Site, Replacement]
    answer: solver.Selection
    damage: Damage
    again: Chooser


Chooser = Callable[[Task, Damage, Limits], Selected]
Method = Callable[[Task], Selected]


def by_fisher(task: Task) -> Selected:
    """Least Fisher information lost; scored anew on the partly replaced network in each round.

    A score holds near the network for which it was made, so the limits come down geometrically.
    """
    damage = _scored(task, 0, None)
    for number in range(1, task.rounds):
        sites = list(task.survey.options)
        eased = task.limits.eased(sites, task.prices, number / task.rounds)
        chosen = solved(task, damage, eased)
        damage = _scored(task, number, _refitted(task, chosen))
    return solved(task, damage, task.limits)


def _refitted(task: Task, chosen: Selected) -> Refitted:
    return refit(task.reference, chosen.replacements, softmaxes=task.softmaxes)


def by_random(task: Task) -> Selected:
    """At random: what any method has to beat."""
    return _drawn(task, _scored(task, 0, None), task.limits)


METHODS: Mapping[str, Method] = {"fisher": by_fisher, "random": by_random}


def _scored(task: Task, number: int, refitted: Refitted | None) -> Damage:
    """Damage of every replacement, on the network as it is or as far as it is replaced."""
    task.progress(f"scoring non-linearities (round {number + 1} of {task.rounds})")
    options = {site: dict(kinds) for site, kinds in task.survey.options.items()}
    reference, present = task.reference, None
    if refitted is not None:
        present = refitted.replacements
        statistics = {**reference.statistics, **refitted.here}
        reference = dataclasses.replace(
            reference, statistics=statistics, stand_ins=refitted.stand_ins()
        )
        for site, each in present.items():
            if not each.is_whole:
                options[site][each.kind] = each.coefficients
    return fisher(reference, options, task.granularity, task.seed + number, present)


def solved(task: Task, damage: Damage, limits: Limits) -> Selected:
    """The least damage within limits."""
    task.progress("choosing non-linearities")
    question = problem(damage, limits, task.granularity, task.prices, task.structure)
    answer = solver.select(question, time_limit=task.time_limit, seed=task.seed)
    return _selected(task, damage, answer)


def _drawn(task: Task, damage: Damage, limits: Limits) -> Selected:
    """At random within limits."""
    question = problem(damage, limits, task.granularity, task.prices, task.structure)
    return _selected(task, damage, solver.by_random(question, task.seed), _drawn)


def _selected(
    task: Task, damage: Damage, answer: solver.Selection, again: Chooser = solved
) -> Selected:
    options = task.survey.options
    found = replacements(answer, damage, options, task.granularity)
    return Selected(found, answer, damage, again)
