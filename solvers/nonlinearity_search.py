"""Selections of non-linearities found by prices, by filling what is left, and by local search."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.solvers.nonlinearity_fill import Menu, fill, replaced, shares
from graphopt.solvers.nonlinearity_table import NOTHING, Choice, Mode, Pick, Table, Use

_DOUBLINGS = 200
_HALVINGS = 60


def greedy(table: Table) -> Choice | None:
    """Keeps what has the most damage per share of the limits; None if that exceeds one.

    With one limit on elements of one size and one option a site, this is the best selection.
    """
    menu = shallow_menu(table)
    if menu is None:
        return None
    found = by_price(table, menu, shares(table))
    return fill(table, found, menu) if found else None


def shallow_menu(table: Table) -> Menu | None:
    """Modes that keep every path short enough in any combination; None if none were found.

    While a path is too long, the site on it gives up its deepest modes that loses the least
    damage for every level.
    """
    menu: Menu = [list(block.modes) for block in table.blocks]
    most = table.problem.max_depth
    if most is None:
        return menu
    home = {site: b for b, block in enumerate(table.blocks) for site in block.members}
    while True:
        levels = _caps(table, menu)
        if table.paths.depth(levels) <= most:
            return menu
        ways = [
            (cost, b, modes)
            for b in sorted({home[site] for site in table.paths.longest(levels)})
            for cost, modes in [_lowered(menu[b])]
            if modes
        ]
        if not ways:
            return None
        _, b, menu[b] = min(ways, key=lambda way: way[:2])


def _caps(table: Table, menu: Menu) -> list[int]:
    """Most levels of any mode allowed, by site."""
    caps = [0] * len(table.problem.sites)
    for block, modes in zip(table.blocks, menu, strict=True):
        for i, site in enumerate(block.members):
            caps[site] = max(mode.levels[i] for mode in modes)
    return caps


def _lowered(modes: list[Mode]) -> tuple[float, list[Mode]]:
    """The modes below the deepest, and the damage that costs a level."""
    depths = [max(mode.levels) for mode in modes]
    rest = [mode for mode, depth in zip(modes, depths, strict=True) if depth < max(depths)]
    if not rest:
        return math.inf, []
    saved = max(depths) - max(max(mode.levels) for mode in rest)
    lost = min(m.damage(m.high) for m in rest) - min(m.damage(m.high) for m in modes)
    return lost / saved, rest


def priced(menu: Menu, prices: Sequence[float]) -> Choice:
    """The best pick of every block under prices of what it uses."""
    return tuple(_priced(modes, prices) for modes in menu)


def _priced(modes: list[Mode], prices: Sequence[float]) -> Pick:
    best, pick = math.inf, (modes[0], modes[0].high)
    for mode in modes:
        total, kept = mode.best(prices)
        if total < best:
            best, pick = total, (mode, kept)
    return pick


def by_price(table: Table, menu: Menu, direction: Sequence[float]) -> Choice | None:
    """The choice under the lowest prices in a direction that keeps all limits but the depth."""

    def at(scale: float) -> Choice | None:
        choice = priced(menu, [scale * price for price in direction])
        return choice if table.within(table.used(choice)) else None

    found = at(0.0)
    low, high = 0.0, 1e-9 * (1.0 + sum(_largest(modes) for modes in menu))
    for _ in range(_DOUBLINGS):
        if found:
            break
        found = at(high)
        low, high = (low, high) if found else (high, 4 * high)
    if found is None or low == 0.0 == high:
        return found
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        better = at(middle)
        found, low, high = (better, low, middle) if better else (found, middle, high)
    return found


def settled(table: Table, choice: Choice, direction: Sequence[float]) -> Choice:
    """The best numbers of groups for the modes of a choice, as far as prices alone find them.

    Prices jump over what lies between two modes; within one there is nothing to jump over.
    """
    found = by_price(table, [[mode] for mode, _ in choice], direction)
    return found if found and table.damage(found) < table.damage(choice) else choice


def _largest(modes: list[Mode]) -> float:
    return max(mode.damage(mode.high) for mode in modes)


def polish(
    table: Table, choice: Choice, menu: Menu, over: Callable[[], bool] = lambda: False
) -> Choice:
    """Gives every block in turn the best pick that what the others leave allows, until none helps.

    Args:
        table: the problem.
        choice: within the limits.
        menu: modes that may be chosen.
        over: whether to stop.
    """
    picks, improved = list(choice), True
    while improved and not over():
        improved = False
        used = table.used(tuple(picks))
        for b, modes in enumerate(menu):
            pick = picks[b]
            least = pick[0].damage(pick[1])
            for after in _candidates(table, modes, pick, used):
                if not after[0].damage(after[1]) < least:
                    continue
                trial = (*picks[:b], after, *picks[b + 1 :])
                if after[0].levels == picks[b][0].levels or table.shallow(trial):
                    used = replaced(used, picks[b], after)
                    picks[b], least, improved = after, after[0].damage(after[1]), True
    return tuple(picks)


def _candidates(table: Table, modes: list[Mode], pick: Pick, used: Use) -> list[Pick]:
    """By mode, the most groups kept that fit beside the other blocks."""
    rest = replaced(used, pick, _EMPTY)
    found = []
    for mode in modes:
        kept = _most_within(table, mode, rest)
        if kept is not None:
            found.append((mode, kept))
    return found


_EMPTY: Pick = (Mode(-1, None, None, 0, 0, NOTHING, NOTHING, ()), 0)


def _most_within(table: Table, mode: Mode, rest: Use) -> int | None:
    low, high = mode.low, mode.high
    for limit, other, base, unit in zip(table.limits, rest, mode.base, mode.unit, strict=True):
        room = limit - other - base
        if unit > 0:
            high = min(high, room // unit)
        elif unit < 0:
            low = max(low, -(room // -unit))
        elif room < 0:
            return None
    if low > high:
        return None
    return min(high, max(low, mode.curve.above(0.0))) if mode.curve else high
