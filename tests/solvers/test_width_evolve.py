"""Widths improved by measuring: within the limits, never worse, as many measurements as allowed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solvers.width_evolve import evolve
from graphopt.solvers.width_problem import Cost, Dimension, Term, WidthError, WidthProblem
from graphopt.solvers.widths import by_rule


def problem(sizes: Sequence[int], share: float) -> WidthProblem:
    """A chain of layers: neighbours multiply."""
    pairs = [((i, 1), (i + 1, 1)) for i in range(len(sizes) - 1)]
    terms = (*(Term(1.0, pair) for pair in pairs), Term(3.0, ((0, 1),)))
    full = sum(sizes[i] * sizes[i + 1] for i in range(len(sizes) - 1)) + 3 * sizes[0]
    dimensions = tuple(Dimension(str(i), (1.0,) * n) for i, n in enumerate(sizes))
    return WidthProblem(dimensions, (Cost("flops", terms, share * full),))


def cost(widths: Sequence[int]) -> float:
    return sum(a * b for a, b in itertools.pairwise(widths)) + 3 * widths[0]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(2, 40), min_size=2, max_size=5),
    st.floats(0.3, 0.9),
    st.integers(1, 20),
    st.integers(0, 30),
    st.integers(0, 5),
)
def test_it_is_never_worse_and_keeps_to_what_was_asked(
    sizes: list[int], share: float, samples: int, evaluations: int, seed: int
) -> None:
    asked = problem(sizes, share)
    start = by_rule(asked, "uniform")
    if start.status == "infeasible":
        return
    measured = 0

    def measure(widths: Sequence[int], some: Sequence[int]) -> float:
        nonlocal measured
        measured += len(some)
        assert cost(widths) <= asked.costs[0].limit
        assert all(1 <= w <= n for w, n in zip(widths, sizes, strict=True))
        assert len(set(some)) == len(some) >= 1
        return sum((w - (i + s) % 7) ** 2 for s in some for i, w in enumerate(widths)) / len(some)

    found = evolve(
        asked, start.widths, measure, samples, evaluations=max(1, evaluations), seed=seed
    )
    assert measured <= samples * max(1, evaluations)
    assert measured == pytest.approx(samples * found.evaluations)
    assert found.incumbents[0] == start.widths
    assert list(found.values) == sorted(set(found.values), reverse=True)
    every = [measure(widths, range(samples)) for widths in found.incumbents]
    assert every == pytest.approx(list(found.values))
    again = evolve(asked, start.widths, measure, samples, evaluations=evaluations, seed=seed)
    assert again.incumbents == found.incumbents


def test_it_finds_the_best_widths_of_a_small_problem() -> None:
    asked = problem((6, 6, 6), 0.5)
    best = min(
        (-(3 * a + b + 2 * c), (a, b, c))
        for a in range(1, 7) for b in range(1, 7) for c in range(1, 7)
        if cost((a, b, c)) <= asked.costs[0].limit
    )  # fmt: skip
    found = evolve(
        asked, by_rule(asked, "uniform").widths, lambda w, _: -(3 * w[0] + w[1] + 2 * w[2]), 1,
        evaluations=60,
    )  # fmt: skip
    assert found.values[-1] == best[0]


def test_a_start_beyond_the_limits_is_refused() -> None:
    with pytest.raises(WidthError, match="limits"):
        evolve(problem((8, 8), 0.5), (8, 8), lambda *_: 0.0, 4, evaluations=3)
    with pytest.raises(WidthError, match="samples"):
        evolve(problem((8, 8), 0.5), (2, 2), lambda *_: 0.0, 0, evaluations=3)
