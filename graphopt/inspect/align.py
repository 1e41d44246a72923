"""Which nodes of two graphs are the same node: by what they do and where they stand, not by line.

Names alone don't tell: an inserted op shifts the names of all that follow in a new capture.  Nodes
are paired in steps, from the strongest evidence to the weakest, and after each step everything that
follows from the pairs so far is paired:

1. *Forward*: the same op and arguments on operands that are paired.
2. *Backward*: the same op and arguments, read at the same places by readers that are paired.
3. Weaker evidence: the same op on the same parameters; the same op, name and module; the same op on
   the same line of the user's code; what is left in order, by op and module.
4. *Replaced*: an in-place op and its functional twin; another op in the same place, with paired
   operands and paired readers.

Among several candidates that of the same name wins.
"""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

from graphopt.inspect.entries import Entry

Key = Callable[[Entry], Hashable | None]
Does = Callable[[Entry], Hashable]
_IN_PLACE = re.compile(r"(?<=\w)_(?=\.|$)")


def align(first: Sequence[Entry], second: Sequence[Entry]) -> dict[str, str]:
    """Pair the nodes of two graphs.

    Args:
        first: Entries of one graph, operands before their readers.
        second: Entries of the other.

    Returns:
        Name in the first graph -> name in the second, for the nodes that both have.
    """
    return _Aligner(first, second).pairs


