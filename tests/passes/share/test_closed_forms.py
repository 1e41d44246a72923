"""Closed forms, derived by sympy: the best levels for a normal input, the published objective."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import sympy as sp

from graphopt.passes.share.fit import REGELU2, RESILU2, Steps, fit_steps
from tests.passes.share.test_steps import normal, slopes

t = sp.symbols("t", real=True)
DENSITY = sp.exp(-(t**2) / 2) / sp.sqrt(2 * sp.pi)
NORMAL = (1 + sp.erf(t / sp.sqrt(2))) / 2
GELU, SILU = t * NORMAL, t / (1 + sp.exp(-t))


def mass_of_gelu() -> Any:
    """An antiderivative of GELU's derivative times the normal density."""
    found = (NORMAL**2 - DENSITY**2) / 2
    assert sp.simplify(sp.diff(found, t) - sp.diff(GELU, t) * DENSITY) == 0
    return found


def test_fitted_levels_are_conditional_means_of_the_closed_form() -> None:
    """Level of a segment: the mean of GELU' over it under N(0, 1); thresholds: between levels."""
    x = normal()
    steps = fit_steps(x, slopes("gelu", x))
    mass = sp.lambdify(t, mass_of_gelu(), ["scipy", "numpy"])
    share = sp.lambdify(t, NORMAL, ["scipy", "numpy"])
    ends = [-40.0, *steps.thresholds, 40.0]
    for (low, high), level in zip(pairwise(ends), steps.levels, strict=True):
        mean = (mass(high) - mass(low)) / (share(high) - share(low))
        assert level == pytest.approx(float(mean), abs=2e-3)
    slope = sp.lambdify(t, sp.diff(GELU, t), ["scipy", "numpy"])
    for place, (below, above) in zip(steps.thresholds, pairwise(steps.levels), strict=True):
        assert float(slope(place)) == pytest.approx((below + above) / 2, abs=0.02)


@pytest.mark.parametrize(
    ("exact", "published", "objective"),
    [(GELU, REGELU2, 0.0095093), (SILU, RESILU2, 0.0399438)],
)
def test_published_constants_have_their_objective(
    exact: Any, published: Steps, objective: float
) -> None:
    """The squared distance of the primitive from the activation, which they minimise."""
    x = np.linspace(-40, 40, 800_001)
    jumps = np.diff(published.levels)
    pieces = zip(jumps, published.thresholds, strict=True)
    primitive = sum(jump * np.maximum(x - place, 0) for jump, place in pieces)
    values = sp.lambdify(t, exact, ["scipy", "numpy"])(x)
    assert float(np.trapezoid((values - primitive) ** 2, x)) == pytest.approx(objective, rel=2e-4)
