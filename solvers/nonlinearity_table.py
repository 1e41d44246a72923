"""A selection problem as blocks of coupled sites, each in one of a few modes.

For a given option the best groups to keep are the most damaging ones, so a block's choice is a
*mode* (all replaced, some kept, or all kept) and how many groups are kept; the damage is convex in
that number, and every limited quantity is affine in it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from graphopt.solvers.nonlinearity_problem import NonlinearityProblem, Site

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Use = tuple[int, int, int]  # elements kept, sites with any, cost
Pick = tuple["Mode", int]  # a mode and the number of groups kept
Choice = tuple[Pick, ...]  # by block

NOTHING: Use = (0, 0, 0)


@dataclass(frozen=True, eq=False)
class Curve:
    """The damage of one option of a block, by the number of groups kept.

    Attributes:
        damage: by group.
    """

    damage: Floats

    @cached_property
    def rising(self) -> Floats:
        """The damages, the smallest first."""
        return np.sort(self.damage)

    @cached_property
    def sums(self) -> Floats:
        """The sum of the so many smallest damages."""
        return np.concatenate([[0.0], np.cumsum(self.rising)])

    @cached_property
    def must(self) -> int:
        """Groups that the option must not replace."""
        return int(np.isinf(self.damage).sum())

    def top(self, kept: int) -> Ints:
        """The so many most damaging groups, the first ones among equals; rising."""
        if kept == 0:
            return np.zeros(0, np.int64)
        least = self.rising[len(self.rising) - kept]
        chosen = self.damage > least
        equal = np.flatnonzero(self.damage == least)
        chosen[equal[: kept - int(chosen.sum())]] = True
        return np.flatnonzero(chosen)

    def left(self, kept: int) -> float:
        """The damage if the so many most damaging groups are kept."""
        return float(self.sums[len(self.rising) - kept])

    def next(self, kept: int) -> float:
        """What keeping one more group would gain."""
        return float(self.rising[len(self.rising) - 1 - kept])

    def above(self, price: float) -> int:
        """Groups whose damage is more than a price."""
        return len(self.rising) - int(self.rising.searchsorted(price, "right"))

    def at_least(self, price: float) -> int:
        """Groups whose damage is not less than a price."""
        return len(self.rising) - int(self.rising.searchsorted(price, "left"))


@dataclass(frozen=True, eq=False)
class Mode:
    """One way to treat a block.

    Attributes:
        block: its index.
        option: index among the block's options; None: all is kept.
        curve: of the damage; None: there is none.
        low: fewest groups kept.
        high: most groups kept.
        base: what is used, without what depends on the number of groups kept.
        unit: what every group kept adds; its cost may be negative.
        levels: by member of the block.
    """

    block: int
    option: int | None
    curve: Curve | None
    low: int
    high: int
    base: Use
    unit: Use
    levels: tuple[int, ...]

    def use(self, kept: int) -> Use:
        """What is used."""
        base, unit = self.base, self.unit
        return (base[0] + kept * unit[0], base[1] + kept * unit[1], base[2] + kept * unit[2])

    def damage(self, kept: int) -> float:
        """The damage of what isn't kept."""
        return self.curve.left(kept) if self.curve else 0.0

    def best(self, prices: Sequence[float]) -> tuple[float, int]:
        """The least damage plus priced use, and the number of groups kept for it."""
        base, each = _priced(self.base, prices), _priced(self.unit, prices)
        curve, kept = self.curve, self.low
        if curve is not None and self.low < self.high:
            kept = min(max(curve.above(each), self.low), self.high)
        return base + self.damage(kept) + each * kept, kept

    def each(self, prices: Sequence[float]) -> float:
        """The price of one more group kept."""
        return _priced(self.unit, prices)


def _priced(use: Use, prices: Sequence[float]) -> float:
    return use[0] * prices[0] + use[1] * prices[1] + use[2] * prices[2]


@dataclass(frozen=True, eq=False)
class Block:
    """Sites that make the same choice.

    Attributes:
        members: indices of the sites.
        names: of the options that all of them have.
        curves: by option, damages of the members added up.
        modes: all that may be of use; all kept first.
    """

    members: tuple[int, ...]
    names: tuple[str, ...]
    curves: tuple[Curve, ...]
    modes: list[Mode] = field(default_factory=list)


