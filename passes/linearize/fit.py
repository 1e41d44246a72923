"""Polynomials fitted to what a site's function does on samples."""

from __future__ import annotations

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
    w = torch.ones_like(x) if weights is None else weights.double().expand_as(x)
    total = w.sum(1).clamp_min(1.0)
    mean = (w * x).sum(1) / total
    centred = x - mean[:, None]
    deviation = ((w * centred.square()).sum(1) / total).sqrt().clamp_min(_LEAST_DEVIATION)
    z = centred / deviation[:, None]
    powers = torch.stack([z**k for k in range(degree + 1)], 1)  # [channels, degree + 1, samples]
    weighted = powers * w[:, None]
    gram = weighted @ powers.transpose(1, 2) / total[:, None, None]
    right = (weighted @ y[:, :, None]).squeeze(-1) / total[:, None]
    diagonal = gram.diagonal(dim1=1, dim2=2)
    ridge = torch.diag_embed(_RIDGE * diagonal.clamp_min(_RIDGE))
    solved = torch.linalg.solve(gram + ridge, right)
    return unscaled(solved.T.contiguous(), mean, deviation)


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
