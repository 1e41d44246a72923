"""Least saving, against all subsets of small steps."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solvers import Task, TaskGraph, Value, check, least_saved, save_least

PRICE = 64


@st.composite
def steps(draw: st.DrawFn) -> tuple[TaskGraph, int, frozenset[int]]:
    """Some forward tasks of one value each, and a backward task for some of them, in reverse."""
    n = draw(st.integers(2, 6))
    tasks, values = [], []
    for t in range(n):
        inputs = draw(st.sets(st.integers(0, t - 1), max_size=2)) if t else set()
        values.append(Value(draw(st.integers(1, 500)), t, keep=draw(st.booleans()) and t == n - 1))
        tasks.append(Task(1, tuple(sorted(inputs)), (t,), recomputable=draw(st.booleans())))
    for t in reversed(range(n)):
        reads = draw(st.sets(st.integers(0, t), max_size=2))
        tasks.append(Task(1, tuple(sorted(reads)), ()))
    return TaskGraph(tuple(tasks), tuple(values)), n, draw(st.frozensets(st.integers(0, n - 1)))


def cost(graph: TaskGraph, turn: int, cheap: frozenset[int], kept: frozenset[int]) -> int | None:
    """Price of keeping just these values, from the definition; None: backward lacks something."""
    waiting = {v for task in graph.tasks[turn:] for v in task.inputs}
    again: set[int] = set()
    while waiting:
        v = waiting.pop()
        task = graph.values[v].producer
        if v in kept or task in again:
            continue
        if task not in cheap or not graph.tasks[task].recomputable:
            return None
        again.add(task)
        waiting |= set(graph.tasks[task].inputs)
    touched = [{*graph.tasks[t].inputs, *graph.tasks[t].outputs} for t in again]
    prices = [max(1, sum(graph.values[v].bytes for v in values)) for values in touched]
    return sum(prices) + sum(
        PRICE * graph.values[v].bytes for v in kept if not graph.values[v].keep
    )


@given(steps())
@settings(max_examples=200, deadline=None)
def test_nothing_costs_less(step: tuple[TaskGraph, int, frozenset[int]]) -> None:
    graph, turn, cheap = step
    found = cost(graph, turn, cheap, least_saved(graph, turn, cheap))
    candidates = [v for v in range(len(graph.values)) if graph.values[v].producer < turn]
    every = [
        cost(graph, turn, cheap, frozenset(subset))
        for size in range(len(candidates) + 1)
        for subset in combinations(candidates, size)
    ]
    assert found == min(c for c in every if c is not None)


@given(steps())
@settings(max_examples=100, deadline=None)
def test_the_plan_is_valid_and_runs_only_cheap_tasks_again(
    step: tuple[TaskGraph, int, frozenset[int]],
) -> None:
    graph, turn, cheap = step
    plan = save_least(graph, turn, cheap)
    assert check(graph, plan.sequence).ok
    twice = {t for t in plan.sequence if plan.sequence.count(t) > 1}
    assert twice <= {t for t in cheap if t < turn}
    forward = plan.sequence.index(turn - 1)
    assert all(forward < last(plan.sequence, t) for t in twice)


def last(sequence: tuple[int, ...], task: int) -> int:
    return len(sequence) - 1 - sequence[::-1].index(task)
