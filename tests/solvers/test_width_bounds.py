"""The bounds that prove an allocation of widths, each alone, against trying everything."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solvers.width_bound import Relaxation
from graphopt.solvers.width_branch import Branching
from graphopt.solvers.width_cpsat import prove
from graphopt.solvers.width_geometric import LogRelaxation
from graphopt.solvers.width_table import WidthTable
from graphopt.solvers.widths import Cost, Dimension, Term, WidthProblem
from tests.solvers.width_problems import SMALL, best_value, dense, problems


@given(problems(), st.integers(0, 2**31))
@SMALL
def test_each_bound_alone_is_valid(problem: WidthProblem, seed: int) -> None:
    """In any box, at any prices: Lagrangian with full and with coarse grids, logarithms, CP-SAT."""
    best, table = best_value(problem), WidthTable(problem)
    zero = np.zeros_like(table.last)
    if best is None or table.fits(table.last):
        return
    rng = random.Random(seed)
    low, high = zero, table.last
    relaxation = Relaxation(table)
    for points in (33, 2):
        relaxation.points = [points] * len(zero)
        for _ in range(4):
            prices = np.array([rng.choice([0.0, rng.random(), 3.0]) for _ in table.shares])
            near = np.array([rng.randint(0, last) for last in table.last.tolist()])
            total, _ = relaxation.evaluate(low, high, near, prices)
            assert total * table.total >= best - 1e-9 * table.total
    logs = LogRelaxation(table, low, high)
    logs.solve(zero, 10, lambda bound: False)
    assert logs.bound * table.total >= best - 1e-9 * table.total
    proven = prove(table, zero, 1.0, time_limit=60, steps=10, seed=0, found=lambda _: None)
    if table.worth(zero) * table.total < best - 1e-6:
        assert proven * table.total == pytest.approx(best, rel=1e-9, abs=1e-9 * table.total)


def choices(table: WidthTable) -> list[np.ndarray]:
    return [np.array(c) for c in product(*(range(last + 1) for last in table.last.tolist()))]


def assert_relaxed(table: WidthTable, relaxation: Relaxation, prices: np.ndarray) -> None:
    """The elimination is never below the best of the priced problem, by trying everything."""
    low = np.zeros_like(table.last)
    total, _ = relaxation.evaluate(low, table.last, low, prices)
    best = max(table.worth(c) + float(prices @ (1 - table.used(c))) for c in choices(table))
    assert total >= best - 1e-9 * (1 + prices.sum())
    if relaxation.points == [33] * len(low) and not any(s.dropped for s in relaxation.steps):
        assert total <= best + 1e-9 * (1 + prices.sum())


@given(problems(widest=7), st.floats(0.001, 3), st.floats(0.001, 3))
@settings(SMALL, max_examples=80)
def test_elimination_is_exact_on_full_grids_and_above_on_coarse_ones(
    problem: WidthProblem, first: float, second: float
) -> None:
    table = WidthTable(problem)
    if not table.fits(np.zeros_like(table.last)):
        return
    prices = np.array([first, second])[: len(table.shares)]
    relaxation = Relaxation(table)
    for points in (33, 3, 2):
        relaxation.points = [points] * len(table.last)
        assert_relaxed(table, relaxation, prices)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.solvers.width_bound._WIDEST", 1)
        assert_relaxed(table, Relaxation(table), prices)


def test_elimination_with_a_width_in_two_powers() -> None:
    """Where interpolation would be too low: the message is concave in part of its range."""
    hub = Dimension("hub", (1.0,) * 12)
    inner = Dimension("inner", tuple(float(12 - i) for i in range(12)))
    terms = (Term(1.0, ((1, 2), (0, 1))), Term(0.1, ((1, 1), (0, 1))))
    table = WidthTable(WidthProblem((inner, hub), (Cost("c", terms, 300.0),)))
    relaxation = Relaxation(table)
    assert relaxation.steps[0].scope == (1,)
    assert relaxation.power[1] == 0
    for points in (2, 3, 4):
        relaxation.points = [points] * 2
        for price in np.geomspace(0.001, 3, 40).tolist():
            assert_relaxed(table, relaxation, np.array([price]))


@pytest.mark.parametrize("seed", range(6))
def test_dropped_couplings_keep_the_elimination_above(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = WidthTable(dense(seed, 5, 4))
    monkeypatch.setattr("graphopt.solvers.width_bound._WIDEST", 2)
    relaxation = Relaxation(table)
    assert any(step.dropped for step in relaxation.steps)
    for price in np.geomspace(0.01, 3, 12).tolist():
        assert_relaxed(table, relaxation, np.array([price]))


def test_messages_of_dropped_dimensions_keep_the_elimination_above(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """0 tells 1 what 2 costs it; 1 has heavier couplings, and drops 2."""
    gains = [(1.0, 0.0, 0.0) if d == 2 else (1.0, 1.0, 1.0) for d in range(6)]
    dimensions = tuple(Dimension(str(d), gain) for d, gain in enumerate(gains))
    strong = ((0, 1), (0, 2), (1, 3), (1, 4), (1, 5), (3, 4), (3, 5), (4, 5))
    weak = ((2, 3), (2, 4), (2, 5))
    terms = tuple(
        Term(1.0 if pair in strong else 1e-6, ((pair[0], 1), (pair[1], 1)))
        for pair in (*strong, *weak)
    )
    table = WidthTable(WidthProblem(dimensions, (Cost("c", terms, 20.0),)))
    monkeypatch.setattr("graphopt.solvers.width_bound._WIDEST", 2)
    relaxation = Relaxation(table)
    dropping = [step for step in relaxation.steps if step.dropped]
    assert any(
        set(relaxation.steps[i].scope) & step.dropped for step in dropping for i in step.inputs
    )
    for price in np.geomspace(0.01, 3, 12).tolist():
        assert_relaxed(table, relaxation, np.array([price]))


@pytest.mark.parametrize("seed", range(8))
def test_planes_and_narrowing_cut_off_no_allocation(seed: int) -> None:
    table = WidthTable(dense(seed, 3, 9, 0.06 + 0.04 * seed))
    fitting = [choice for choice in choices(table) if table.fits(choice)]
    low = np.zeros_like(table.last)
    logs = LogRelaxation(table, low, table.last)
    touched = sorted(fitting, key=lambda choice: float(table.used(choice)[0]))[-20:]
    for choice in touched:
        logs._add_planes(table.log[table.rows, choice])
    branching = Branching(table, table.worth, lambda: False, 1e-9)
    for worth in (0.0, 0.3, 0.6, table.worth(touched[-1])):
        branching.worth = worth
        narrowed = branching._narrow(low, table.last)
        for choice in fitting:
            if table.worth(choice) > worth + 1e-9:
                assert narrowed is not None
                assert (narrowed[0] <= choice).all()
                assert (choice <= narrowed[1]).all()
    for choice in fitting:
        at = table.log[table.rows, choice]
        assert all(slope @ at <= most + 1e-9 for _, slope, most in logs._planes)


@pytest.mark.parametrize("in_logs", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_branching_ends_at_the_best(seed: int, in_logs: bool) -> None:
    """Without greedy rules, polish and CP-SAT, from the least widths."""
    problem = dense(seed, 4, 7, 0.4)
    table, best = WidthTable(problem), [0.0]

    def offer(choice: np.ndarray) -> float:
        if table.fits(choice):
            best[0] = max(best[0], table.worth(choice))
        return best[0]

    branching = Branching(table, offer, lambda: False, 1e-9)
    branching.in_logs = in_logs
    branching.start(np.zeros_like(table.last))
    while branching.step():
        pass
    expected = best_value(problem)
    assert best[0] * table.total == pytest.approx(expected, rel=1e-8)
    assert branching.bound * table.total == pytest.approx(expected, rel=1e-8)
