"""Criteria: what a unit is worth.

A criterion is one entry of `CRITERIA`: a name, a function that gives every unit a score, and what
may be done with the scores.  The functions stand by what they look at: weights (`magnitude`),
gradients of parameters (`gradients`), what units add to what reads them (`contributions`), what
passes through them of an explanation (`relevance`), or whatever a function of the user's does
(`custom`).
"""

from __future__ import annotations

import math
from typing import Literal

from graphopt.errors import NonFiniteError
from graphopt.passes.prune.criteria.base import Calibration, Criterion, Scores
from graphopt.passes.prune.criteria.contributions import fisher, heapr
from graphopt.passes.prune.criteria.custom import DimensionView, Part, UserFunction, custom
from graphopt.passes.prune.criteria.gradients import hesso, taylor, taylor2
from graphopt.passes.prune.criteria.magnitude import bn_scale, drawn, l2
from graphopt.passes.prune.criteria.relevance import relevance
from graphopt.passes.prune.dimensions import Dimensions

Name = Literal[
    "auto", "l2", "bn_scale", "taylor", "taylor2", "fisher", "heapr", "hesso", "distortion",
    "random", "relevance",
]  # fmt: skip

CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion("l2", l2),
        Criterion("bn_scale", bn_scale),
        Criterion("random", drawn),
        Criterion("taylor", taylor, needs="gradients", adds_up=True),
        Criterion("taylor2", taylor2, needs="gradients", adds_up=True),
        Criterion("fisher", fisher, needs="activations", adds_up=True),
        Criterion("heapr", heapr, needs="activations", adds_up=True),
        Criterion("hesso", hesso, needs="gradients"),
        Criterion("relevance", relevance, needs="activations", adds_up=True),
        Criterion("distortion", l2, adds_up=True, measured=True),
    )
}
"""All criteria with a name."""


def criterion_of(asked: str | UserFunction) -> Criterion:
    """The criterion of a name, or the one that is a user's function."""
    return CRITERIA[asked] if isinstance(asked, str) else custom(asked)


def score(criterion: Criterion, dimensions: Dimensions, calibration: Calibration) -> Scores:
    """What each unit is worth: not negative, larger is more.

    Args:
        criterion: An entry of `CRITERIA`, or what `criterion_of` made of a function.
        dimensions: The dimensions.
        calibration: What it may look at.

    Raises:
        NonFiniteError: A score is NaN or infinite.
        UnsupportedError: A negative score, or nothing that a gradient could be had of.
    """
    found = criterion.measure(dimensions, calibration)
    for dim in dimensions.all:
        wrong = next((s for u in dim.units if not math.isfinite(s := found.get(u, 0.0))), None)
        if wrong is not None:
            raise NonFiniteError(
                f"the criterion {criterion.name} gives {wrong} for a unit of {dim.name}",
                hint="are the weights, the loss and its gradients finite on the calibration data?",
            )
    return {unit: found.get(unit, 0.0) for dim in dimensions.all for unit in dim.units}


__all__ = [
    "CRITERIA",
    "Calibration",
    "Criterion",
    "DimensionView",
    "Name",
    "Part",
    "Scores",
    "UserFunction",
    "criterion_of",
    "score",
]
