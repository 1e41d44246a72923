"""Problems of widths, small ones drawn at random, and what must hold of every allocation."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from graphopt.solvers.widths import Allocation, Cost, Dimension, Term, WidthProblem

SMALL = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@st.composite
def problems(draw: st.DrawFn, most: int = 4, widest: int = 6) -> WidthProblem:
    """A few narrow dimensions; ties, zero gains, dimensions in no cost, constants, squares."""
    count = draw(st.integers(1, most))
    dimensions = []
    for d in range(count):
        gain = st.one_of(st.integers(0, 3).map(float), st.floats(0, 10, width=32))
        gains = draw(st.lists(gain, min_size=1, max_size=widest))
        least = draw(st.integers(1, len(gains)))
        dimensions.append(
            Dimension(
                str(d),
                tuple(sorted(gains, reverse=True)),
                least=least if draw(st.booleans()) else 1,
                most=draw(st.none() | st.integers(least, len(gains) + 1)),
            )
        )
        step = draw(st.integers(1, 3))
        if dimensions[-1].most is None:
            dimensions[-1] = replace(dimensions[-1], step=step)
    coefficient = st.one_of(st.integers(0, 9).map(float), st.floats(0, 3, width=32))
    powers = st.dictionaries(st.integers(0, count - 1), st.integers(1, 2), max_size=4)
    term = st.builds(lambda c, p: Term(c, tuple(p.items())), coefficient, powers)
    costs = []
    for name in draw(st.sampled_from([("a",), ("a", "b")])):
        terms = tuple(draw(st.lists(term, min_size=1, max_size=6)))
        full = [len(dimension.gains) for dimension in dimensions]
        limit = draw(st.floats(0.02, 1)) * float(exact(terms, full))
        costs.append(Cost(name, terms, limit))
    return WidthProblem(tuple(dimensions), tuple(costs))


def exact(terms: tuple[Term, ...], widths: tuple[int, ...] | list[int]) -> Fraction:
    """A cost, from the definition."""
    total = Fraction(0)
    for term in terms:
        total += Fraction(term.coefficient) * math.prod(widths[d] ** e for d, e in term.powers)
    return total


def fits(problem: WidthProblem, widths: tuple[int, ...]) -> bool:
    return all(exact(cost.terms, widths) <= Fraction(cost.limit) for cost in problem.costs)


def value(problem: WidthProblem, widths: tuple[int, ...]) -> float:
    pairs = zip(problem.dimensions, widths, strict=True)
    return math.fsum(gain for dimension, width in pairs for gain in dimension.gains[:width])


def allowed(dimension: Dimension) -> list[int]:
    """The allowed widths, from the definition."""
    full = len(dimension.gains)
    most = full if dimension.most is None else dimension.most
    return [
        width
        for width in range(1, full + 1)
        if dimension.least <= width <= most and (width % dimension.step == 0 or width == full)
    ]


def best_value(problem: WidthProblem) -> float | None:
    """The most value within the limits, by trying everything; None if nothing fits."""
    every = product(*(allowed(dimension) for dimension in problem.dimensions))
    return max((value(problem, widths) for widths in every if fits(problem, widths)), default=None)


def assert_honest(problem: WidthProblem, found: Allocation) -> None:
    """Every figure is right, and every limit is met, exactly."""
    for width, dimension in zip(found.widths, problem.dimensions, strict=True):
        assert width in allowed(dimension)
    assert found.value == value(problem, found.widths)
    assert found.costs == tuple(float(exact(c.terms, found.widths)) for c in problem.costs)
    if found.status == "infeasible":
        assert not fits(problem, found.widths)
        assert found.gap == math.inf
        return
    assert fits(problem, found.widths)
    assert all(c <= cost.limit for c, cost in zip(found.costs, problem.costs, strict=True))
    assert found.bound >= found.value
    assert found.gap == pytest.approx((found.bound - found.value) / (found.bound or 1), abs=1e-15)
    assert (found.status == "optimal") == (found.gap <= 1e-9)


def dense(seed: int, count: int, full: int, share: float = 0.3) -> WidthProblem:
    """Every two dimensions are multiplied."""
    rng = random.Random(seed)
    dimensions = tuple(
        Dimension(str(d), tuple(sorted((rng.random() for _ in range(full)), reverse=True)))
        for d in range(count)
    )
    terms = tuple(Term(rng.random(), ((a, 1), (b, 1))) for a in range(count) for b in range(a))
    limit = share * float(exact(terms, [full] * count))
    return WidthProblem(dimensions, (Cost("flops", terms, limit),))


def line(*gains: float, limit: float, **more: int) -> WidthProblem:
    """One dimension that costs 1 a unit."""
    return WidthProblem(
        (Dimension("d", gains, **more),), (Cost("c", (Term(1.0, ((0, 1),)),), limit),)
    )
