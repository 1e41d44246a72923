"""Least squares with coefficients that are not negative, for a handful of columns."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

_MOST = 10  # columns: every subset of them is tried


def nonnegative_least_squares(
    matrix: NDArray[np.float64], target: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The x >= 0 with the least ||matrix @ x - target||.

    At the optimum, x solves the ordinary least squares of the columns in which it is positive
    (Lawson and Hanson, "Solving Least Squares Problems", 1974, chapter 23); with few columns all
    such subsets can be tried, which needs no tolerances and can't cycle.

    Args:
        matrix: rows of observations, at most 10 columns.
        target: one number a row.

    Raises:
        ValueError: more columns than that.
    """
    count = matrix.shape[1]
    if count > _MOST:
        raise ValueError(f"at most {_MOST} columns, not {count}")
    best, least = np.zeros(count), float(target @ target)
    for size in range(1, count + 1):
        for columns in map(list, combinations(range(count), size)):
            found = np.linalg.lstsq(matrix[:, columns], target, rcond=None)[0]
            if (found < 0).any():
                continue
            rest = matrix[:, columns] @ found - target
            if float(rest @ rest) < least * (1 - 1e-12):
                least, best = float(rest @ rest), np.zeros(count)
                best[columns] = found
    return best
