"""Units: what is kept or removed as one, and which positions of which axes it stands for.

Every position of an axis carries a *label*: the set of units that must all be kept for the
position to be kept.  The empty set is a position that stays whatever happens.  Axes are coupled by
saying that the labels of two are equal (`Units.unify`), flattened axes by the union of labels
(`Units.merge`), and taken apart again by finding, or making, units for the two factors
(`Units.split`).  Everything else that happens to an axis (a slice, a concatenation, a shuffle) is
indexing of its array of labels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.int64]
"""One label for each position of an axis; 0 is the label of what always stays."""

ALWAYS = 0


@dataclass(frozen=True)
class Reason:
    """Why units can't be removed.

    Attributes:
        text: The cause.
        node: Name of the node that causes it.
        op: Its operator.
    """

    text: str
    node: str = ""
    op: str = ""

    def __str__(self) -> str:
        return f"{self.text} (node {self.node}, {self.op})" if self.node else self.text


class Units:
    """A store of units and labels.

    A unit may turn out to stand for several others (a channel for a head and a place within it),
    for another one, or for none (it is frozen); labels made before follow.  A unit and the label of
    it alone have the same number, so that most work is done on whole arrays.
    """

    def __init__(self) -> None:
        self._forward = np.zeros(1024, dtype=np.int64)  # what a label has become, in the end
        self._became = np.zeros(1024, dtype=np.int64)  # what it became at first, for reasons
        self._shared = np.zeros(1024, dtype=bool)  # whether a unit is part of labels of several
        self._count = 1
        self._sets: dict[int, frozenset[int]] = {ALWAYS: frozenset()}  # labels that aren't a unit
        self._numbers: dict[frozenset[int], int] = {frozenset(): ALWAYS}
        self._within: dict[int, list[int]] = defaultdict(list)
        self._reasons: dict[int, Reason] = {}

    def fresh(self, size: int) -> Labels:
        """Labels of an axis of which each position is a unit of its own."""
        start, self._count = self._count, self._count + size
        while self._count > len(self._forward):
            self._forward = np.concatenate([self._forward, np.zeros_like(self._forward)])
            self._became = np.concatenate([self._became, np.zeros_like(self._became)])
            self._shared = np.concatenate([self._shared, np.zeros_like(self._shared)])
        labels = np.arange(start, self._count, dtype=np.int64)
        self._forward[labels] = self._became[labels] = labels
        return labels

    def canonical(self, labels: Labels) -> Labels:
        """The labels as they are by now."""
        now = self._forward[labels]
        while not np.array_equal(now, after := self._forward[now]):
            now = after
        self._forward[labels] = now
        return now

    def members(self, label: int) -> frozenset[int]:
        """The units of a label, as they are by now."""
        now = self._now(label)
        return self._sets.get(now) or (frozenset((now,)) if now else frozenset())

    def units_of(self, labels: Labels) -> set[int]:
        """All units of an axis."""
        return set().union(*map(self.members, np.unique(self.canonical(labels)).tolist()))

    def is_free(self, labels: Labels) -> bool:
        """Whether any position of an axis may be removed."""
        return bool(labels.any()) and bool(self.canonical(labels).any())

    def kept(self, labels: Labels, removed: Collection[int]) -> npt.NDArray[np.bool_]:
        """Which positions of an axis stay when units are removed."""
        if not labels.any() or not removed:
            return np.ones(labels.shape, dtype=bool)
        gone = removed if isinstance(removed, (set, frozenset)) else set(removed)
        distinct, where = np.unique(self.canonical(labels), return_inverse=True)
        stays = [self.members(label).isdisjoint(gone) for label in distinct.tolist()]
        return np.array(stays, dtype=bool)[where].reshape(labels.shape)

    def unify(self, one: Labels, other: Labels, why: Reason) -> None:
        """Make two axes of the same size keep the same positions.

        Where the labels can't be made equal by identifying units, those that differ are frozen.

        Args:
            one: Labels of an axis.
            other: Labels of another.
            why: The reason that a frozen unit gets.
        """
        one, other = self.canonical(one), self.canonical(other)
        differ = one != other
        if not differ.any():
            return
        one, other = one[differ], other[differ]
        for a, b in ((one, other), (other, one)):
            if self._are_plain(a) and not np.isin(a, b).any():
                self._become(a, b, why)
                return
        for a, b in np.unique(np.stack([one, other]), axis=1).T.tolist():
            self._equate(a, b, why)

    def freeze(self, labels: Labels, why: Reason) -> None:
        """Keep all positions of an axis."""
        if not labels.any():
            return
        for label in np.unique(self.canonical(labels)).tolist():
            self._freeze(self.members(label), why)

    def both(self, one: Labels, other: Labels) -> Labels:
        """Labels of positions that are kept where both arguments' are."""
        one, other = np.broadcast_arrays(self.canonical(one), self.canonical(other))
        pairs, where = np.unique(
            np.stack([one.ravel(), other.ravel()]), axis=1, return_inverse=True
        )
        joined = [self._number(self.members(a) | self.members(b)) for a, b in pairs.T.tolist()]
        return np.array(joined, dtype=np.int64)[where].reshape(one.shape)

    def merge(self, outer: Labels, inner: Labels) -> Labels:
        """Labels of two axes flattened into one."""
        if not inner.any():
            return np.repeat(outer, len(inner))
        if not outer.any():
            return np.tile(inner, len(outer))
        return self.both(outer[:, None], inner[None, :]).ravel()

    def split(self, labels: Labels, outer: int, inner: int, why: Reason) -> tuple[Labels, Labels]:
        """Labels of the two axes into which one is taken apart.

        The positions that stay must form a rectangle.  Units of the axis that stand for a place in
        it come to stand for a row and a column; where the labels have no such form, the units that
        are in the way are frozen.

        Args:
            labels: Labels of the axis, ``outer * inner`` of them.
            outer: Size of the outer axis.
            inner: Size of the inner axis.
            why: The reason that a frozen unit gets.

        Returns:
            The labels of the outer and of the inner axis.
        """
        if outer == 1 or inner == 1:
            always = np.zeros(1, dtype=np.int64)
            return (always, labels) if outer == 1 else (labels, always)
        grid = self.canonical(labels).reshape(outer, inner)
        rows, row_of = np.unique(grid, axis=0, return_inverse=True)
        places, column_of = np.unique(rows, axis=1, return_inverse=True)
        if places.shape[0] == 1:
            return np.zeros(outer, dtype=np.int64), grid[0]
        if places.shape[1] == 1:
            return grid[:, 0], np.zeros(inner, dtype=np.int64)
        per_row, per_column = self._factors(places, why)
        return per_row[row_of.ravel()], per_column[column_of.ravel()]

    def reason(self, labels: Labels) -> Reason | None:
        """Why the first frozen position of an axis is frozen, if any is."""
        found = map(self._reason, labels.tolist())
        return next((reason for reason in found if reason is not None), None)

    def _reason(self, label: int) -> Reason | None:
        while label not in self._reasons:
            if label in self._sets:
                found = map(self._reason, sorted(self._sets[label]))
                return next((reason for reason in found if reason is not None), None)
            if self._became[label] == label:
                return None
            label = int(self._became[label])
        return self._reasons[label]

    def _factors(self, places: Labels, why: Reason) -> tuple[Labels, Labels]:
        sets = [[self.members(label) for label in row] for row in places.tolist()]
        by_row = [frozenset.intersection(*row) for row in sets]
        by_column = [frozenset.intersection(*column) for column in zip(*sets, strict=True)]
        rest = [
            [units - by_row[i] - by_column[j] for j, units in enumerate(row)]
            for i, row in enumerate(sets)
        ]
        flat = [units for row in rest for units in row]
        if any(flat):
            if all(len(units) == 1 for units in flat) and len(set(flat)) == len(flat):
                rows, columns = self._grid(rest)
                by_row = [units | {row} for units, row in zip(by_row, rows, strict=True)]
                by_column = [units | {c} for units, c in zip(by_column, columns, strict=True)]
            else:
                self._freeze(frozenset().union(*flat), why)
        return self._numbers_of(by_row), self._numbers_of(by_column)

    def _grid(self, rest: list[list[frozenset[int]]]) -> tuple[list[int], list[int]]:
        """New units for rows and columns, for which the units in the grid come to stand."""
        rows = self.fresh(len(rest)).tolist()
        columns = self.fresh(len(rest[0])).tolist()
        for row, units in zip(rows, rest, strict=True):
            for column, (unit,) in zip(columns, units, strict=True):
                self._define(unit, frozenset((row, column)))
        return rows, columns

    def _numbers_of(self, sets: Iterable[frozenset[int]]) -> Labels:
        return self.canonical(np.array([self._number(units) for units in sets], dtype=np.int64))

    def _are_plain(self, labels: Labels) -> bool:
        """Whether labels are distinct units, none of them part of another label."""
        if (labels == ALWAYS).any() or self._shared[labels].any():
            return False
        if len(np.unique(labels)) != len(labels):
            return False
        return not any(label in self._sets for label in labels.tolist())

    def _become(self, units: Labels, labels: Labels, why: Reason) -> None:
        """Let plain units stand for labels."""
        self._forward[units] = self._became[units] = labels
        for unit in units[labels == ALWAYS].tolist():
            self._reasons[unit] = why

    def _equate(self, a: int, b: int, why: Reason) -> None:
        one, other = self.members(a), self.members(b)
        mine, theirs = one - other, other - one
        if not mine or not theirs:
            self._freeze(mine | theirs, why)
        elif len(mine) == 1:
            self._define(next(iter(mine)), theirs)
        elif len(theirs) == 1:
            self._define(next(iter(theirs)), mine)
        elif len(mine) == len(theirs):  # units of outer axes are made before those of inner ones
            for x, y in zip(sorted(mine), sorted(theirs), strict=True):
                self._define(x, frozenset((y,)))
        else:
            self._freeze(mine | theirs, why)

    def _freeze(self, units: Iterable[int], why: Reason) -> None:
        for unit in units:
            self._reasons.setdefault(unit, why)
            self._define(unit, frozenset())

    def _define(self, unit: int, units: frozenset[int]) -> None:
        """Let a unit stand for others; the labels that hold it follow."""
        self._forward[unit] = self._became[unit] = self._number(units)
        for label in self._within.pop(unit, ()):
            if self._forward[label] == label:
                self._forward[label] = self._number(self._sets[label] - {unit} | units)

    def _number(self, units: frozenset[int]) -> int:
        if len(units) == 1:
            return next(iter(units))
        number = self._numbers.get(units)
        if number is None:
            number = self._numbers[units] = int(self.fresh(1)[0])
            self._sets[number] = units
            for unit in units:
                self._within[unit].append(number)
                self._shared[unit] = True
        return number

    def _now(self, label: int) -> int:
        while (after := int(self._forward[label])) != label:
            label = after
        return label
