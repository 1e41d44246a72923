"""A second stage search for the second core, once the bounds have had their share of it."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from graphopt.solvers import table as T
from graphopt.solvers.arrays import Arrays
from graphopt.solvers.clock import Clock
from graphopt.solvers.solution import Incumbent
from graphopt.solvers.stages import from_sequence

_HEATS = (0.5, 0.15, 0.3, 0.08)  # first temperature of a cycle relative to the mean duration
_FALL = 0.002


def accompany(
    arrays: Arrays,
    incumbent: Incumbent,
    clock: Clock,
    seed: int,
    classes: np.ndarray,
    found: Callable[[list[int]], None],
    closed: Callable[[], bool],
) -> None:
    """Anneals from the incumbent until told to stop.

    Args:
        arrays: the task graph.
        incumbent: only read.
        clock: how long to go on.
        seed: of the random numbers; another one than the main search's.
        classes: per task, a number that tasks of repeated blocks share.
        found: called with every better plan, in this thread.
        closed: whether to stop.
    """
    from graphopt.solvers.stage_search import KINDS, anneal

    x = T.new_table(arrays, incumbent.budget, classes)
    x[T.TOTAL, T.RANDOM] = (seed * 7919 + 54321) & (2**48 - 1)
    score, moves = np.zeros((KINDS, 4)), 2000
    base = int(arrays.duration.sum())
    price = base / max(1, int(x[T.TOTAL, T.EXCESS]))
    mean = max(base, 1) / len(arrays.duration)
    share = (1.0 - clock.used()) / len(_HEATS)
    for heat in _HEATS:
        start, reload = clock.used(), True
        _adopt(x, arrays, incumbent)
        while not closed() and (part := (clock.used() - start) / share) < 1:
            began = time.thread_time()
            hot = heat * mean * _FALL**part
            price = anneal(x, score, moves, hot, hot * 0.99, price, reload)
            reload = False
            moves = int(
                np.clip(moves * min(3.0, 0.1 / max(time.thread_time() - began, 1e-4)), 50, 10**7)
            )
            extra = int(x[T.TOTAL, T.BEST_EXTRA])
            if x[T.TOTAL, T.BEST_EXCESS] == 0 and base + extra < incumbent.duration:
                found(T.best_plan(x))


def _adopt(x: np.ndarray, arrays: Arrays, incumbent: Incumbent) -> None:
    """Begins from the incumbent if it is better than what the table has."""
    n = len(arrays.duration)
    sequence = [*incumbent.sequence, *range(len(incumbent.graph.tasks), n)]
    plan = from_sequence(arrays, sequence)
    excess = int(np.maximum(plan.peaks() - incumbent.budget, 0).sum())
    if (excess, plan.extra) < (int(x[T.TOTAL, T.BEST_EXCESS]), int(x[T.TOTAL, T.BEST_EXTRA])):
        T.set_best(x, plan, incumbent.budget)
