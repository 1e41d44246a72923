"""Allocations of widths against exhaustive search, and what must hold for every one of them."""

from __future__ import annotations

import _thread
import math
import random
import threading
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.solvers.width_bound import Relaxation
from graphopt.solvers.width_branch import Branching
from graphopt.solvers.width_cpsat import prove
from graphopt.solvers.width_geometric import LogRelaxation
from graphopt.solvers.width_table import WidthTable
from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    Term,
    WidthError,
    WidthProblem,
    allocate,
    by_greedy,
    by_threshold,
    uniform,
)
from tests.benchmarks.widths import densenet, resnet18, resnet50, transformer

RULES = (by_greedy, uniform, by_threshold)
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


@given(problems())
@SMALL
def test_small_problems_against_exhaustive_search(problem: WidthProblem) -> None:
    best = best_value(problem)
    found = allocate(problem, time_limit=60)
    assert_honest(problem, found)
    if best is None:
        assert found.status == "infeasible"
        return
    assert found.status == "optimal"
    assert found.value == pytest.approx(best, rel=1e-9)
    for rule in RULES:
        other = rule(problem)
        assert_honest(problem, other)
        assert other.value <= found.value * (1 + 1e-12)
        assert other.bound >= best * (1 - 1e-12)


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


@pytest.mark.parametrize(
    "problem",
    [
        resnet50((1, 2, 1, 1)).problem(0.5, params=True),
        resnet50((1, 1, 1, 1), step=8).problem(0.3),
        resnet18(spread=0.0).problem(0.3),
        transformer(4).problem(0.5, params=True),
        densenet((3, 4)).problem(0.4),
    ],
    ids=["bottlenecks", "steps of 8", "equal gains", "encoder", "dense"],
)
def test_networks(problem: WidthProblem) -> None:
    found = allocate(problem, time_limit=20, tolerance=2e-3)
    assert_honest(problem, found)
    assert found.gap <= 2e-3
    for rule in RULES:
        other = rule(problem)
        assert_honest(problem, other)
        assert other.value <= found.value


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("params", [False, True])
def test_rules_spend_the_budget(rule: object, params: bool) -> None:
    problem = resnet50().problem(0.5, params=params)
    found = rule(problem)  # pyright: ignore[reportCallIssue]
    assert_honest(problem, found)
    used = [c / cost.limit for c, cost in zip(found.costs, problem.costs, strict=True)]
    assert max(used) >= 0.98


def test_bars_of_a_residual_network() -> None:
    """A gap of at most 0.5 % on 53 dimensions; far less than 30 seconds are needed."""
    found = allocate(resnet50((4, 6, 9, 5), seed=1).problem(0.5), time_limit=30, tolerance=5e-3)
    assert len(found.widths) == 53
    assert found.gap <= 5e-3


def line(*gains: float, limit: float, **more: int) -> WidthProblem:
    """One dimension that costs 1 a unit."""
    return WidthProblem(
        (Dimension("d", gains, **more),), (Cost("c", (Term(1.0, ((0, 1),)),), limit),)
    )


def test_least_most_and_step() -> None:
    gains = tuple(float(10 - i) for i in range(10))
    assert allocate(line(*gains, limit=100)).widths == (10,)
    assert allocate(line(*gains, limit=7.5)).widths == (7,)
    assert allocate(line(*gains, limit=100, most=6)).widths == (6,)
    assert allocate(line(*gains, limit=9, step=4)).widths == (8,)
    assert allocate(line(*gains, limit=10, step=4)).widths == (10,)
    assert Dimension("d", gains, least=5, step=4).widths == (8, 10)
    assert Dimension("d", gains, least=9, step=4).widths == (10,)
    assert Dimension("d", gains, most=9, step=4).widths == (4, 8)


def test_a_limit_that_is_met_exactly() -> None:
    tenth = Cost("c", (Term(0.1, ((0, 1),)),), 0.3)
    problem = WidthProblem((Dimension("d", (1.0,) * 5),), (tenth,))
    assert 0.1 * 3 > 0.3  # so in floating point, and also exactly
    assert allocate(problem).widths == (2,)
    assert allocate(line(1.0, 1.0, 1.0, 1.0, limit=3.0)).widths == (3,)


def test_numbers_beyond_64_bits() -> None:
    terms = (Term(1e15, ((0, 2), (1, 1))), Term(2.0**-60, ((1, 1),)))
    dimensions = (Dimension("a", (3.0, 2.0, 1.0)), Dimension("b", (3.0, 2.0, 1.0)))
    for limit, expected in ((4e15, (1, 3)), (8e15, (2, 1)), (1.8e16, (2, 3))):
        problem = WidthProblem(dimensions, (Cost("c", terms, limit),))
        found = allocate(problem)
        assert_honest(problem, found)
        assert found.value == best_value(problem)
        assert value(problem, found.widths) >= value(problem, expected) or not fits(
            problem, expected
        )


