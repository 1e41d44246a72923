"""How many weights of each layer survive: the least loss within a number of survivors.

A multiple choice knapsack: for every layer one of its options, each of which keeps so many weights
and loses so much.  Losses need not be convex.  After the dynamic program
of Xu et al., "Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural
Networks" (ICCV 2023), whose table over the number of surviving weights is here a list of
undominated states, cut by the bound of the linear relaxation (Sinha and Zoltners, "The
multiple-choice knapsack problem", 1979), so that counts need no rounding and every answer has a
proven bound.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_EXACT = 1e-9  # a gap below this is rounding
_FEWER = 2_000  # states that are followed when the time is up


class SurvivalError(ValueError):
    """A problem that makes no sense; the message says what to change."""


@dataclass(frozen=True)
class Layer:
    """A layer and what may be left of it.

    Attributes:
        name: for people to read.
        kept: weights that survive, by option, at least 0, no two the same.
        losses: what each option loses, in any unit, finite and not negative.
    """

    name: str
    kept: tuple[int, ...]
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        """Checks that there are options, and their numbers."""
        if not self.kept or len(self.kept) != len(self.losses):
            raise SurvivalError(f"{self.name}: as many losses as options, and at least one")
        if min(self.kept) < 0 or len(set(self.kept)) < len(self.kept):
            raise SurvivalError(f"{self.name}: counts must be distinct and not negative")
        if not all(math.isfinite(loss) and loss >= 0 for loss in self.losses):
            raise SurvivalError(f"{self.name}: losses must be finite and not negative")


@dataclass(frozen=True)
class Survival:
    """An option for every layer and what is proven about them.

    Attributes:
        options: index of the option, by layer. If "infeasible": those that keep the fewest.
        kept: weights that survive, by layer.
        loss: sum of the losses.
        bound: no choice within the limit loses less. If "infeasible": the loss.
        gap: (loss - bound) / loss; inf if "infeasible".
        status: "optimal" (gap below 1e-9), "feasible", or "infeasible" (proven: `kept` sums to the
            smallest possible limit).
        seconds: time used.
    """

    options: tuple[int, ...]
    kept: tuple[int, ...]
    loss: float
    bound: float
    gap: float
    status: str
    seconds: float


OnProgress = Callable[[Survival], None]


def survive(
    layers: Sequence[Layer],
    limit: int,
    *,
    time_limit: float = 30.0,
    states: int = 100_000,
    progress: OnProgress | None = None,
) -> Survival:
    """The options that lose least while no more than `limit` weights survive.

    Args:
        layers: the layers.
        limit: most weights that may survive in all layers together.
        time_limit: seconds; when they are over, few states are followed to the end.
        states: most states that are followed; where there are more, those of the best bounds are,
            and what the others could still reach limits what is proven.
        progress: called with the answer as it stands before the search and after it. An interrupt
            (Ctrl-C) ends the work, and what was found until then is returned.

    Raises:
        SurvivalError: a limit on time or states that makes no sense.
    """
    if not (time_limit > 0 and states >= 1):
        raise SurvivalError("time_limit must be positive and states at least 1")
    run = _Run([_Options(layer) for layer in layers], limit, time_limit, states)
    if not run.feasible:
        return run.answer()
    run.greedy()
    if progress:
        progress(run.answer())
    with contextlib.suppress(KeyboardInterrupt):
        run.search()
        if progress:
            progress(run.answer())
    return run.answer()


class _Options:
    """The options of a layer that no other one dominates, and the convex hull below them."""

    def __init__(self, layer: Layer) -> None:
        order = sorted(range(len(layer.kept)), key=lambda i: layer.kept[i])
        self.index: list[int] = []
        for i in order:
            if not self.index or layer.losses[i] < layer.losses[self.index[-1]]:
                self.index.append(i)
        self.layer = layer
        self.kept: Ints = np.array([layer.kept[i] for i in self.index], np.int64)
        self.losses: Floats = np.array([layer.losses[i] for i in self.index], np.float64)
        self.hull = self._hull()

    def _hull(self) -> list[int]:
        hull: list[int] = []
        for i in range(len(self.kept)):
            while len(hull) > 1 and self.slope(hull[-2], i) <= self.slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(i)
        return hull

    def slope(self, i: int, j: int) -> float:
        """Loss per weight more, between two options: negative."""
        return float(self.losses[j] - self.losses[i]) / int(self.kept[j] - self.kept[i])


@dataclass(frozen=True)
class _Relaxed:
    """The least loss of some layers by the linear relaxation, as a function of the limit.

    Attributes:
        least: the fewest weights that they keep.
        counts: corners of that convex function, rising.
        losses: its values there, falling.
    """

    least: int
    counts: Floats
    losses: Floats

    @classmethod
    def of(cls, layers: Sequence[_Options]) -> _Relaxed:
        steps = sorted(
            (o.slope(i, j), int(o.kept[j] - o.kept[i]), float(o.losses[j] - o.losses[i]))
            for o in layers
            for i, j in zip(o.hull, o.hull[1:], strict=False)
        )
        least = sum(int(o.kept[0]) for o in layers)
        start = math.fsum(float(o.losses[0]) for o in layers)
        counts = np.cumsum([least, *(count for _, count, _ in steps)], dtype=np.float64)
        losses = np.cumsum([start, *(loss for *_, loss in steps)], dtype=np.float64)
        return cls(least, counts, losses)

    def at(self, limits: NDArray[np.int64]) -> Floats:
        """A lower bound for each limit; inf where nothing fits."""
        found = np.interp(limits, self.counts, self.losses)
        return np.where(limits < self.least, np.inf, found)


class _Run:
    """One call: the incumbent, and the states that might still beat it."""

    def __init__(self, layers: list[_Options], limit: int, time_limit: float, states: int) -> None:
        self.began = time.perf_counter()
        self.limit, self.time_limit, self.states = limit, time_limit, states
        self.layers = layers
        # The largest first: what is left for the small ones then fits nearly any limit.
        self.order = sorted(range(len(layers)), key=lambda i: -int(layers[i].kept[-1]))
        ordered = [layers[i] for i in self.order]
        self.rest = [_Relaxed.of(ordered[i:]) for i in range(len(layers) + 1)]
        self.best = [0] * len(layers)
        self.feasible = self.rest[0].least <= limit
        self.loss = self._loss(self.best)
        relaxed = float(self.rest[0].at(np.array([limit], np.int64))[0])
        self.bound = max(0.0, min(relaxed, self.loss)) if self.feasible else self.loss

    def greedy(self) -> None:
        """Steps of the hulls, the steepest first, as far as they fit."""
        position = [0] * len(self.layers)
        left = self.limit - self.rest[0].least
        steps = sorted(
            (o.slope(i, j), number, place)
            for number, o in enumerate(self.layers)
            for place, (i, j) in enumerate(zip(o.hull, o.hull[1:], strict=False))
        )
        for _, number, place in steps:
            options = self.layers[number]
            more = int(options.kept[options.hull[place + 1]] - options.kept[options.hull[place]])
            if position[number] == place and more <= left:
                position[number] += 1
                left -= more
        chosen = [o.hull[p] for o, p in zip(self.layers, position, strict=True)]
        for number, options in enumerate(self.layers):  # options beside the hull use up the rest
            now = int(options.kept[chosen[number]])
            fits = int(np.searchsorted(options.kept, now + left, side="right")) - 1
            left -= int(options.kept[fits]) - now
            chosen[number] = fits
        self._offer(chosen)

    def search(self) -> None:
        """Follows all undominated states that might beat the incumbent."""
        kept, loss = np.zeros(1, np.int64), np.zeros(1)
        steps: list[tuple[NDArray[np.intp], NDArray[np.intp]]] = []
        missed = math.inf
        for place, number in enumerate(self.order):
            kept, loss, parents, options, dropped = self._extended(
                kept, loss, self.layers[number], self.rest[place + 1]
            )
            steps.append((parents, options))
            missed = min(missed, dropped)
        if len(loss):
            self._offer(self._traced(steps, int(np.argmin(loss))))
        self.bound = max(self.bound, min(self.loss, missed))

    def _extended(
        self, kept: Ints, loss: Floats, options: _Options, rest: _Relaxed
    ) -> tuple[Ints, Floats, NDArray[np.intp], NDArray[np.intp], float]:
        """All states with one layer more, and the best bound among those that are given up."""
        parents, chosen = np.indices((len(kept), len(options.kept))).reshape(2, -1)
        kept = (kept[:, None] + options.kept).ravel()
        loss = (loss[:, None] + options.losses).ravel()
        bound = loss + rest.at(self.limit - kept)
        order = np.lexsort((loss, kept))
        order = order[bound[order] < self.loss]
        lowest = np.minimum.accumulate(np.concatenate([[np.inf], loss[order]]))
        order = order[loss[order] < lowest[:-1]]
        late = time.perf_counter() - self.began > self.time_limit
        most = min(self.states, _FEWER) if late else self.states
        dropped = math.inf
        if len(order) > most:
            ranked = np.argpartition(bound[order], most)
            dropped = float(bound[order[ranked[most:]]].min())
            order = order[np.sort(ranked[:most])]
        return kept[order], loss[order], parents[order], chosen[order], dropped

    def _traced(
        self, steps: Sequence[tuple[NDArray[np.intp], NDArray[np.intp]]], state: int
    ) -> list[int]:
        """The options that led to a state."""
        chosen = [0] * len(self.layers)
        for number, (parents, options) in zip(reversed(self.order), reversed(steps), strict=True):
            chosen[number] = int(options[state])
            state = int(parents[state])
        return chosen

    def _loss(self, chosen: Sequence[int]) -> float:
        return math.fsum(float(o.losses[i]) for o, i in zip(self.layers, chosen, strict=True))

    def _offer(self, chosen: list[int]) -> None:
        loss = self._loss(chosen)
        if loss < self.loss:
            self.best, self.loss = chosen, loss

    def answer(self) -> Survival:
        """The answer as it stands."""
        bound = min(self.bound, self.loss)
        gap = (self.loss - bound) / self.loss if self.loss > 0 else 0.0
        status = "optimal" if gap <= _EXACT else "feasible"
        return Survival(
            options=tuple(o.index[i] for o, i in zip(self.layers, self.best, strict=True)),
            kept=tuple(int(o.kept[i]) for o, i in zip(self.layers, self.best, strict=True)),
            loss=self.loss,
            bound=bound,
            gap=gap if self.feasible else math.inf,
            status=status if self.feasible else "infeasible",
            seconds=time.perf_counter() - self.began,
        )