class _Side:
    """One of the graphs: its entries, and who reads them where."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = {entry.name: entry for entry in entries}
        self.readers: dict[str, list[tuple[str, int]]] = defaultdict(list)
        for entry in entries:
            for place, operand in enumerate(entry.operands):
                self.readers[operand].append((entry.name, place))
        self.partner: dict[str, str] = {}

    def alone(self) -> Iterator[Entry]:
        """The entries without a partner, in order."""
        return (e for name, e in self.entries.items() if name not in self.partner)

    def operands(self, entry: Entry) -> tuple[str, ...] | None:
        """Partners of the operands, or None if one has none."""
        found = tuple(self.partner.get(name) for name in entry.operands)
        return None if None in found else found  # type: ignore[return-value]

    def places(self, entry: Entry) -> frozenset[tuple[str, int]] | None:
        """Where the partners of the readers read, or None if one has none, or nobody reads."""
        readers = self.readers[entry.name]
        found = [(self.partner.get(name), place) for name, place in readers]
        if not found or any(name is None for name, _ in found):
            return None
        return frozenset(found)  # type: ignore[arg-type]


class _Aligner:
    def __init__(self, first: Sequence[Entry], second: Sequence[Entry]) -> None:
        self.a, self.b = _Side(first), _Side(second)
        self._pair_unique(lambda e: None if e.op == "call" else (e.op, e.name))
        self._settle()
        for key in (_by_state, _by_name, _by_source):
            self._pair_unique(key)
            self._settle()
        self._settle(_twin)
        self._pair_sequences()
        self._settle()
        self._pair_replaced()
        self._settle()

    @property
    def pairs(self) -> dict[str, str]:
        return dict(self.a.partner)

    def _pair(self, one: Entry, two: Entry) -> None:
        self.a.partner[one.name] = two.name
        self.b.partner[two.name] = one.name

    def _settle(self, does: Does | None = None) -> None:
        """Pair all that follows from the pairs there are."""
        does = _does if does is None else does
        while True:
            before = len(self.a.partner)
            for strict in (True, False):
                self._forward(strict, does)
            for strict in (True, False):
                self._backward(strict, does)
            if len(self.a.partner) == before:
                return

    def _forward(self, strict: bool, does: Does) -> None:
        ready: dict[Any, list[Entry]] = defaultdict(list)

        def offer(entry: Entry) -> None:
            operands = self.a.operands(entry)
            if operands is not None and entry.name not in self.a.partner:
                ready[does(entry), operands].append(entry)

        for entry in self.a.alone():
            offer(entry)
        for entry in list(self.b.alone()):
            if self.b.operands(entry) is None:
                continue
            found = self._choose(ready.get((does(entry), entry.operands), ()), entry, strict)
            if found is not None:
                self._pair(found, entry)
                for reader, _ in dict.fromkeys(self.a.readers[found.name]):
                    offer(self.a.entries[reader])

    def _backward(self, strict: bool, does: Does) -> None:
        for entry in reversed(list(self.b.alone())):
            places = self.b.places(entry)
            if places is None:
                continue
            reader, place = min(places)
            operand = self.a.entries[reader].operands[place : place + 1]
            candidates = [self.a.entries[name] for name in operand]
            wanted = frozenset(self.b.readers[entry.name])
            candidates = [
                c for c in candidates if does(c) == does(entry) and self.a.places(c) == wanted
            ]
            found = self._choose(candidates, entry, strict)
            if found is not None:
                self._pair(found, entry)

    def _choose(self, candidates: Sequence[Entry], entry: Entry, strict: bool) -> Entry | None:
        free = [c for c in candidates if c.name not in self.a.partner]
        same = [c for c in free if c.name == entry.name]
        if same or strict or not free:
            return same[0] if same else None
        return min(free, key=lambda c: c.scope != entry.scope)

    def _pair_unique(self, key: Key) -> None:
        """Pair what has a key that no other node on its side has."""
        found: list[dict[Hashable, list[Entry]]] = []
        for side in (self.a, self.b):
            groups: dict[Hashable, list[Entry]] = defaultdict(list)
            for entry in side.alone():
                value = key(entry)
                if value is not None:
                    groups[value].append(entry)
            found.append(groups)
        for value, mine in found[0].items():
            theirs = found[1].get(value, [])
            if len(mine) == len(theirs) == 1:
                self._pair(mine[0], theirs[0])

    def _pair_sequences(self) -> None:
        mine, theirs = list(self.a.alone()), list(self.b.alone())
        keys = [[(e.target, e.scope, e.phase) for e in side] for side in (mine, theirs)]
        matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
        for start, other, size in matcher.get_matching_blocks():
            for one, two in zip(mine[start:], theirs[other : other + size], strict=False):
                if one.op == two.op == "call" and self._related(one, two):
                    self._pair(one, two)

    def _related(self, one: Entry, two: Entry) -> bool:
        """Whether two nodes share an operand or a reader."""
        operands = {self.a.partner.get(name) for name in one.operands}
        readers = {self.a.partner.get(name) for name, _ in self.a.readers[one.name]}
        others = {name for name, _ in self.b.readers[two.name]}
        return bool(operands & set(two.operands) or readers & others)

    def _pair_replaced(self) -> None:
        """Pair other ops that stand in the same place: the same operands, the same readers."""
        stands: dict[Hashable, list[Entry]] = defaultdict(list)
        for entry in self.a.alone():
            operands, places = self.a.operands(entry), self.a.places(entry)
            if entry.op == "call" and operands and places:
                stands[operands, places].append(entry)
        for entry in list(self.b.alone()):
            if not self.b.operands(entry) or not self.b.places(entry):
                continue
            key = (entry.operands, frozenset(self.b.readers[entry.name]))
            found = stands.get(key, [])
            if len(found) == 1 and found[0].name not in self.a.partner:
                self._pair(found[0], entry)


def _does(entry: Entry) -> Hashable:
    return entry.op, entry.target, entry.arguments, entry.phase


def _twin(entry: Entry) -> Hashable:
    """The same for an in-place op and its functional twin."""
    return entry.op, _IN_PLACE.sub("", entry.target), entry.arguments, entry.phase


def _by_state(entry: Entry) -> Hashable | None:
    return (entry.target, entry.state, entry.phase) if entry.state and entry.op == "call" else None


def _by_name(entry: Entry) -> Hashable | None:
    return (entry.target, entry.name, entry.scope) if entry.op == "call" else None


def _by_source(entry: Entry) -> Hashable | None:
    if entry.op != "call" or entry.source is None:
        return None
    return entry.target, entry.source, entry.scope, entry.phase
