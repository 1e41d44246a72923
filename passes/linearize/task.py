"""What a method of selection is given and gives back."""

from __future__ import annotations

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
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.normalisers import Softmaxes
from graphopt.passes.linearize.refit import Survey
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
        steps: Steps of methods that train, at most.
        trials: Blocks that are tried for each that is removed.
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
    steps: int = 600
    trials: int = 8
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
        advice: What would help if the network were designed anew.
    """

    replacements: Mapping[Site, Replacement]
    answer: solver.Selection
    damage: Damage
    again: Chooser
    advice: tuple[str, ...] = ()


Chooser = Callable[[Task, Damage, Limits], Selected]
Method = Callable[[Task], Selected]


def solved(task: Task, damage: Damage, limits: Limits) -> Selected:
    """The least damage within limits."""
    task.progress("choosing non-linearities")
    question = problem(damage, limits, task.granularity, task.prices, task.structure)
    answer = solver.select(question, time_limit=task.time_limit, seed=task.seed)
    return selected(task, damage, answer)


def selected(
    task: Task, damage: Damage, answer: solver.Selection, again: Chooser = solved
) -> Selected:
    """A solver's answer as what becomes of each site."""
    options = task.survey.options
    found = replacements(answer, damage, options, task.granularity)
    return Selected(found, answer, damage, again)
