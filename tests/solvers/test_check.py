"""The checker, on cases whose figures are worked out by hand."""

from __future__ import annotations

from graphopt.solvers import Task, TaskGraph, Value, check

# a (10 bytes) -> b (20) -> c (5); c also takes a.
TASKS = (Task(1, (), (0,)), Task(2, (0,), (1,)), Task(4, (0, 1), (2,), workspace=7))
VALUES = (Value(10, 0), Value(20, 1), Value(5, 2))
GRAPH = TaskGraph(TASKS, VALUES)


def test_plain_order() -> None:
    found = check(GRAPH, [0, 1, 2])
    assert (found.peak, found.duration, found.ok) == (10 + 20 + 5 + 7, 7, True)


def test_recomputation_costs_and_is_live_only_when_used() -> None:
    # a dies after b's run and is made again for c: the peak stays, the duration grows by 1.
    found = check(GRAPH, [0, 1, 0, 2])
    assert (found.peak, found.duration, found.ok) == (42, 8, True)


def test_unused_outputs_die_at_once() -> None:
    tasks = (Task(1, (), (0, 1)), Task(1, (), (2,)), Task(1, (0,), ()))
    graph = TaskGraph(tasks, (Value(3, 0), Value(50, 0), Value(9, 1)))
    assert check(graph, [0, 1, 2]).peak == 53  # value 1 is live while its task runs, not later
    assert check(graph, [0, 1, 0, 2]).peak == 53


def test_kept_values_live_to_the_end() -> None:
    tasks = (Task(1, (), (0,)), Task(1, (), (1,)), Task(1, (), (2,)))
    graph = TaskGraph(tasks, (Value(5, 0, keep=True), Value(1, 1), Value(100, 2)))
    assert check(graph, [0, 1, 2]).peak == 105
    assert check(graph, [0, 1, 2, 0]).peak == 100  # only the last instance lives to the end


def test_invalid_plans() -> None:
    assert "not produced yet" in check(GRAPH, [1, 0, 2]).errors[0]
    assert "never run" in check(GRAPH, [0, 1]).errors[0]
    assert "no task 9" in check(GRAPH, [0, 1, 2, 9]).errors[0]
    pinned = TaskGraph((Task(1, (), (0,), recomputable=False), Task(1, (0,), ())), (Value(1, 0),))
    assert "only once" in check(pinned, [0, 0, 1]).errors[0]


def test_order_of_first_executions() -> None:
    graph = TaskGraph((Task(1), Task(1), Task(1)), (), after=((0, 1),))
    assert check(graph, [0, 2, 1], order="free").ok
    assert not check(graph, [0, 2, 1]).ok
    assert "before task 0" in check(graph, [1, 0, 2], order="free").errors[0]
