"""Exhaustive search on tiny task graphs: the oracle that the solver is held against.

It walks states (values in memory, tasks done) with Dijkstra's algorithm; it shares nothing with
the solver and decides for itself what may be freed.
"""

from __future__ import annotations

import heapq
from itertools import combinations

from graphopt.solvers import TaskGraph

State = tuple[frozenset[int], frozenset[int], int]  # values in memory, tasks done, last rerun


def shortest(
    graph: TaskGraph, budget: int, *, free_order: bool = False, staged: bool = False
) -> int | None:
    """The least duration of any plan within the budget, None if there is none.

    Args:
        graph: a tiny task graph.
        budget: bytes.
        free_order: first executions may come in any topological order.
        staged: between two first executions, recomputations come in input order.
    """
    n = len(graph.tasks)
    start: State = (frozenset(), frozenset(), -1)
    queue: list[tuple[int, int, State]] = [(0, 0, start)]
    best = {start: 0}
    ticket = 0
    while queue:
        duration, _, (live, done, last) = heapq.heappop(queue)
        if duration > best[live, done, last]:
            continue
        if len(done) == n and all(i in live for i, v in enumerate(graph.values) if v.keep):
            return duration
        for task in range(n):
            if not _may_run(graph, task, live, done, free_order):
                continue
            if staged and task in done and task <= last:
                continue
            step = graph.tasks[task]
            after = live | set(step.outputs)
            size = sum(graph.values[v].bytes for v in after) + step.workspace
            if size > budget:
                continue
            reached = duration + step.duration
            rerun = task if staged and task in done else -1
            for kept in _subsets(after):
                state = (kept, done | {task}, rerun)
                if reached < best.get(state, 10**9):
                    best[state] = reached
                    ticket += 1
                    heapq.heappush(queue, (reached, ticket, state))
    return None


def least_peak(graph: TaskGraph, *, free_order: bool = False, staged: bool = False) -> int:
    """The smallest budget within which some plan fits."""
    budget = 0
    while shortest(graph, budget, free_order=free_order, staged=staged) is None:
        budget += 1
    return budget


def _may_run(
    graph: TaskGraph, task: int, live: frozenset[int], done: frozenset[int], free_order: bool
) -> bool:
    step = graph.tasks[task]
    if task in done and not step.recomputable:
        return False
    if not set(step.inputs) <= live:
        return False
    if task in done:
        return True
    if any(later == task and before not in done for before, later in graph.after):
        return False
    return free_order or task == len(done)


def _subsets(values: set[int] | frozenset[int]) -> list[frozenset[int]]:
    """Everything that may be left in memory: values can be freed at any time."""
    items = sorted(values)
    return [frozenset(c) for r in range(len(items) + 1) for c in combinations(items, r)]
