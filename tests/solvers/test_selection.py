"""Selections against exhaustive search, and what must hold for every answer."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solvers.selection import Quadratic, Selection, SelectionError, select

SMALL = settings(max_examples=80, deadline=None, derandomize=True)


def drawn(seed: int, things: int, rows: int, groups: int) -> Quadratic:
    """A problem with groups of nearly one size, of each of which some are taken."""
    random = np.random.default_rng(seed)
    group = np.sort(np.arange(things) % groups)
    sizes = np.bincount(group, minlength=groups)
    return Quadratic(
        linear=random.normal(size=things) * random.uniform(0, 2),
        factors=random.normal(size=(rows, things)) * random.uniform(size=things),
        offset=random.normal(size=rows),
        groups=group,
        counts=random.integers(0, sizes + 1),
    )


def by_definition(problem: Quadratic, taken: np.ndarray) -> float:
    total = problem.offset.copy()
    for i in np.flatnonzero(taken):
        total = total + problem.factors[:, i]
    return float(problem.linear[taken].sum() + (total**2).sum() / 2)


def brute(problem: Quadratic) -> float:
    found = []
    for bits in product([False, True], repeat=len(problem.linear)):
        taken = np.array(bits, bool)
        counts = np.bincount(problem.groups[taken], minlength=len(problem.counts))
        if (counts == problem.counts).all():
            found.append(by_definition(problem, taken))
    return min(found)


def check(problem: Quadratic, found: Selection) -> None:
    counts = np.bincount(problem.groups[found.taken], minlength=len(problem.counts))
    assert (counts == problem.counts).all()
    scale = abs(found.cost) + abs(found.bound) + 1
    assert found.cost == pytest.approx(by_definition(problem, found.taken), abs=1e-6 * scale)
    assert found.bound <= found.cost <= found.start


@SMALL
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 5), st.integers(1, 4))
def test_small_ones_are_solved(seed: int, things: int, rows: int, groups: int) -> None:
    problem = drawn(seed, things, rows, min(groups, things))
    found = select(problem)
    check(problem, found)
    assert found.status == "optimal"
    assert found.cost == pytest.approx(brute(problem), abs=1e-9)


@settings(SMALL, max_examples=20)
@given(st.integers(0, 10**6), st.sampled_from([1, 3, 5]))
def test_middling_ones_lie_between_bound_and_start(seed: int, groups: int) -> None:
    """Too many for one exhaustive block: the bound stays below the true optimum."""
    problem = drawn(seed, 13, 4, groups)
    found, best = select(problem, time_limit=5), brute(problem)
    check(problem, found)
    assert found.bound <= best + 1e-9
    assert found.cost >= best - 1e-9


@pytest.mark.parametrize("groups", [1, 1000])
def test_many_things(groups: int) -> None:
    problem = drawn(0, 4000, 30, groups)
    costs: list[float] = []
    found = select(problem, progress=costs.append, time_limit=60)
    check(problem, found)
    assert found.cost < found.start
    assert costs == sorted(costs, reverse=True)
    assert found.gap < 0.02 * abs(found.bound)


def test_it_starts_where_it_is_told_to() -> None:
    problem = drawn(0, 200, 5, 1)
    worst = problem.cheapest(-problem.linear)
    found = select(problem, worst, time_limit=5)
    assert found.start == pytest.approx(by_definition(problem, worst))
    check(problem, found)
    with pytest.raises(SelectionError):
        select(problem, np.ones(200, bool))


def test_without_a_quadratic_part_the_cheapest_are_taken() -> None:
    problem = drawn(1, 300, 2, 4)
    problem = Quadratic(
        problem.linear, np.zeros((2, 300)), problem.offset, problem.groups, problem.counts
    )
    found = select(problem, problem.cheapest(-problem.linear))
    wanted = sum(
        np.sort(problem.linear[problem.groups == g])[:n].sum() for g, n in enumerate(problem.counts)
    )
    assert found.cost == pytest.approx(wanted + (problem.offset**2).sum() / 2)
    assert found.status == "optimal"


@pytest.mark.parametrize("change", ["nan", "sizes", "count", "group"])
def test_what_makes_no_sense(change: str) -> None:
    parts = {
        "linear": np.zeros(3),
        "factors": np.zeros((1, 3)),
        "offset": np.zeros(1),
        "groups": np.zeros(3, np.intp),
        "counts": np.array([1]),
    }
    broken = {
        "nan": {"linear": np.array([0, np.nan, 0])},
        "sizes": {"offset": np.zeros(2)},
        "count": {"counts": np.array([4])},
        "group": {"groups": np.array([0, 1, 0])},
    }
    with pytest.raises(SelectionError):
        Quadratic(**{**parts, **broken[change]})