class Table:
    """Blocks, limits and paths of one problem.

    Attributes:
        blocks: coupled sites are one block, at the place of the first.
        limits: on elements kept, sites with any, and cost; where there is none, what all could
            come to at most.
        limited: whether there is one.
    """

    def __init__(self, problem: NonlinearityProblem) -> None:
        """Joins coupled sites and lists the modes."""
        self.problem = problem
        asked = (problem.relus, problem.relu_sites, problem.cost)
        self.limited = tuple(limit is not None for limit in asked)
        self.blocks = [self._block(b, members) for b, members in enumerate(_members(problem))]
        most = [max((m.use(k)[j] for b in self.blocks for m in b.modes for k in (m.low, m.high)),
                    default=0) for j in range(3)]  # fmt: skip
        self.limits: Use = tuple(  # pyright: ignore[reportAttributeAccessIssue]
            most[j] * len(self.blocks) if limit is None else int(limit)
            for j, limit in enumerate(asked)
        )
        self.paths = Paths(problem)

    def _block(self, index: int, members: tuple[int, ...]) -> Block:
        sites = [self.problem.sites[member] for member in members]
        names = tuple(
            option.name for option in sites[0].options
            if all(option.name in {other.name for other in site.options} for site in sites)
        )  # fmt: skip
        curves = []
        for name in names:
            damages = [o.damage for site in sites for o in site.options if o.name == name]
            curves.append(Curve(damages[0] if len(damages) == 1 else np.sum(damages, axis=0)))
        block = Block(members, names, tuple(curves))
        block.modes.extend(self._modes(index, block, sites))
        return block

    def _modes(self, index: int, block: Block, sites: list[Site]) -> Iterable[Mode]:
        groups, size = sites[0].groups, sum(site.size for site in sites)
        keeps = [site.keep for site in sites if site.keep is not None]
        keepable = len(keeps) == len(sites)
        each = sum(k.element * s.size for k, s in zip(keeps, sites, strict=False))
        fixed = sum(k.fixed for k in keeps)
        if keepable:
            whole = (groups * size, len(sites), fixed + groups * each)
            levels = tuple(k.levels for k in keeps)
            yield Mode(index, None, None, groups, groups, whole, NOTHING, levels)
        candidates = []
        for r, name in enumerate(block.names):
            options = [next(o for o in site.options if o.name == name) for site in sites]
            prices = [option.price for option in options]
            element = sum(p.element * s.size for p, s in zip(prices, sites, strict=True))
            once = sum(price.fixed for price in prices)
            candidates.append((r, element, once, tuple(price.levels for price in prices)))
        for r, element, once, levels in self._undominated(block, candidates):
            curve = block.curves[r]
            if curve.must == 0:
                use = (0, 0, once + groups * element)
                yield Mode(index, r, curve, 0, 0, use, NOTHING, levels)
            low, high = max(1, curve.must), groups - 1
            if keepable and low <= high:
                both = tuple(max(a.levels, b) for a, b in zip(keeps, levels, strict=True))
                base = (0, len(sites), fixed + once + groups * element)
                yield Mode(index, r, curve, low, high, base, (size, 0, each - element), both)

    def _undominated(
        self, block: Block, candidates: list[tuple[int, int, int, tuple[int, ...]]]
    ) -> list[tuple[int, int, int, tuple[int, ...]]]:
        """Options without another that is nowhere worse; of equal ones, the first."""
        found: list[tuple[int, int, int, tuple[int, ...]]] = []
        for one in candidates:
            if not any(self._better(block, other, one) for other in found):
                found = [other for other in found if not self._better(block, one, other)]
                found.append(one)
        return found

    def _better(
        self, block: Block, one: tuple[int, int, int, tuple[int, ...]],
        other: tuple[int, int, int, tuple[int, ...]],
    ) -> bool:  # fmt: skip
        if self.limited[2] and (one[1] > other[1] or one[2] > other[2]):
            return False
        deeper = any(a > b for a, b in zip(one[3], other[3], strict=True))
        if self.problem.max_depth is not None and deeper:
            return False
        return bool((block.curves[one[0]].sums <= block.curves[other[0]].sums).all())

    def used(self, choice: Choice) -> Use:
        """What a choice uses of every limited quantity."""
        uses = [mode.use(kept) for mode, kept in choice]
        return (sum(u[0] for u in uses), sum(u[1] for u in uses), sum(u[2] for u in uses))

    def within(self, use: Use) -> bool:
        """Whether no limit is exceeded."""
        return all(u <= limit for u, limit in zip(use, self.limits, strict=True))

    def levels(self, choice: Choice) -> list[int]:
        """By site."""
        levels = [0] * len(self.problem.sites)
        for block, (mode, _) in zip(self.blocks, choice, strict=True):
            for member, level in zip(block.members, mode.levels, strict=True):
                levels[member] = level
        return levels

    def shallow(self, choice: Choice) -> bool:
        """Whether no path has too many levels."""
        most = self.problem.max_depth
        return most is None or self.paths.depth(self.levels(choice)) <= most

    def fits(self, choice: Choice) -> bool:
        """Whether all limits are kept."""
        return self.within(self.used(choice)) and self.shallow(choice)

    def damage(self, choice: Choice) -> float:
        """The sum over the blocks."""
        return math.fsum(mode.damage(kept) for mode, kept in choice)

    def kept(self, choice: Choice) -> tuple[Ints, ...]:
        """The groups kept, by site, rising."""
        found: list[Ints] = [np.zeros(0, np.int64)] * len(self.problem.sites)
        for block, (mode, count) in zip(self.blocks, choice, strict=True):
            curve = mode.curve
            groups = curve.top(count) if curve else np.arange(count, dtype=np.int64)
            for member in block.members:
                found[member] = groups.copy()
        return tuple(found)

    def options(self, choice: Choice) -> tuple[int | None, ...]:
        """The index of the option, by site."""
        found: list[int | None] = [None] * len(self.problem.sites)
        for block, (mode, _) in zip(self.blocks, choice, strict=True):
            if mode.option is not None:
                for member in block.members:
                    names = [option.name for option in self.problem.sites[member].options]
                    found[member] = names.index(block.names[mode.option])
        return tuple(found)


