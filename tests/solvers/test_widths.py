"""Allocations of widths against exhaustive search, and what must hold for every one of them."""

from __future__ import annotations

import _thread
import math
import threading
from typing import get_args

import pytest
from hypothesis import given

from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    Rule,
    Term,
    WidthError,
    WidthProblem,
    allocate,
    by_rule,
)
from tests.benchmarks.widths import densenet, resnet18, resnet50, transformer
from tests.solvers.width_problems import (
    SMALL,
    assert_honest,
    best_value,
    fits,
    line,
    problems,
    value,
)

RULES: tuple[Rule, ...] = get_args(Rule)


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
        other = by_rule(problem, rule)
        assert_honest(problem, other)
        assert other.value <= found.value * (1 + 1e-12)
        assert other.bound >= best * (1 - 1e-12)


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
        other = by_rule(problem, rule)
        assert_honest(problem, other)
        assert other.value <= found.value


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("params", [False, True])
def test_rules_spend_the_budget(rule: Rule, params: bool) -> None:
    problem = resnet50().problem(0.5, params=params)
    found = by_rule(problem, rule)
    assert_honest(problem, found)
    used = [c / cost.limit for c, cost in zip(found.costs, problem.costs, strict=True)]
    assert max(used) >= 0.98


def test_bars_of_a_residual_network() -> None:
    """A gap of at most 0.5 % on 53 dimensions; far less than 30 seconds are needed."""
    found = allocate(resnet50((4, 6, 9, 5), seed=1).problem(0.5), time_limit=30, tolerance=5e-3)
    assert len(found.widths) == 53
    assert found.gap <= 5e-3


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
    for found in (allocate(problem), *(by_rule(problem, rule) for rule in RULES)):
        assert found.status == "infeasible"
        assert (found.widths, found.costs) == ((2,), (2.0,))
        assert_honest(problem, found)
    negative = WidthProblem((), (Cost("c", (Term(1.0),), 0.5),))
    assert allocate(negative).status == "infeasible"


def test_dimensions_in_no_cost_and_without_value_are_kept_whole() -> None:
    free = Dimension("free", (1.0, 0.0, 0.0))
    worthless = Dimension("worthless", (0.0,) * 4)
    problem = WidthProblem((free, worthless), (Cost("c", (Term(1.0, ((1, 1),)),), 3.0),))
    for found in (allocate(problem), *(by_rule(problem, rule) for rule in RULES)):
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
    assert found.value >= max(by_rule(problem, rule).value for rule in RULES)
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
        (lambda: by_rule(WidthProblem((), ()), "best"), "no rule"),  # pyright: ignore
    ],
)
def test_problems_that_make_no_sense(make: object, message: str) -> None:
    with pytest.raises(WidthError, match=message):
        make()  # pyright: ignore[reportCallIssue]


def test_coarse_units_are_exchanged_for_finer_ones_that_use_what_is_left() -> None:
    heads, inside = Dimension("heads", (1.0,) * 3), Dimension("inside", (1.0,) * 6)
    cost = Cost("flops", (Term(1.0, ((0, 1), (1, 1))),), limit=9.0)
    found = by_rule(WidthProblem((heads, inside), (cost,)), "uniform")
    assert found.costs == (9.0,)  # three heads of three; two of four would use eight


@given(problems())
@SMALL
def test_no_single_unit_more_fits_what_a_rule_leaves(problem: WidthProblem) -> None:
    for rule in RULES:
        found = by_rule(problem, rule)
        if found.status == "infeasible":
            continue
        for d, dimension in enumerate(problem.dimensions):
            wider = [w for w in dimension.widths if w > found.widths[d]][:1]
            widths = (*found.widths[:d], *wider, *found.widths[d + 1 :])
            assert not wider or not fits(problem, widths)
