"""Least squares without negative coefficients: the conditions of Karush, Kuhn and Tucker."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.solvers.least_squares import nonnegative_least_squares


@pytest.mark.parametrize("seed", range(40))
def test_it_is_the_minimum(seed: int) -> None:
    """Convex, so these suffice: no gradient where positive, none downhill where zero."""
    draw = np.random.default_rng(seed)
    matrix = draw.normal(size=(draw.integers(1, 12), draw.integers(1, 6)))
    if seed % 4 == 0:
        matrix[:, -1] = matrix[:, 0]  # collinear
    target = draw.normal(size=len(matrix))
    found = nonnegative_least_squares(matrix, target)
    gradient = matrix.T @ (matrix @ found - target)
    assert (found >= 0).all()
    assert (gradient >= -1e-9).all()
    assert np.abs(gradient[found > 0]).max(initial=0.0) < 1e-9


def test_an_exact_answer_is_found() -> None:
    draw = np.random.default_rng(0)
    matrix, wanted = draw.random((9, 4)), np.array([2.0, 0.0, 0.5, 1.0])
    assert nonnegative_least_squares(matrix, matrix @ wanted) == pytest.approx(wanted, abs=1e-9)


def test_too_many_columns_are_refused() -> None:
    with pytest.raises(ValueError, match="columns"):
        nonnegative_least_squares(np.ones((2, 11)), np.ones(2))