class Paths:
    """The ways through the network.

    Attributes:
        entries: (site, levels before it) of the sites that follow the input.
        between: (site, site, levels).
        exits: (site, levels after it).
        direct: levels from the input to the output past all sites.
        order: sites, none before one that leads to it.
    """

    def __init__(self, problem: NonlinearityProblem) -> None:
        """Sorts the edges."""
        count = len(problem.sites)
        self.entries, self.exits, self.between, self.direct = [], [], [], 0
        for edge in problem.edges:
            if edge.before is None and edge.after is None:
                self.direct = max(self.direct, edge.levels)
            elif edge.before is None:
                self.entries.append((edge.after, edge.levels))
            elif edge.after is None:
                self.exits.append((edge.before, edge.levels))
            else:
                self.between.append((edge.before, edge.after, edge.levels))
        entered = {edge.after for edge in problem.edges}
        left = {edge.before for edge in problem.edges}
        self.entries += [(site, 0) for site in range(count) if site not in entered]
        self.exits += [(site, 0) for site in range(count) if site not in left]
        self._before: list[list[tuple[int, int]]] = [[] for _ in range(count)]
        for before, after, levels in self.between:
            self._before[after].append((before, levels))
        self.order = self._sorted(count)

    def _sorted(self, count: int) -> list[int]:
        after: list[list[int]] = [[] for _ in range(count)]
        for before, site, _ in self.between:
            after[before].append(site)
        waiting = [len(before) for before in self._before]
        order = [site for site in range(count) if not waiting[site]]
        for site in order:
            for later in after[site]:
                waiting[later] -= 1
                if not waiting[later]:
                    order.append(later)
        return order

    def arrivals(self, levels: Sequence[int]) -> list[int]:
        """Most levels used up on the way to and including every site."""
        reached = [-1] * len(levels)
        for site, before in self.entries:
            reached[site] = max(reached[site], before)
        for site in self.order:
            for before, between in self._before[site]:
                reached[site] = max(reached[site], reached[before] + between)
            reached[site] += levels[site]
        return reached

    def depth(self, levels: Sequence[int]) -> int:
        """Levels of the longest path."""
        reached = self.arrivals(levels)
        return max([self.direct, *(reached[site] + after for site, after in self.exits)])

    def longest(self, levels: Sequence[int]) -> list[int]:
        """The sites on a longest path; none if that is the direct one."""
        reached = self.arrivals(levels)
        end = max(self.exits, key=lambda item: reached[item[0]] + item[1], default=None)
        if end is None or self.direct > reached[end[0]] + end[1]:
            return []
        path = [end[0]]
        while True:
            here = path[-1]
            start = reached[here] - levels[here]
            before = [b for b, between in self._before[here] if reached[b] + between == start]
            if not before:
                return path[::-1]
            path.append(before[0])


def _members(problem: NonlinearityProblem) -> list[tuple[int, ...]]:
    leader = {site: min(together) for together in problem.coupled for site in together}
    found: dict[int, list[int]] = {}
    for site in range(len(problem.sites)):
        found.setdefault(leader.get(site, site), []).append(site)
    return [tuple(members) for members in found.values()]
