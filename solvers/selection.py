"""Which of many things to take, so many of each group, where the cost of a set is quadratic.

    minimise    linear . z + |offset + factors z|^2 / 2
    subject to  z binary, and in every group as many ones as asked for

Block coordinate descent: of a block of candidates, half of them taken and half not, those that
promise most are chosen; all others stay, and the block's own problem is solved
(`selection_blocks`).  After Rosenberg et al., "Scalable iterative pruning of large language and
vision models using block coordinate descent" (2024), which leaves open what solves a block.  The
descent starts from the set that it is given, and once more from what the linear relaxation rounds
to (`selection_relaxed`), whose value is a bound.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable

import numpy as np

from graphopt.solvers.selection_blocks import TINY, exhausted, swapped
from graphopt.solvers.selection_problem import (
    Floats,
    Indices,
    Mask,
    Quadratic,
    Selection,
    SelectionError,
)
from graphopt.solvers.selection_relaxed import relaxed

_EXACT = 1e-9  # a gap below this is rounding
_BLOCK = 256
_REST = 8  # rounds for which the things of a block that gave nothing stay as they are
_FAILURES = 12  # blocks in a row that give nothing: the descent is over
_LITTLE = 1e-4  # a block that gains less, relatively, counts as one that gives nothing
_LAST = 40  # small blocks that are tried in the end
_SHARE = 0.6  # of the time, after which the relaxation ends

OnProgress = Callable[[float], None]


def select(
    problem: Quadratic,
    start: Mask | None = None,
    *,
    time_limit: float = 30.0,
    blocks: int = 500,
    progress: OnProgress | None = None,
) -> Selection:
    """A cheap set, by block coordinate descent; never worse than the one that it starts with.

    Args:
        problem: the problem.
        start: a set of the counts asked for; None: those that cost least alone.
        time_limit: seconds.
        blocks: most blocks that are solved.
        progress: called with the cost whenever it falls. An interrupt (Ctrl-C) ends the work, and
            what was found until then is returned.

    Raises:
        SelectionError: the start has other counts, or a time limit that makes no sense.
    """
    if not time_limit > 0:
        raise SelectionError("time_limit must be positive")
    if start is None:
        start = problem.cheapest(problem.slopes(problem.offset) + problem.diagonal / 2)
    found = np.bincount(problem.groups[start], minlength=len(problem.counts))
    if (found != problem.counts).any():
        raise SelectionError("the start doesn't take as many of each group as are asked for")
    run = _Descent(problem, start.copy(), time_limit, blocks, progress)
    bound = -math.inf
    with contextlib.suppress(KeyboardInterrupt):
        run.descend(TINY if len(start) <= TINY else _BLOCK)
        if run.proven:
            return run.selection(run.cost)
        bound, rounded = relaxed(problem, run.taken, lambda: run.late(_SHARE))
        run.restart(rounded)
        run.descend(_BLOCK)
        run.left = min(run.left, _LAST)
        run.descend(TINY)
    return run.selection(bound)


class _Descent:
    """The incumbent, and the blocks that improve it."""

    def __init__(
        self,
        problem: Quadratic,
        taken: Mask,
        time_limit: float,
        blocks: int,
        progress: OnProgress | None,
    ) -> None:
        self.began, self.time_limit = time.perf_counter(), time_limit
        self.problem, self.taken, self.left, self.progress = problem, taken, blocks, progress
        self.state = problem.state(taken)
        self.start = self.cost = problem.cost(taken)
        self.blocks, self.proven = 0, False

    def late(self, share: float = 1.0) -> bool:
        """Whether a share of the time is used up."""
        return time.perf_counter() - self.began > share * self.time_limit

    def descend(self, size: int) -> None:
        """Solves blocks of a size until many in a row gave nothing."""
        resting = np.zeros(len(self.taken), np.int64)
        failures = number = 0
        while failures < _FAILURES and self.left > 0 and not self.late():
            number, self.left = number + 1, self.left - 1
            block = self._block(size, resting < number)
            if self._solved(block, size):
                failures = 0
                continue
            if len(block) == len(self.taken) <= TINY:
                self.proven = True
                return
            failures += 1
            resting[block] = number + _REST
            if not len(block):
                resting[:] = 0

    def restart(self, taken: Mask) -> None:
        """Goes on from another set if that is cheaper."""
        cost = self.problem.cost(taken)
        if cost < self.cost:
            self._take(taken, cost)

    def _take(self, taken: Mask, cost: float) -> None:
        self.taken, self.cost, self.state = taken, cost, self.problem.state(taken)
        if self.progress:
            self.progress(cost)

    def _block(self, size: int, free: Mask) -> Indices:
        """The candidates that promise most by themselves, as many taken as not."""
        if len(self.taken) <= size:
            return np.arange(len(self.taken))
        flip = self._flips()
        best = self._best_pairs(flip, free) if len(self.problem.counts) > 1 else None
        candidates = np.flatnonzero(free) if best is None else best
        half = size // 2
        taken = self.taken[candidates]
        sides = [candidates[taken], candidates[~taken]]
        if best is not None:  # pairs come in order
            return np.concatenate([side[:half] for side in sides])
        return np.concatenate([_lowest(side, flip[side], half) for side in sides])

    def _flips(self) -> Floats:
        """What it costs to change each thing alone."""
        slopes = self.problem.slopes(self.state)
        return np.where(self.taken, -slopes, slopes) + self.problem.diagonal / 2

    def _best_pairs(self, flip: Floats, free: Mask) -> Indices:
        """Of each group with any, the cheapest to take and to release; the best pairs first."""
        places = np.flatnonzero(free)
        groups, side = self.problem.groups[places], self.taken[places]
        order = np.lexsort((flip[places], side, groups))
        key = groups[order] * 2 + side[order]
        first = order[np.flatnonzero(np.diff(key, prepend=-1))]
        heads = np.full((2, len(self.problem.counts)), -1, np.intp)
        heads[side[first].astype(int), groups[first]] = places[first]
        both = heads[:, (heads >= 0).all(0)]
        ranked = both[:, np.argsort(flip[both].sum(0), kind="stable")]
        return ranked.T.ravel()

    def _solved(self, block: Indices, size: int) -> bool:
        """Solve a block with everything else as it is; whether that made it notably cheaper."""
        self.blocks += 1
        if len(block) < 2:
            return False
        factors = self.problem.factors[:, block].astype(np.float64)
        quadratic = factors.T @ factors
        now = self.taken[block]
        linear = self.problem.linear[block] + self.state @ factors - quadratic @ now
        groups = self.problem.groups[block]
        solve = exhausted if len(block) <= TINY else swapped
        new = solve(linear, quadratic, groups, now)
        if (new == now).all():
            return False
        taken = self.taken.copy()
        taken[block] = new
        cost = self.problem.cost(taken)
        gain = self.cost - cost
        if gain > 0:
            self._take(taken, cost)
        return gain > _LITTLE * abs(cost)

    def selection(self, bound: float) -> Selection:
        """The answer as it stands."""
        bound = min(bound, self.cost)
        gap = self.cost - bound
        exact = gap <= _EXACT * max(abs(self.cost), abs(bound))
        return Selection(
            taken=self.taken,
            cost=self.cost,
            start=self.start,
            bound=bound,
            gap=gap,
            status="optimal" if exact else "feasible",
            blocks=self.blocks,
            seconds=time.perf_counter() - self.began,
        )


def _lowest(places: Indices, costs: Floats, count: int) -> Indices:
    if len(places) <= count:
        return places
    return places[np.argpartition(costs, count)[:count]]


__all__ = ["Quadratic", "Selection", "SelectionError", "select"]
