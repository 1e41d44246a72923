"""Prunable dimensions: units that are alike, and the size of every axis in their widths."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphopt.passes.prune.analysis import Analysis, Slot
from graphopt.passes.prune.units import Labels

# Rounds in which units are told apart by the units that they share positions with.
_ROUNDS = 2

Monomial = tuple[int, ...]
"""Dimensions that are multiplied, rising, one as often as its power."""


@dataclass(frozen=True)
class Dimension:
    """Units that are alike: the same number of places in the same axes.

    Attributes:
        name: A parameter's name and axis that it shows in, for people.
        units: The units, in the order of their places.
    """

    name: str
    units: tuple[int, ...]

    @property
    def width(self) -> int:
        """How many units there are."""
        return len(self.units)


class Dimensions:
    """The prunable dimensions of a program."""

    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.units = analysis.units
        self._slots = [slot for slot in analysis.slots.values() if slot.value.axes]
        self.all = self._found()
        self._of = {unit: i for i, dim in enumerate(self.all) for unit in dim.units}
        self._sizes: dict[int, tuple[Labels, dict[Monomial, float]]] = {}

    def size(self, labels: Labels) -> dict[Monomial, float]:
        """The number of places of an axis that stay, as a polynomial in the widths.

        Exact where places that share units fill a grid, which they do unless rows of it were cut.
        """
        known = self._sizes.get(id(labels))
        if known is not None and known[0] is labels:
            return known[1]
        polynomial: dict[Monomial, float] = defaultdict(float)
        distinct, counts = np.unique(self.units.canonical(labels), return_counts=True)
        for label, count in zip(distinct.tolist(), counts.tolist(), strict=True):
            inside = [self._of[u] for u in self.units.members(label) if u in self._of]
            share = count / np.prod([self.all[d].width for d in inside], initial=1.0)
            polynomial[tuple(sorted(inside))] += share
        self._sizes[id(labels)] = labels, dict(polynomial)
        return self._sizes[id(labels)][1]

    def of(self, labels: Iterable[Labels]) -> set[int]:
        """The dimensions that axes have units of."""
        return {self._of[u] for each in labels for u in self.units.units_of(each) if u in self._of}

    def removed(self, kept: Iterable[Iterable[int]]) -> frozenset[int]:
        """The units outside of those that are kept in each dimension.

        No axis loses all of its places: where one would, a unit of it stays for another one.

        Args:
            kept: Units of each dimension, best first.
        """
        stays = [list(units) for units in kept]
        gone = frozenset(
            unit for dim, best in zip(self.all, stays, strict=True)
            for unit in set(dim.units) - set(best)
        )  # fmt: skip
        spared = self.analysis.spared(gone)
        for unit in sorted(gone - spared):
            spared = self._exchanged(spared, stays[self._of[unit]])
        return spared

    def _exchanged(self, removed: frozenset[int], stays: list[int]) -> frozenset[int]:
        """Removes one more, the least of those that no axis needs."""
        for unit in reversed(stays):
            more = removed | {unit}
            if self.analysis.spared(more) == more:
                stays.remove(unit)
                return more
        return removed

    def _found(self) -> list[Dimension]:
        places, names = self._places()
        trained = {u for u, (_, is_trained) in names.items() if is_trained}
        classes = self._classes(places)
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for unit in sorted(trained):
            groups[classes[unit]].append(unit)
        return [Dimension(names[units[0]][0], tuple(units)) for units in groups.values()]

    @cached_property
    def _axes(self) -> list[tuple[Slot, int, Labels, list[int]]]:
        return [
            (slot, axis, labels, self.units.canonical(labels).tolist())
            for slot in self._slots
            for axis, labels in enumerate(slot.value.axes)
            if self.units.is_free(labels)
        ]

    def _places(self) -> tuple[dict[int, Counter[int]], dict[int, tuple[str, bool]]]:
        """For each unit how many places it has in each axis, and the axis to name it by."""
        places: dict[int, Counter[int]] = defaultdict(Counter)
        names: dict[int, tuple[str, bool]] = {}
        for index, (slot, axis, _, numbers) in enumerate(self._axes):
            for label, count in Counter(numbers).items():
                for unit in self.units.members(label):
                    places[unit][index] += count
                    if unit not in names or (slot.is_trained and not names[unit][1]):
                        names[unit] = (f"{slot.path}:{axis}", slot.is_trained)
        return places, names

    def _classes(self, places: dict[int, Counter[int]]) -> dict[int, int]:
        """Units of one class can't be told apart by their places, nor by who shares them."""
        classes = _numbered({unit: tuple(sorted(c.items())) for unit, c in places.items()})
        labels = {label for *_, numbers in self._axes for label in numbers}
        shared = [m for label in labels if len(m := self.units.members(label)) > 1]
        for _ in range(_ROUNDS):
            beside: dict[int, Counter[tuple[int, ...]]] = defaultdict(Counter)
            for members in shared:
                for unit in members:
                    beside[unit][tuple(sorted(classes[m] for m in members if m != unit))] += 1
            classes = _numbered(
                {unit: (classes[unit], tuple(sorted(beside[unit].items()))) for unit in classes}
            )
        return classes


def _numbered(keys: dict[int, Hashable]) -> dict[int, int]:
    numbers: dict[Hashable, int] = {}
    return {unit: numbers.setdefault(key, len(numbers)) for unit, key in keys.items()}
