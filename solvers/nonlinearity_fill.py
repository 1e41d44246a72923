"""Spending what the limits leave on the groups with the most damage per share of the limits."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from graphopt.solvers.nonlinearity_table import NOTHING, Choice, Mode, Pick, Table, Use

Menu = list[list[Mode]]  # the modes allowed, by block

_MANY = 256  # groups of a mode from which on they are not added one by one
_HALVINGS = 60


def shares(table: Table) -> list[float]:
    """Prices under which every whole limit costs 1."""
    pairs = zip(table.limits, table.limited, strict=True)
    return [1.0 / max(limit, 0.5) if limited else 0.0 for limit, limited in pairs]


def replaced(used: Use, before: Pick, after: Pick) -> Use:
    """The use after one pick is replaced by another."""
    old, new = before[0].use(before[1]), after[0].use(after[1])
    return (used[0] + new[0] - old[0], used[1] + new[1] - old[1], used[2] + new[2] - old[2])


def fill(table: Table, choice: Choice, menu: Menu) -> Choice:
    """Keeps more groups, those with the most damage per share of the limits first.

    Args:
        table: the problem.
        choice: within the limits.
        menu: modes that may be chosen.
    """
    filling = _Filling(table, choice, menu)
    filling.run()
    return tuple(filling.picks)


class _Filling:
    """The picks as they grow.

    A queue holds every block's next step with what it gains per share of the limits. Steps within
    modes that come before the first change of a mode are taken in bulk.
    """

    def __init__(self, table: Table, choice: Choice, menu: Menu) -> None:
        self.table, self.menu, self.prices = table, menu, shares(table)
        self.picks, self.used = list(choice), table.used(choice)
        self.queue: list[tuple[float, int]] = []
        self.stuck: set[int] = set()  # blocks whose next step doesn't fit

    def run(self) -> None:
        """Takes steps until none fits."""
        self._bulk()
        while self.queue:
            _, b = heapq.heappop(self.queue)
            before = self.picks[b]
            if not self._step(b):
                self.stuck.add(b)
                if _changes(before, self.menu[b]) and self._many():
                    self._bulk()
                continue
            mode = self.picks[b][0]
            if mode is not before[0] and mode.high - mode.low >= _MANY:
                self._bulk()
            elif entry := _entry(b, self.picks[b], self.menu[b], self.prices):
                heapq.heappush(self.queue, entry)

    def _many(self) -> bool:
        return any(self.picks[b][0].high - self.picks[b][1] >= _MANY for _, b in self.queue)

    def _step(self, b: int) -> bool:
        pick, worth = self.picks[b], -self.queue[0][0] if self.queue else 0.0
        after = _grown(self.table, pick, self.menu[b], self.used, self.prices, worth)
        if after is None:
            return False
        trial = (*self.picks[:b], after, *self.picks[b + 1 :])
        if after[0].levels != pick[0].levels and not self.table.shallow(trial):
            return False
        self.picks[b], self.used = after, replaced(self.used, pick, after)
        return True

    def _bulk(self) -> None:
        """Takes all steps within modes that gain more than any change of a mode would."""
        floor = 0.0
        for b, (pick, modes) in enumerate(zip(self.picks, self.menu, strict=True)):
            entry = _entry(b, pick, modes, self.prices)
            if entry and b not in self.stuck and _changes(pick, modes):
                floor = max(floor, -entry[0])
        if math.isfinite(floor):
            self._advance(floor)
        entries = (
            _entry(b, pick, modes, self.prices)
            for b, (pick, modes) in enumerate(zip(self.picks, self.menu, strict=True))
            if b not in self.stuck
        )
        self.queue = [entry for entry in entries if entry]
        heapq.heapify(self.queue)

    def _advance(self, floor: float) -> None:
        """Goes down to the lowest worth per share, not below `floor`, that fits."""
        high = 2 * max((-entry[0] for entry in map(self._entry_of, range(len(self.picks))) if entry
                        and math.isfinite(entry[0])), default=0.0)  # fmt: skip
        low = floor
        if high <= low or self._take(low):
            return
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            if not low < middle < high:
                break
            low, high = (low, middle) if self._fits(middle) else (middle, high)
        self._take(high)

    def _entry_of(self, b: int) -> tuple[float, int] | None:
        return _entry(b, self.picks[b], self.menu[b], self.prices)

    def _at(self, worth: float) -> list[Pick]:
        """Every mode with all groups that are worth more per share."""
        found = []
        for mode, kept in self.picks:
            each = mode.each(self.prices)
            if mode.curve and kept < mode.high and each > 0:
                kept = min(max(kept, mode.curve.above(worth * each)), mode.high)
            found.append((mode, kept))
        return found

    def _fits(self, worth: float) -> bool:
        return self.table.within(self.table.used(tuple(self._at(worth))))

    def _take(self, worth: float) -> bool:
        picks = self._at(worth)
        used = self.table.used(tuple(picks))
        if not self.table.within(used):
            return False
        self.picks, self.used = picks, used
        return True


def _changes(pick: Pick, modes: list[Mode]) -> bool:
    """Whether the next step would be to another mode."""
    after = _next(pick, modes)
    return after is not None and after[0] is not pick[0]


def _next(pick: Pick, modes: list[Mode]) -> Pick | None:
    """One step up: another group, or another mode with the same option or without any."""
    mode, kept = pick
    if mode.option is None:
        return None
    if kept < mode.high:
        return mode, kept + 1
    for other in modes:
        if other.option == mode.option and other.low > kept:
            return other, other.low
    return next(((other, other.low) for other in modes if other.option is None), None)


def _entry(b: int, pick: Pick, modes: Menu, prices: Sequence[float]) -> tuple[float, int] | None:
    """Minus the damage a step up saves per share of the limits; None if it saves nothing."""
    after = _next(pick, modes)
    gain = pick[0].damage(pick[1]) - after[0].damage(after[1]) if after else 0.0
    if after is None or gain <= 0:
        return None
    change = replaced(NOTHING, pick, after)
    price = sum(p * c for p, c in zip(prices, change, strict=True))
    return (-gain / price if price > 0 else -math.inf), b


def _grown(
    table: Table, pick: Pick, modes: list[Mode], used: Use, prices: Sequence[float], worth: float
) -> Pick | None:
    """A step up, or as many at once as fit and are worth at least so much; None if none fits."""
    after = _next(pick, modes)
    if after is None or not table.within(replaced(used, pick, after)):
        return None
    mode, kept = pick
    if after[0] is not mode or mode.curve is None:
        return after
    most = min(mode.high, kept + _room(table, mode, used))
    each = mode.each(prices)
    wanted = mode.curve.at_least(worth * each) if each > 0 and math.isfinite(worth) else kept + 1
    if mode.curve.next(kept) > 0:
        wanted = min(wanted, mode.curve.above(0.0))
    return mode, max(kept + 1, min(most, wanted))


def _room(table: Table, mode: Mode, used: Use) -> int:
    """Groups that may be kept besides."""
    room = [
        (limit - use) // unit
        for limit, use, unit in zip(table.limits, used, mode.unit, strict=True)
        if unit > 0
    ]
    return min(room, default=mode.high)
