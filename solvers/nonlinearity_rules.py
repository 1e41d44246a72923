"""Simple policies to compare with: groups kept at random, and whole sites replaced in an order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphopt.solvers.nonlinearity_fill import Menu
from graphopt.solvers.nonlinearity_search import shallow_menu
from graphopt.solvers.nonlinearity_table import Choice, Ints, Mode, Pick, Table

Kept = tuple[Ints, ...]


def in_order(table: Table, order: Sequence[int]) -> Choice | None:
    """Replaces whole blocks until everything fits; None if it never does.

    Args:
        table: the problem.
        order: of the sites.
    """
    home = {site: b for b, block in enumerate(table.blocks) for site in block.members}
    picks = [_whole(block.modes) for block in table.blocks]
    for b in dict.fromkeys(home[site] for site in order):
        if table.fits(tuple(picks)):
            break
        picks[b] = _least_damage(table.blocks[b].modes) or picks[b]
    return tuple(picks) if table.fits(tuple(picks)) else None


def _whole(modes: list[Mode]) -> Pick:
    """All kept, if that is possible."""
    kept = next((mode for mode in modes if mode.option is None), None)
    return (kept, kept.low) if kept else _least_damage(modes) or (modes[0], modes[0].low)


def _least_damage(modes: list[Mode]) -> Pick | None:
    """All replaced by the least damaging option; None if none may replace all."""
    picks = [(mode, 0) for mode in modes if mode.low == 0]
    return min(picks, key=lambda pick: (pick[0].damage(0), pick[0].use(0)[2]), default=None)


def randomly(table: Table, choice: Choice, seed: int) -> tuple[Choice, Kept] | None:
    """Keeps groups at random until a limit is reached; None if no number of them fits.

    Args:
        table: the problem.
        choice: gives the option of every block; one that keeps all there gets the least damaging.
        seed: of the choice.

    Returns:
        Modes with numbers of groups, and the groups kept by site, rising.
    """
    menu = shallow_menu(table) or [block.modes for block in table.blocks]
    ladder = [_ladder(modes, pick[0]) for modes, pick in zip(menu, choice, strict=True)]
    block, group, forced = _shuffled(table, ladder, seed)

    def at(chosen: Ints) -> Choice | None:
        counts = np.bincount(block[chosen], minlength=len(ladder))
        picks = [_rung(modes, int(count)) for modes, count in zip(ladder, counts, strict=True)]
        found = tuple(pick for pick in picks if pick)
        return found if len(found) == len(picks) and table.fits(found) else None

    chosen = _longest(at, forced, len(block))
    if chosen is None:
        return None
    chosen = _topped_up(table, at, chosen, block)
    found = at(chosen)
    assert found is not None
    kept: list[Ints] = [np.zeros(0, np.int64)] * len(table.problem.sites)
    for b, together in enumerate(table.blocks):
        for site in together.members:
            kept[site] = np.sort(group[chosen][block[chosen] == b])
    return found, tuple(kept)


def _ladder(modes: list[Mode], given: Mode) -> list[Mode]:
    """The modes of a block with the option given, or the least damaging; and all kept."""
    option = given.option
    if option is None and (least := _least_damage(modes)):
        option = least[0].option
    return [mode for mode in modes if mode.option in (option, None)]


def _rung(ladder: list[Mode], count: int) -> Pick | None:
    """The mode that keeps so many groups."""
    return next(((mode, count) for mode in ladder if mode.low <= count <= mode.high), None)


def _shuffled(table: Table, ladder: Menu, seed: int) -> tuple[Ints, Ints, int]:
    """Block and index of the groups that may be kept, in random order; how many must be."""
    random = np.random.default_rng(seed)
    least = [min(mode.low for mode in modes) for modes in ladder]
    shuffled = random.permutation(len(ladder)).tolist()
    room, parts = table.limits[1], []
    for b in sorted(shuffled, key=lambda b: least[b] == 0):  # those that must keep some come first
        members = table.blocks[b].members
        if least[b] == 0 and (_rung(ladder[b], 1) is None or room < len(members)):
            continue
        room -= len(members)
        curve = next((mode.curve for mode in ladder[b] if mode.curve), None)
        count = table.problem.sites[members[0]].groups
        must = np.isinf(curve.damage) if curve else np.ones(count, bool)
        parts.append((np.full(count, b), np.arange(count), must))
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), 0
    block, group, must = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((random.permutation(len(must)), ~must))
    return block[order], group[order], int(must.sum())


def _longest(at: Callable[[Ints], Choice | None], low: int, high: int) -> Ints | None:
    """The longest start of the order that fits; None if the shortest allowed doesn't."""
    every = np.arange(high)
    if at(every[:low]) is None:
        return None
    if at(every) is not None:
        return every
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if at(every[:middle]) is not None else (low, middle)
    return every[:low]


def _topped_up(
    table: Table, at: Callable[[Ints], Choice | None], chosen: Ints, block: Ints
) -> Ints:
    """Adds later groups that are small enough for what is left of the limit on elements."""
    sizes = np.array([_size(b.modes) for b in table.blocks], np.int64)[block]
    rest = np.arange(len(chosen), len(block))
    while True:
        room = table.limits[0] - int(sizes[chosen].sum())
        rest = rest[sizes[rest] <= room]
        more = rest[np.cumsum(sizes[rest]) <= room]
        if not len(more) or at(np.concatenate([chosen, more])) is None:
            return chosen
        chosen, rest = np.concatenate([chosen, more]), rest[len(more) :]


def _size(modes: list[Mode]) -> int:
    """Elements of a group."""
    return max(mode.use(mode.high)[0] // max(1, mode.high) for mode in modes)
