"""Which of many things to take, so many of each group, where the cost of a set is quadratic.

    minimise    linear . z + |offset + factors z|^2 / 2
    subject to  z binary, and in every group as many ones as asked for

Block coordinate descent: of a block of candidates, half of them taken and half not, those that
promise most are chosen; all others stay, and the block's own problem is solved by swaps, small ones
by trying everything.  After Rosenberg et al., "Scalable iterative pruning of large language and
vision models using block coordinate descent" (2024), which leaves open
what solves a block.  The descent starts from the set that it is given, and once more from what the
linear relaxation rounds to, whose value is a bound.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Indices = NDArray[np.intp]

_EXACT = 1e-9  # a gap below this is rounding
_CLOSE = 1e-6  # the relaxation ends at a gap of this, relatively
_BLOCK = 256
_TINY = 12  # a block of which all subsets are tried
_REST = 8  # rounds for which the things of a block that gave nothing stay as they are
_FAILURES = 12  # blocks in a row that give nothing: the descent is over
_LITTLE = 1e-4  # a block that gains less, relatively, counts as one that gives nothing
_LAST = 40  # small blocks that are tried in the end
_RELAXED = 200  # corners of the relaxation
_CORRECTIONS = 200  # moves between them before the next one
_SHARE = 0.6  # of the time, after which the relaxation ends


class SelectionError(ValueError):
    """A problem that makes no sense; the message says what to change."""


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The cost of a set, and how many are to be taken.

    Attributes:
        linear: [things], cost of each.
        factors: [rows, things], of floating type.
        offset: [rows].
        groups: [things], the group of each, counted from 0.
        counts: [groups], how many are taken of each.
    """

    linear: Floats
    factors: NDArray[np.floating]
    offset: Floats
    groups: NDArray[np.intp]
    counts: NDArray[np.intp]

    def __post_init__(self) -> None:
        """Checks sizes, finiteness and counts."""
        things = len(self.linear)
        if self.factors.shape != (len(self.offset), things) or len(self.groups) != things:
            raise SelectionError("linear, factors, offset and groups have sizes that don't fit")
        if not all(np.isfinite(a).all() for a in (self.linear, self.factors, self.offset)):
            raise SelectionError("costs must be finite")
        if things and not 0 <= self.groups.min() <= self.groups.max() < len(self.counts):
            raise SelectionError("a group without a count")
        sizes = np.bincount(self.groups, minlength=len(self.counts))
        if (self.counts < 0).any() or (self.counts > sizes).any():
            raise SelectionError("a group of which more are to be taken than it has")

    @cached_property
    def diagonal(self) -> Floats:
        """What each thing adds to the quadratic part with itself."""
        return np.einsum("ri,ri->i", self.factors, self.factors, dtype=np.float64)

    def state(self, taken: NDArray[Any]) -> Floats:
        """``offset + factors z``; z may be a mask or shares."""
        if taken.dtype == np.bool_:
            return self.offset + self.factors[:, taken].sum(1, dtype=np.float64)
        return self.offset + self.factors @ taken.astype(self.factors.dtype)

    def cost(self, taken: NDArray[Any]) -> float:
        """The objective."""
        state = self.state(taken)
        return float(self.linear @ taken + state @ state / 2)

    def slopes(self, state: Floats) -> Floats:
        """The objective's derivative."""
        return self.linear + state.astype(self.factors.dtype) @ self.factors

    def cheapest(self, costs: Floats) -> Mask:
        """The things of each group that cost least, as many as are asked for."""
        order = np.lexsort((costs, self.groups))
        starts = np.searchsorted(self.groups[order], np.arange(len(self.counts)))
        rank = np.arange(len(order)) - starts[self.groups[order]]
        taken = np.zeros(len(order), bool)
        taken[order[rank < self.counts[self.groups[order]]]] = True
        return taken


@dataclass(frozen=True, eq=False)
class Selection:
    """A set and what is proven about it.

    Attributes:
        taken: [things], bool.
        cost: its cost.
        start: the cost of the set that the search began with.
        bound: no set of these counts costs less.
        gap: cost - bound.
        status: "optimal" (the gap is rounding) or "feasible".
        blocks: how many blocks were solved.
        seconds: time used.
    """

    taken: Mask
    cost: float
    start: float
    bound: float
    gap: float
    status: str
    blocks: int
    seconds: float


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
        run.descend(_TINY if len(start) <= _TINY else _BLOCK)
        if run.proven:
            return run.selection(run.cost)
        bound, rounded = relaxed(problem, run.taken, lambda: run.late(_SHARE))
        run.restart(rounded)
        run.descend(_BLOCK)
        run.left = min(run.left, _LAST)
        run.descend(_TINY)
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
            if len(block) == len(self.taken) <= _TINY:
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
        solve = _exhausted if len(block) <= _TINY else _swapped
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


