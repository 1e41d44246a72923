"""Polynomials fitted to what a site's function does on samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.passes.linearize.gaussian import unscaled

# Of the normal equations, relative to their diagonal: a channel that never moves stays solvable.
_RIDGE = 1e-6
_LEAST_DEVIATION = 1e-6


def fit_samples(x: Tensor, y: Tensor, degree: int, weights: Tensor | None = None) -> Tensor:
    """Least squares of a polynomial of x to y, for every channel by itself.

    Args:
        x: ``[channels, samples]``.
        y: The same.
        degree: Of the polynomial.
        weights: What each sample counts, the same or None.

    Returns:
        Coefficients by rising power, ``[degree + 1, channels]``, float64.
    """
    x, y = x.double(), y.double()
    w = torch.ones_like(x) if weights is None else weights.to(x)
    total = w.sum(1).clamp_min(1.0)
    mean = (w * x).sum(1) / total
    z = x - mean[:, None]
    deviation = ((w * z.square()).sum(1) / total).sqrt().clamp_min(_LEAST_DEVIATION)
    z /= deviation[:, None]
    sums, products = [], []  # E[z^k] and E[z^k y]
    for k in range(2 * degree + 1):
        sums.append(w.sum(1) / total)
        if k <= degree:
            products.append((w * y).sum(1) / total)
        w = w * z
    gram = _hankel(sums, degree)
    ridge = torch.diag_embed(_RIDGE * gram.diagonal(dim1=1, dim2=2).clamp_min(_RIDGE))
    solved = torch.linalg.solve(gram + ridge, torch.stack(products, 1))
    return unscaled(solved.T.contiguous(), mean, deviation)


def _hankel(sums: Sequence[Tensor], degree: int) -> Tensor:
    """The matrix of moments ``E[z^(i + j)]``: ``[channels, degree + 1, degree + 1]``."""
    rows = [torch.stack(list(sums[i : i + degree + 1]), 1) for i in range(degree + 1)]
    return torch.stack(rows, 1)


def evaluate(coefficients: Tensor, x: Tensor) -> Tensor:
    """Polynomials by Horner's rule.

    Args:
        coefficients: By rising power, ``[degree + 1, ...]``, broadcast against x.
        x: Arguments.
    """
    result = coefficients[-1].expand_as(x)
    for each in coefficients[:-1].flip(0):
        result = result * x + each
    return result
