"""The solver against closed forms, exhaustive search and the independent checker."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.solvers import (
    Progress,
    Solution,
    Task,
    TaskGraph,
    TaskGraphError,
    Value,
    check,
    frontier,
    minimise,
    reorder,
    solve,
)
from tests.solvers import brute, graphs

SLOW = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


def plain_peak(graph: TaskGraph) -> int:
    return check(graph, range(len(graph.tasks))).peak


def assert_honest(graph: TaskGraph, found: Solution, order: str = "input") -> None:
    """The checker agrees with every figure, and nothing contradicts itself."""
    figures = check(graph, found.sequence, order=order)
    assert figures.ok
    assert (figures.peak, figures.duration) == (found.peak, found.duration)
    assert found.min_peak_bound <= found.min_peak <= found.peak
    assert graph.duration <= found.lower_bound
    if found.status == "infeasible":
        assert found.peak > found.budget
        return
    assert found.peak <= found.budget
    assert found.lower_bound <= found.duration
    assert (found.status == "optimal") == (found.lower_bound == found.duration)
    for peak, duration in found.starts.values():
        assert peak > found.budget or duration >= found.duration


# A chain of L forward and L backward tasks of one unit and one byte needs, at least, one
# checkpoint, the gradient and the value at hand; a budget of L + 1 runs it without recomputation.
@pytest.mark.parametrize("length", [3, 5])
def test_chain_is_optimal_at_every_budget(length: int) -> None:
    graph = graphs.chain(length)
    assert plain_peak(graph) == length + 1
    for budget in range(2, length + 2):
        expected = brute.shortest(graph, budget)
        found = solve(graph, budget, time_limit=900, step_limit=400, max_copies=4)
        assert_honest(graph, found)
        if expected is None:
            assert found.status == "infeasible"
        else:
            assert found.duration == expected
            assert found.lower_bound <= expected


@pytest.mark.parametrize("seed", range(24))
def test_tiny_graphs_against_exhaustive_search(seed: int) -> None:
    graph = graphs.tiny(seed)
    peak = plain_peak(graph)
    for budget in sorted({peak - 1, round(0.75 * peak), round(0.5 * peak)} - {-1}):
        least = brute.shortest(graph, budget)
        staged = brute.shortest(graph, budget, staged=True)
        found = solve(graph, budget, step_limit=60, time_limit=900, max_copies=4)
        assert_honest(graph, found)
        if staged is None:
            assert found.status == "infeasible"
        else:
            assert found.duration == staged
        if least is not None:  # the bounds hold for all plans, not only staged ones
            assert not found.proven_infeasible
            assert found.lower_bound <= least or "executions" in found.scope


@pytest.mark.parametrize("seed", range(8))
def test_free_order_against_exhaustive_search(seed: int) -> None:
    graph = graphs.tiny(100 + seed, 5)
    least = brute.least_peak(graph, free_order=True)
    for budget in (least, least + 1):
        expected = brute.shortest(graph, budget, free_order=True)
        found = solve(graph, budget, order="free", step_limit=60, time_limit=900)
        assert_honest(graph, found, "free")
        assert expected is not None
        assert found.lower_bound <= expected
        assert found.min_peak_bound <= least
        if found.status == "optimal":
            assert found.duration == expected


@pytest.mark.parametrize("seed", range(8))
def test_smallest_peak_against_exhaustive_search(seed: int) -> None:
    graph = graphs.tiny(200 + seed)
    least, staged = brute.least_peak(graph), brute.least_peak(graph, staged=True)
    found = minimise(graph, step_limit=200, time_limit=900)
    figures = check(graph, found.sequence)
    assert (figures.ok, figures.peak, figures.duration) == (True, found.peak, found.duration)
    assert found.min_peak_bound <= least
    assert found.peak == staged
    assert (found.status == "optimal") == (found.peak == found.min_peak_bound)


@st.composite
def task_graphs(draw: st.DrawFn) -> TaskGraph:
    n = draw(st.integers(2, 40))
    tasks: list[Task] = []
    values: list[Value] = []
    for index in range(n):
        pool = st.sampled_from(range(len(values))) if values else st.nothing()
        inputs = draw(st.sets(pool, max_size=4)) if values else set()
        made = range(len(values), len(values) + draw(st.integers(0, 3)))
        values += [
            Value(draw(st.integers(0, 10**6)), index, draw(st.integers(0, 9)) == 0) for _ in made
        ]
        tasks.append(
            Task(
                draw(st.integers(0, 10**6)),
                tuple(sorted(inputs)),
                tuple(made),
                draw(st.sampled_from([0, 0, 10**5])),
                draw(st.integers(0, 5)) > 0,
            )
        )
    return TaskGraph(tuple(tasks), tuple(values))


@SLOW
@given(task_graphs(), st.floats(0.3, 1.0))
def test_checker_agrees_with_the_solver(graph: TaskGraph, fraction: float) -> None:
    found = solve(graph, math.ceil(fraction * plain_peak(graph)), step_limit=30, time_limit=900)
    assert_honest(graph, found)


@SLOW
@given(task_graphs())
def test_reorder_never_raises_the_peak(graph: TaskGraph) -> None:
    order = reorder(graph, step_limit=5)
    figures = check(graph, order, order="free")
    assert figures.ok
    assert figures.peak <= plain_peak(graph)


def test_reorder_finds_the_depth_first_order() -> None:
    # Ten big temporaries, each reduced to one byte: breadth first holds all of them.
    tasks = [Task(1, (), (i,)) for i in range(10)]
    tasks += [Task(1, (i,), (10 + i,)) for i in range(10)]
    values = [Value(100, i) for i in range(10)] + [Value(1, 10 + i) for i in range(10)]
    tasks.append(Task(1, tuple(range(10, 20)), ()))
    graph = TaskGraph(tuple(tasks), tuple(values))
    assert plain_peak(graph) == 1001
    order = reorder(graph, step_limit=20)
    assert check(graph, order, order="free").peak == 110


def test_training_graphs_beat_checkpointing() -> None:
    graph = graphs.transformer(3)
    budget = math.ceil(0.5 * plain_peak(graph))
    found = solve(graph, budget, step_limit=1500, time_limit=900)
    assert_honest(graph, found)
    assert found.gap < 0.02
    # Running the whole forward part twice is what checkpointing costs at most.
    assert found.duration < graph.duration * 1.1


def test_general_features_on_a_training_graph() -> None:
    graph = graphs.transformer(2, workspace=0.5, statistics=True)
    found = solve(graph, math.ceil(0.7 * plain_peak(graph)), step_limit=800, time_limit=900)
    assert_honest(graph, found)
    assert found.status != "infeasible"


def test_same_seed_same_plan() -> None:
    graph = graphs.layered(60, seed=3)
    budget = math.ceil(0.85 * plain_peak(graph))
    first, second = (solve(graph, budget, step_limit=300, time_limit=900, seed=5) for _ in range(2))
    assert first.sequence == second.sequence
    assert (first.lower_bound, first.status) == (second.lower_bound, second.status)


def test_progress_is_monotone() -> None:
    seen: list[Progress] = []
    graph = graphs.layered(80, seed=4)
    solve(
        graph,
        math.ceil(0.8 * plain_peak(graph)),
        step_limit=600,
        time_limit=900,
        on_progress=seen.append,
    )
    durations = [p.duration for p in seen if p.duration is not None]
    assert durations == sorted(durations, reverse=True)
    assert len(set(durations)) > 1
    bounds = [p.lower_bound for p in seen]
    assert bounds == sorted(bounds)
    assert [p.elapsed for p in seen] == sorted(p.elapsed for p in seen)


def test_interrupt_keeps_the_incumbent() -> None:
    graph = graphs.layered(80, seed=4)
    calls = []

    def interrupt(progress: Progress) -> None:
        if progress.duration is not None:
            calls.append(progress)
            if len(calls) == 3:
                raise KeyboardInterrupt

    found = solve(graph, math.ceil(0.8 * plain_peak(graph)), time_limit=20, on_progress=interrupt)
    assert_honest(graph, found)
    assert found.status == "feasible"
    assert found.seconds < 15


def test_nothing_to_do() -> None:
    graph = graphs.chain(5)
    found = solve(graph, plain_peak(graph))
    assert found.status == "optimal"
    assert found.sequence == tuple(range(10))


def test_impossible_budget_is_proven() -> None:
    graph = graphs.unet(2)
    found = solve(graph, 10, time_limit=5)
    assert found.status == "infeasible"
    assert found.proven_infeasible


def test_a_given_start_is_not_lost() -> None:
    graph = graphs.chain(6)
    start = solve(graph, 4, step_limit=300, time_limit=900).sequence
    found = solve(graph, 4, start=start, step_limit=1, time_limit=900)
    assert found.duration <= check(graph, start).duration


def test_frontier_is_monotone() -> None:
    graph = graphs.unet(2)
    curve = frontier(graph, 5, time_limit=900, step_limit=1500)
    for found in curve:
        assert_honest(graph, found)
    assert [f.budget for f in curve] == sorted((f.budget for f in curve), reverse=True)
    durations = [f.duration for f in curve]
    assert durations == sorted(durations)
    assert durations[0] == graph.duration


@pytest.mark.parametrize(
    "call",
    [
        lambda g: solve(g, -1),
        lambda g: solve(g, 1.5),
        lambda g: solve(g, True),
        lambda g: solve(g, 5, order="best"),
        lambda g: solve(g, 5, time_limit=0),
        lambda g: solve(g, 5, time_limit=math.nan),
        lambda g: solve(g, 5, start=[0, 1]),
        lambda g: solve({}, 5),
        lambda g: frontier(g, 0),
        lambda g: frontier(g, []),
    ],
)
def test_bad_arguments(call: object) -> None:
    with pytest.raises(TaskGraphError):
        call(graphs.chain(3))  # type: ignore[operator]


def test_recognises_repeated_blocks() -> None:
    from graphopt.solvers.blocks import task_classes

    classes: Sequence[int] = task_classes(graphs.transformer(6)).tolist()
    inner = classes[1 + 2 * 14 : 1 + 3 * 14]
    assert classes[1 + 3 * 14 : 1 + 4 * 14] == inner  # the same places in the next block