def _swapped(linear: Floats, quadratic: Floats, groups: NDArray[np.intp], start: Mask) -> Mask:
    """Swaps within groups, the best one first, until none makes the block cheaper."""
    taken = start.copy()
    slopes = linear + quadratic @ taken
    half = np.diagonal(quadratic) / 2
    allowed = groups[:, None] == groups
    scale = float(np.abs(linear).max() + half.max())
    for _ in range(4 * len(taken)):
        out, into = np.flatnonzero(taken), np.flatnonzero(~taken)
        change = (half[out] - slopes[out])[:, None] + (half[into] + slopes[into])
        change -= quadratic[np.ix_(out, into)]
        change[~allowed[np.ix_(out, into)]] = np.inf
        place = int(np.argmin(change)) if change.size else -1
        if place < 0 or not change.ravel()[place] < -1e-12 * scale:
            break
        i, j = out[place // len(into)], into[place % len(into)]
        taken[i], taken[j] = False, True
        slopes += quadratic[:, j] - quadratic[:, i]
    return taken


def _exhausted(linear: Floats, quadratic: Floats, groups: NDArray[np.intp], start: Mask) -> Mask:
    """The best of all subsets with as many of each group as the block has."""
    count = len(start)
    every = _subsets(count)
    for group in np.unique(groups):
        inside = groups == group
        every = every[every[:, inside].sum(1) == start[inside].sum()]
    shares = every.astype(np.float64)
    costs = shares @ linear + np.einsum("si,si->s", shares @ quadratic, shares) / 2
    best = int(np.argmin(costs))
    now = start.astype(np.float64)
    return every[best] if costs[best] < now @ linear + now @ quadratic @ now / 2 else start


@lru_cache(maxsize=_TINY + 1)
def _subsets(count: int) -> Mask:
    return (np.arange(1 << count)[:, None] >> np.arange(count) & 1).astype(bool)


def relaxed(
    problem: Quadratic, start: Mask, late: Callable[[], bool] = lambda: False
) -> tuple[float, Mask]:
    """The linear relaxation: a lower bound, and the set that its solution rounds to.

    Frank and Wolfe's method, fully corrective: among all mixtures of the corners met so far the
    best one is found before the next corner is looked for.  The bound is the best value less the
    duality gap that is left.

    Args:
        problem: the problem.
        start: a set of the counts asked for, the first corner.
        late: asked before each step whether to end.
    """
    mixture, bound, corner = _Mixture(), -math.inf, start
    packed: list[NDArray[np.uint8]] = []
    for _ in range(_RELAXED):
        packed.append(np.packbits(corner))
        mixture.add(problem.state(corner), float(problem.linear @ corner))
        mixture.correct()
        slopes = problem.slopes(mixture.state)
        corner = problem.cheapest(slopes)
        # The tangent at the mixture lies below the objective everywhere.
        square = float(mixture.state @ mixture.state)
        lowest = float(slopes @ corner) + float(mixture.state @ problem.offset) - square / 2
        bound = max(bound, lowest)
        if late() or mixture.value - bound <= _CLOSE * abs(mixture.value):
            break
    shares = np.zeros(len(start))
    for share, bits in zip(mixture.shares, packed, strict=True):
        shares += share * np.unpackbits(bits, count=len(start))
    return bound, problem.cheapest(-shares)


class _Mixture:
    """Shares of corners of a relaxation, and the state that they mix to."""

    def __init__(self) -> None:
        self.states: list[Floats] = []
        self.linear: list[float] = []
        self.shares: Floats = np.zeros(0)
        self.gram: Floats = np.zeros((0, 0))

    def add(self, state: Floats, linear: float) -> None:
        """One corner more, of no share unless it is the first."""
        self.states.append(state)
        self.linear.append(linear)
        products = np.stack(self.states) @ state
        count = len(self.states)
        gram = np.zeros((count, count))
        gram[:-1, :-1] = self.gram
        gram[-1] = gram[:, -1] = products
        self.gram = gram
        self.shares = np.append(self.shares, float(count == 1))

    def correct(self) -> None:
        """Moves shares from the corner that costs most to the one that costs least, exactly."""
        linear = np.array(self.linear)
        slopes = linear + self.gram @ self.shares
        for _ in range(_CORRECTIONS):
            held = np.flatnonzero(self.shares > 0)
            to, out = int(np.argmin(slopes)), int(held[np.argmax(slopes[held])])
            better = float(slopes[out] - slopes[to])
            if better <= _EXACT * float(np.abs(slopes).max()):
                break
            curvature = float(self.gram[to, to] + self.gram[out, out] - 2 * self.gram[to, out])
            part = float(self.shares[out])
            moved = min(part, better / curvature) if curvature > 0 else part
            self.shares[to] += moved
            self.shares[out] = 0.0 if moved == part else part - moved
            slopes += moved * (self.gram[to] - self.gram[out])

    @property
    def state(self) -> Floats:
        """The state of the mixture."""
        return self.shares @ np.stack(self.states)

    @property
    def value(self) -> float:
        """The objective of the mixture."""
        return float(self.shares @ np.array(self.linear)) + float(self.state @ self.state) / 2
