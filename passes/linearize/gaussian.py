"""The best polynomial for a piecewise polynomial of a Gaussian variable, in closed form.

With ``z = (x - mu) / sigma``, ``f`` projects onto the probabilists' Hermite polynomials:
``p(x) = sum_k E[f(mu + sigma z) He_k(z)] / k! He_k(z)`` has the least mean squared error of its
degree (DaPa, Peng et al. 2023, AutoReP, section 3.3). For a piecewise polynomial the expectations
are truncated moments of the normal distribution, for which integration by parts gives

    I_j(a, b) = (j - 1) I_{j-2}(a, b) + a^{j-1} phi(a) - b^{j-1} phi(b),    I_0 = Phi(b) - Phi(a).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor

from graphopt.passes.linearize.activations import Piece, Pieces

MEAN, DEVIATION = sympy.Symbol("mu", real=True), sympy.Symbol("sigma", positive=True)
# Points of the quadrature for what is no piecewise polynomial.
_POINTS = 128


def closed_form(pieces: Pieces, degree: int) -> tuple[sympy.Expr, ...]:
    """Coefficients by rising power as expressions in ``mu`` and ``sigma``.

    Args:
        pieces: The function.
        degree: Of the polynomial.
    """
    z = sympy.Symbol("z", real=True)
    total = sympy.Integer(0)
    for k in range(degree + 1):
        basis = sympy.Poly(sympy.hermite_prob(k, z), z)
        factor = sum((_expected(piece, basis, z) for piece in pieces), sympy.Integer(0))
        total += factor / sympy.factorial(k) * basis.as_expr()
    x = sympy.Symbol("x", real=True)
    polynomial = sympy.Poly(sympy.expand(total.subs(z, (x - MEAN) / DEVIATION)), x)
    found = polynomial.all_coeffs()[::-1]
    return (*found, *[sympy.Integer(0)] * (degree + 1 - len(found)))


def _expected(piece: Piece, basis: sympy.Poly, z: sympy.Symbol) -> sympy.Expr:
    """``E[f(mu + sigma z) He(z)]`` over one piece."""
    x = MEAN + DEVIATION * z
    inner = sum(
        (sympy.nsimplify(c) * x**i for i, c in enumerate(piece.coefficients)), sympy.Integer(0)
    )
    product = sympy.Poly(sympy.expand(inner * basis.as_expr()), z)
    low, high = (_standardised(end) for end in (piece.low, piece.high))
    return sum((c * _moment(j, low, high) for (j,), c in product.terms()), sympy.Integer(0))


def _standardised(end: float) -> sympy.Expr:
    if math.isinf(end):
        return sympy.oo if end > 0 else -sympy.oo
    return (sympy.nsimplify(end) - MEAN) / DEVIATION


def _moment(j: int, low: sympy.Expr, high: sympy.Expr) -> sympy.Expr:
    """The truncated moment ``I_j``."""
    if j == 0:
        return _below(high) - _below(low)
    rest = (j - 1) * _moment(j - 2, low, high) if j > 1 else sympy.Integer(0)
    return rest + _edge(low, j - 1) - _edge(high, j - 1)


def _below(end: sympy.Expr) -> sympy.Expr:
    if end.is_infinite:
        return sympy.Integer(1 if end == sympy.oo else 0)
    return (1 + sympy.erf(end / sympy.sqrt(2))) / 2


def _edge(end: sympy.Expr, power: int) -> sympy.Expr:
    if end.is_infinite:
        return sympy.Integer(0)
    return end**power * sympy.exp(-(end**2) / 2) / sympy.sqrt(2 * sympy.pi)


@cache
def _compiled(pieces: Pieces, degree: int) -> Callable[..., Sequence[Any]]:
    # float64 arrays: erf comes from math, which numpy lacks
    erf = np.vectorize(math.erf, otypes=[float])
    return sympy.lambdify(
        (MEAN, DEVIATION), closed_form(pieces, degree), [{"erf": erf}, "numpy"], cse=True
    )


def fit_pieces(pieces: Pieces, mean: Tensor, deviation: Tensor, degree: int) -> Tensor:
    """The best polynomials for Gaussian inputs.

    Args:
        pieces: The function.
        mean: Means, ``[channels]``.
        deviation: Deviations, positive, ``[channels]``.
        degree: Of the polynomial.

    Returns:
        Coefficients by rising power, ``[degree + 1, channels]``, float64.
    """
    found = _compiled(pieces, degree)(mean.double().numpy(), deviation.double().numpy())
    full = [np.broadcast_to(np.asarray(c, dtype=float), mean.shape) for c in found]
    return torch.from_numpy(np.stack(full).copy())


def fit_function(
    function: Callable[[Tensor], Tensor], mean: Tensor, deviation: Tensor, degree: int
) -> Tensor:
    """The same for any function ``[points, channels] -> [points, channels]``, by quadrature."""
    z, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(_POINTS))
    weights = weights / weights.sum()
    mean, deviation = mean.double(), deviation.double()
    values = function(mean + deviation * z[:, None]).double()
    bases = [torch.ones_like(z), z]
    while len(bases) <= degree:
        k = len(bases)
        bases.append(z * bases[-1] - (k - 1) * bases[-2])
    factors = [
        (weights * basis) @ values / math.factorial(k)
        for k, basis in enumerate(bases[: degree + 1])
    ]
    powers = torch.stack([_hermite_powers(k, degree) for k in range(degree + 1)])
    return unscaled((torch.stack(factors).T @ powers).T, mean, deviation)


def _hermite_powers(k: int, degree: int) -> Tensor:
    found = np.polynomial.hermite_e.herme2poly([0] * k + [1])
    return torch.from_numpy(np.pad(found, (0, degree + 1 - len(found))))


def unscaled(coefficients: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Polynomials in ``(x - mean) / deviation`` as polynomials in x.

    Args:
        coefficients: By rising power, ``[degree + 1, channels]``.
        mean: ``[channels]``.
        deviation: ``[channels]``.
    """
    result = torch.zeros_like(coefficients)
    power = torch.zeros_like(coefficients)  # of ((x - mean) / deviation)^k, by powers of x
    power[0] = 1.0
    for each in coefficients:
        result += each * power
        shifted = torch.roll(power, 1, 0)
        shifted[0] = 0.0
        power = (shifted - mean * power) / deviation
    return result
