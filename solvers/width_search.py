"""Allocations by greedy rules and their repair: fast, good, without proof."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from graphopt.solvers.width_table import Choice, Floats, WidthTable

# The first pass narrows a dimension by this share of its remaining widths at a time.
_CHUNKS = 64
_ROUNDING = 1e-9
# Allocations that use so much of a limit are left as they are; others are exchanged by so much.
_SPENT, _EXCHANGES = 0.985, (-3, -2, -1, 1, 2, 3)

# What makes widening a dimension attractive: (table, choice, positions to go to, changes).
Preference = Callable[[WidthTable, Choice, Choice, Floats], Floats]


def shrink(table: WidthTable, choice: Choice, locked: int | None = None) -> Choice | None:
    """Narrows until every limit is met, each time where the least value is lost per cost saved.

    Args:
        table: the problem.
        choice: where to begin.
        locked: a dimension that keeps its width.

    Returns:
        None if the limits can't be met.
    """
    choice = choice.copy()
    while not table.fits(choice):
        to = choice - np.maximum(1, choice // _CHUNKS)
        movable = to >= 0
        if locked is not None:
            movable[locked] = False
        if not movable.any():
            return None
        to = np.maximum(to, 0)
        excess = np.maximum(table.used(choice) - 1, _ROUNDING)
        saved = -(excess @ table.changes(choice, to))
        lost = table.value[table.rows, choice] - table.value[table.rows, to]
        useful = movable & (saved > 0)
        if not useful.any():
            return None
        ratio = np.where(useful, (lost + 1e-15) / np.where(useful, saved, 1.0), np.inf)
        d = int(ratio.argmin())
        choice[d] = to[d]
    return choice


def value_per_cost(table: WidthTable, choice: Choice, to: Choice, changes: Floats) -> Floats:
    """Value gained for the part of what is left that it takes."""
    left = np.maximum(1 - table.used(choice), _ROUNDING)
    gained = table.value[table.rows, to] - table.value[table.rows, choice]
    return (gained + 1e-15) / ((changes / left[:, None]).sum(axis=0) + 1e-15)


def next_gain(table: WidthTable, choice: Choice, to: Choice, changes: Floats) -> Floats:
    """Value of the next unit, whatever it costs."""
    gained = table.value[table.rows, to] - table.value[table.rows, choice]
    widths = table.width[table.rows, to] - table.width[table.rows, choice]
    return gained / np.maximum(widths, 1)


def least_share(table: WidthTable, choice: Choice, to: Choice, changes: Floats) -> Floats:
    """Dimensions of which the smallest share is kept come first."""
    full = np.array([len(d.gains) for d in table.problem.dimensions])
    return -table.width[table.rows, choice] / full


def fill(
    table: WidthTable,
    choice: Choice,
    preference: Preference = value_per_cost,
    locked: int | None = None,
) -> Choice:
    """Widens one dimension at a time, the preferred one, until nothing fits any more.

    Args:
        table: the problem.
        choice: where to begin, within the limits.
        preference: which dimension comes first.
        locked: a dimension that keeps its width.
    """
    choice = choice.copy()
    closed = choice >= table.last
    if locked is not None:
        closed[locked] = True
    while not closed.all():
        to = np.minimum(choice + 1, table.last)
        changes = table.changes(choice, to)
        left = 1 - table.used(choice)
        closed |= (changes > left[:, None] + _ROUNDING).any(axis=0)  # costs only rise from here
        score = np.where(closed, -np.inf, preference(table, choice, to, changes))
        d = int(score.argmax())
        if closed[d]:
            break
        choice[d] += 1
        if not table.fits(choice):
            choice[d] -= 1
            closed[d] = True
        closed[d] |= choice[d] >= table.last[d]
    return choice


def greedy(table: WidthTable) -> Choice | None:
    """From full widths, `shrink`, then `fill`."""
    found = shrink(table, table.last)
    return None if found is None else fill(table, found)


def same_share(table: WidthTable) -> Choice:
    """The largest share of every dimension within the limits, then `fill`; least must fit."""
    full = np.array([len(d.gains) for d in table.problem.dimensions])
    shares = np.unique(np.concatenate(_rows(table, table.width / full[:, None])))

    def at(share: float) -> Choice:
        allowed = [
            int(np.searchsorted(table.width[d, : last + 1], share * n + _ROUNDING, "right")) - 1
            for d, (n, last) in enumerate(zip(full, table.last, strict=True))
        ]
        return np.maximum(np.array(allowed, np.int64), 0)

    return fill(table, _last_fitting(table, shares, at), least_share)


def above_threshold(table: WidthTable) -> Choice:
    """Units above one gain, the lowest within the limits, then `fill`; least must fit."""
    gains = [np.array(dimension.gains) for dimension in table.problem.dimensions]
    thresholds = np.unique(np.concatenate([*gains, [-1.0]]))[::-1]

    def at(threshold: float) -> Choice:
        kept = [int(np.searchsorted(-gain, -threshold, "left")) for gain in gains]
        allowed = [
            int(np.searchsorted(table.width[d, : table.last[d] + 1], count, "right")) - 1
            for d, count in enumerate(kept)
        ]
        return np.maximum(np.array(allowed, np.int64), 0)

    return fill(table, _last_fitting(table, thresholds, at), next_gain)


def _rows(table: WidthTable, values: Floats) -> list[Floats]:
    """Rows without their padding."""
    return [row[: last + 1] for row, last in zip(values, table.last, strict=True)]


def _last_fitting(table: WidthTable, values: Floats, at: Callable[[float], Choice]) -> Choice:
    """By bisection, the choice of the last value that meets the limits; the least, if none."""
    low, high = 0, len(values)  # values before `low` fit, those from `high` on don't
    best = np.zeros_like(table.last)
    while low < high:
        middle = (low + high) // 2
        choice = at(float(values[middle]))
        if table.fits(choice):
            best, low = choice, middle + 1
        else:
            high = middle
    return best


def polish(table: WidthTable, choice: Choice, over: Callable[[], bool]) -> Choice:
    """Moves single dimensions, repairs the rest, and keeps what is better, until nothing is.

    Args:
        table: the problem.
        choice: where to begin, within the limits.
        over: asked between moves whether to stop.
    """
    best, worth = choice, table.worth(choice)
    better = True
    while better:
        better = False
        for d in range(len(choice)):
            for by in (-8, -3, -1, 1, 3, 8):
                if over():
                    return best
                found = _moved(table, best, d, by)
                if found is not None and table.worth(found) > worth + 1e-12:
                    best, worth, better = found, table.worth(found), True
    return best


def spend(table: WidthTable, choice: Choice) -> Choice:
    """Exchanges a few units for others while much of every limit is left.

    Filling alone stops where the next unit of each dimension is too dear, as whole heads are; a
    head less may leave room for more of each.

    Args:
        table: the problem.
        choice: where to begin, within the limits.
    """

    def use(choice: Choice) -> float:
        return float(table.used(choice).max(initial=0.0))

    def rank(choice: Choice) -> tuple[float, float]:
        return min(use(choice), _SPENT), table.worth(choice)

    while len(table.shares) and use(choice) < _SPENT:
        moves = (_moved(table, choice, d, by) for d in range(len(choice)) for by in _EXCHANGES)
        best = max((found for found in moves if found is not None), key=rank, default=choice)
        if use(best) <= use(choice) + _ROUNDING:
            break
        choice = best
    return choice


def _moved(table: WidthTable, choice: Choice, d: int, by: int) -> Choice | None:
    """The choice with dimension d moved by some positions and the rest repaired and filled."""
    to = int(np.clip(choice[d] + by, 0, table.last[d]))
    if to == choice[d]:
        return None
    moved = choice.copy()
    moved[d] = to
    fitting = shrink(table, moved, locked=d)
    return None if fitting is None else fill(table, fitting, locked=d)