def test_infeasible_gives_the_least() -> None:
    problem = line(1.0, 1.0, 1.0, limit=1.5, least=2)
    for found in (allocate(problem), *(rule(problem) for rule in RULES)):
        assert found.status == "infeasible"
        assert (found.widths, found.costs) == ((2,), (2.0,))
        assert_honest(problem, found)
    negative = WidthProblem((), (Cost("c", (Term(1.0),), 0.5),))
    assert allocate(negative).status == "infeasible"


def test_dimensions_in_no_cost_and_without_value_are_kept_whole() -> None:
    free = Dimension("free", (1.0, 0.0, 0.0))
    worthless = Dimension("worthless", (0.0,) * 4)
    problem = WidthProblem((free, worthless), (Cost("c", (Term(1.0, ((1, 1),)),), 3.0),))
    for found in (allocate(problem), *(rule(problem) for rule in RULES)):
        assert found.widths == (3, 3)
        assert found.value == 1.0


def test_all_gains_zero() -> None:
    found = allocate(line(0.0, 0.0, 0.0, limit=2.0))
    assert (found.value, found.bound, found.gap, found.status) == (0.0, 0.0, 0.0, "optimal")


def test_nothing_to_allocate_and_nothing_to_limit() -> None:
    assert allocate(WidthProblem((), ())).status == "optimal"
    found = allocate(WidthProblem((Dimension("d", (2.0, 1.0)),), ()))
    assert (found.widths, found.value, found.status) == ((2,), 3.0, "optimal")


def test_the_same_seed_gives_the_same_widths() -> None:
    problem = resnet50((1, 1, 1, 1), step=16).problem(0.4)
    first, second = (allocate(problem, time_limit=60, seed=3, tolerance=1e-5) for _ in range(2))
    assert first.widths == second.widths
    assert first.bound == second.bound


def test_progress_only_improves() -> None:
    seen: list[Allocation] = []
    problem = resnet18().problem(0.5)
    found = allocate(problem, time_limit=20, tolerance=1e-4, progress=seen.append)
    assert [a.value for a in seen] == sorted(a.value for a in seen)
    assert [a.bound for a in seen] == sorted((a.bound for a in seen), reverse=True)
    assert seen[-1].widths == found.widths
    for allocation in seen:
        assert_honest(problem, allocation)


def test_interrupt_keeps_the_incumbent() -> None:
    problem, seen = resnet50().problem(0.5), []

    def interrupt(allocation: Allocation) -> None:
        seen.append(allocation)
        raise KeyboardInterrupt

    found = allocate(problem, progress=interrupt)
    assert found.status == "feasible"
    assert found.widths == seen[-1].widths
    assert_honest(problem, found)


def test_a_signal_from_outside_ends_the_work() -> None:
    problem = densenet((6, 8)).problem(0.5)
    timer = threading.Timer(1.5, _thread.interrupt_main)
    timer.start()
    try:
        found = allocate(problem, time_limit=60)
    finally:
        timer.cancel()
    assert found.seconds < 10
    assert found.value >= max(rule(problem).value for rule in RULES)
    assert_honest(problem, found)


def test_the_time_limit_holds() -> None:
    found = allocate(densenet().problem(0.5), time_limit=1.0)
    assert found.status == "feasible"
    assert found.seconds < 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Dimension("d", ()), "full width"),
        (lambda: Dimension("d", (1.0, 2.0)), "sorted"),
        (lambda: Dimension("d", (-1.0,)), "negative"),
        (lambda: Dimension("d", (math.nan,)), "finite"),
        (lambda: Dimension("d", (1.0,), least=2), "least"),
        (lambda: Dimension("d", (1.0,), step=0), "step"),
        (lambda: Dimension("d", (1.0,) * 9, least=5, most=7, step=4), "multiple"),
        (lambda: Term(-1.0), "coefficients"),
        (lambda: Term(1.0, ((0, 0),)), "exponents"),
        (lambda: Term(1.0, ((0, 1), (0, 1))), "twice"),
        (lambda: Cost("c", (), math.inf), "limit"),
        (lambda: WidthProblem((), (Cost("c", (Term(1.0, ((0, 1),)),), 1.0),)), "no dimension"),
        (lambda: allocate(WidthProblem((), ()), time_limit=0), "time_limit"),
    ],
)
def test_problems_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(WidthError, match=message):
        make()  # pyright: ignore[reportCallIssue]
