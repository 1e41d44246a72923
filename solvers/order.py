"""Orders with a lower peak: each task once, in a topological order with few bytes live.

A greedy list schedule, then simulated annealing over swaps of adjacent segments.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from numba import njit

from graphopt.solvers.arrays import Array, to_arrays
from graphopt.solvers.compiling import Compiled
from graphopt.solvers.graph import TaskGraph

_STEPS = 2000  # swaps that one counted step stands for
# Rows of the table the compiled functions work on.
(SEQ, POS, OUT_BYTES, WORKSPACE, IN_PTR, IN_IDX, BYTES, KEEP, USE_PTR, USE_IDX, PRED_PTR,
 PRED_IDX, LAST, CARRY, MEM, DEAD, SCRATCH, BEST, TOTAL) = range(19)  # fmt: skip
N_TASKS, EXCESS, BEST_PEAK, LEVEL, RANDOM = range(5)


@njit(cache=True, nogil=True)
def _rand(x):
    state = (x[TOTAL, RANDOM] * 25214903917 + 11) & 281474976710655
    x[TOTAL, RANDOM] = state
    return (state >> 16) * 2.3283064365386963e-10


@njit(cache=True, nogil=True)
def _account(x, low, high, level):
    """Recomputes the bytes live at positions low..high - 1; returns the change of the excess."""
    change = 0
    for k in range(low, high):
        task = x[SEQ, k]
        for i in range(x[IN_PTR, task], x[IN_PTR, task + 1]):
            value = x[IN_IDX, i]
            last = 0
            for j in range(x[USE_PTR, value], x[USE_PTR, value + 1]):
                last = max(last, x[POS, x[USE_IDX, j]])
            x[LAST, value] = last
    live = x[CARRY, low]
    for k in range(low, high):
        task = x[SEQ, k]
        live += x[OUT_BYTES, task]
        mem = live + x[WORKSPACE, task]
        change += max(mem - level, 0) - max(x[MEM, k] - level, 0)
        x[MEM, k] = mem
        live -= x[DEAD, task]
        for i in range(x[IN_PTR, task], x[IN_PTR, task + 1]):
            value = x[IN_IDX, i]
            if x[LAST, value] == k and not x[KEEP, value]:
                live -= x[BYTES, value]
        if k + 1 < high:
            x[CARRY, k + 1] = live
    return change


@njit(cache=True, nogil=True)
def _swap(x, low, middle, high):
    """Swaps the adjacent segments [low, middle) and [middle, high)."""
    for k in range(low, high):
        x[SCRATCH, k] = x[SEQ, k]
    shift = high - middle
    for k in range(low, middle):
        x[SEQ, k + shift] = x[SCRATCH, k]
        x[POS, x[SCRATCH, k]] = k + shift
    for k in range(middle, high):
        x[SEQ, k - middle + low] = x[SCRATCH, k]
        x[POS, x[SCRATCH, k]] = k - middle + low


@njit(cache=True, nogil=True)
def _reach(x, low, middle, high):
    """How far [middle, ..) may extend, up to `high`, without depending on [low, middle)."""
    for k in range(middle, high):
        task = x[SEQ, k]
        for i in range(x[PRED_PTR, task], x[PRED_PTR, task + 1]):
            if low <= x[POS, x[PRED_IDX, i]] < middle:
                return k
    return high


@njit(cache=True, nogil=True)
def _swaps(x, steps, t0, t1):
    """Simulated annealing; keeps the order of least peak in BEST and lowers LEVEL below it."""
    n = x[TOTAL, N_TASKS]
    if x[TOTAL, LEVEL] == 0:
        _account(x, 0, n, 0)
    x[TOTAL, EXCESS] = 0
    for k in range(n):
        x[TOTAL, EXCESS] += max(x[MEM, k] - x[TOTAL, LEVEL], 0)
    for step in range(steps):
        level = x[TOTAL, LEVEL]
        temperature = t0 * (t1 / t0) ** (step / steps)
        low = int(_rand(x) * (n - 1))
        if _rand(x) < 0.5:  # near a place that is over the level
            seen = 0
            while x[MEM, low] <= level and seen < n:
                low = low + 1 if low + 2 < n else 0
                seen += 1
            low = max(0, low - int(_rand(x) * 8))
        first = 1 + int(math.exp(_rand(x) * math.log(16.0)) - 1)
        second = 1 + int(math.exp(_rand(x) * math.log(n / 2.0)) - 1)
        if _rand(x) < 0.5:
            first, second = second, first
        middle = min(n - 1, low + first)
        high = _reach(x, low, middle, min(n, middle + second))
        if high <= middle or middle <= low:
            continue
        _swap(x, low, middle, high)
        change = _account(x, low, high, level)
        if change <= 0 or _rand(x) < math.exp(-change / temperature):
            x[TOTAL, EXCESS] += change
            if x[TOTAL, EXCESS] == 0 or change < 0:
                _record(x, n)
        else:
            _swap(x, low, low + high - middle, high)
            _account(x, low, high, level)


@njit(cache=True, nogil=True)
def _record(x, n):
    peak = 0
    for k in range(n):
        peak = max(peak, x[MEM, k])
    if peak >= x[TOTAL, BEST_PEAK]:
        return
    x[TOTAL, BEST_PEAK] = peak
    for k in range(n):
        x[BEST, k] = x[SEQ, k]
    x[TOTAL, LEVEL] = int(peak * 0.97)
    x[TOTAL, EXCESS] = 0
    for k in range(n):
        x[TOTAL, EXCESS] += max(x[MEM, k] - x[TOTAL, LEVEL], 0)


def _table(graph: TaskGraph, order: Sequence[int]) -> Array:
    """Everything the compiled functions need, in the rows named above."""
    a = to_arrays(graph)
    n, m = len(graph.tasks), len(graph.values)
    predecessors: list[set[int]] = [
        {graph.values[v].producer for v in t.inputs} for t in graph.tasks
    ]
    for before, later in graph.after:
        predecessors[later].add(before)
    flat = [p for row in predecessors for p in sorted(row)]
    x = np.zeros((19, max(n + 2, m + 2, len(a.in_idx) + 1, len(flat) + 1, 8)), np.int64)
    x[SEQ, :n] = x[BEST, :n] = order
    x[POS, np.asarray(order, np.int64)] = np.arange(n)
    x[OUT_BYTES, :n], x[WORKSPACE, :n] = a.out_bytes, a.workspace
    x[IN_PTR, : n + 1], x[IN_IDX, : len(a.in_idx)] = a.in_ptr, a.in_idx
    x[BYTES, :m], x[KEEP, :m] = a.bytes, a.keep
    x[USE_PTR, : m + 1], x[USE_IDX, : len(a.use_idx)] = a.use_ptr, a.use_idx
    x[PRED_PTR, 1 : n + 1] = np.cumsum([len(row) for row in predecessors])
    x[PRED_IDX, : len(flat)] = flat
    unused = (np.diff(a.use_ptr) == 0) & (a.keep == 0)
    np.add.at(x[DEAD], a.producer[unused], a.bytes[unused])
    x[TOTAL, N_TASKS] = n
    x[TOTAL, BEST_PEAK] = 2**62
    return x


def list_schedule(graph: TaskGraph) -> list[int]:
    """Runs next whichever ready task leaves least live: it frees most or allocates least."""
    n = len(graph.tasks)
    uses = np.zeros(len(graph.values), np.int64).tolist()
    waiting = [0] * n
    successors: list[set[int]] = [set() for _ in range(n)]
    pairs = [(graph.values[v].producer, i) for i, t in enumerate(graph.tasks) for v in t.inputs]
    for before, later in [*pairs, *graph.after]:
        if later not in successors[before]:
            successors[before].add(later)
            waiting[later] += 1
    for task in graph.tasks:
        for value in set(task.inputs):
            uses[value] += 1
    made = [sum(graph.values[v].bytes for v in t.outputs if uses[v]) for t in graph.tasks]
    ready = [i for i in range(n) if not waiting[i]]
    order: list[int] = []
    while ready:
        task = min(ready, key=lambda i: (made[i] - _freed(graph, i, uses), i))
        ready.remove(task)
        order.append(task)
        for value in set(graph.tasks[task].inputs):
            uses[value] -= 1
        for later in successors[task]:
            waiting[later] -= 1
            if not waiting[later]:
                ready.append(later)
    return order


def _freed(graph: TaskGraph, task: int, uses: list[int]) -> int:
    values = graph.values
    return sum(
        values[v].bytes for v in graph.tasks[task].inputs if uses[v] == 1 and not values[v].keep
    )


def _compile() -> None:
    from graphopt.solvers.graph import Task, Value

    graph = TaskGraph(
        tuple(Task(1, (), (i,)) for i in range(4)), tuple(Value(1, i) for i in range(4))
    )
    _swaps(_table(graph, range(4)), 1, 1.0, 0.9)


_swapping = Compiled(_compile)


def reorder(
    graph: TaskGraph,
    *,
    time_limit: float = 10.0,
    step_limit: int | None = None,
    seed: int = 0,
) -> list[int]:
    """Finds an order of the tasks with a lower peak; nothing is recomputed.

    Args:
        graph: the task graph.
        time_limit: seconds.
        step_limit: bounds the work by counted steps instead, for repeatable answers.
        seed: of the random choices.

    Returns:
        A permutation of the task indices; its peak is never above the input order's. See
        `TaskGraph.reordered`.
    """
    from graphopt.solvers.check import check

    began = time.perf_counter()
    n = len(graph.tasks)
    plain, listed = list(range(n)), list_schedule(graph)
    if n < 3:
        return plain
    peaks = {0: check(graph, plain).peak, 1: check(graph, listed, order="free").peak}
    start = plain if peaks[0] <= peaks[1] else listed
    if not _swapping.wait(1e9 if step_limit is not None else time_limit):
        return start
    x = _table(graph, start)
    x[TOTAL, RANDOM] = (seed * 7919 + 12345) & (2**48 - 1)
    spent, part = 0, 0.0
    chunk = 500 if step_limit is None else _STEPS
    heat = min(peaks.values()) * 0.02
    try:
        while part < 1.0:
            before = time.perf_counter()
            temperature = max(1e-3, heat * 0.001**part)
            _swaps(x, chunk, temperature, temperature * 0.99)
            spent += 1
            if step_limit is not None:
                part = spent / step_limit
            else:
                took = time.perf_counter() - before
                chunk = int(min(max(chunk * min(2.0, 0.1 / max(took, 1e-4)), 100), 1e7))
                part = (time.perf_counter() - began) / time_limit
    except KeyboardInterrupt:
        pass
    best = x[BEST, :n].tolist()
    return best if check(graph, best, order="free").peak < min(peaks.values()) else start
