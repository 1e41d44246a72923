"""Which positions keep their non-linearity: named methods behind one interface."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from graphopt.passes.linearize.choice import Limits, problem
from graphopt.passes.linearize.fisher import Damage, fisher
from graphopt.passes.linearize.methods.autorep import by_autorep
from graphopt.passes.linearize.methods.bcd import by_bcd
from graphopt.passes.linearize.methods.deepreduce import by_deepreduce
from graphopt.passes.linearize.methods.snl import by_snl
from graphopt.passes.linearize.refit import Refitted, refit
from graphopt.passes.linearize.task import Method, Selected, Task, selected, solved
from graphopt.solvers import nonlinearity as solver


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


METHODS: Mapping[str, Method] = {
    "fisher": by_fisher,
    "snl": by_snl,
    "autorep": by_autorep,
    "bcd": by_bcd,
    "deepreduce": by_deepreduce,
    "random": by_random,
}


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


def _drawn(task: Task, damage: Damage, limits: Limits) -> Selected:
    """At random within limits."""
    question = problem(damage, limits, task.granularity, task.prices, task.structure)
    return selected(task, damage, solver.by_random(question, task.seed), _drawn)
