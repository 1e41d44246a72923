"""What earlier searches found for the same task graph, within this process.

A search bounded in time does not find the same plan every time. With these, a budget that was named
as possible is met when it is asked for, and a sweep over budgets never gets worse.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt.solvers import TaskGraph, check

_MOST_GRAPHS = 16


@dataclass
class Known:
    """What is known of one task graph; sequences are of its own task indices.

    Attributes:
        order: The order found for it, if one was looked for.
        plans: `(peak, duration, sequence)` of plans, none better than another in both.
    """

    order: list[int] | None = None
    plans: list[tuple[int, int, tuple[int, ...]]] = field(default_factory=list)

    def add(self, graph: TaskGraph, sequence: Sequence[int]) -> None:
        """Notes a plan."""
        found = check(graph, sequence, order="free")
        new = found.peak, found.duration, tuple(sequence)
        if not any(peak <= new[0] and time <= new[1] for peak, time, _ in self.plans):
            kept = [p for p in self.plans if p[0] < new[0] or p[1] < new[1]]
            self.plans = [*kept, new]

    def best(self, budget: int) -> tuple[int, ...] | None:
        """The shortest plan within the budget, else that of least peak."""
        if not self.plans:
            return None
        within = [plan for plan in self.plans if plan[0] <= budget]
        return min(within, key=lambda p: p[1])[2] if within else min(self.plans)[2]


_KNOWN: dict[str, Known] = {}


def known(graph: TaskGraph) -> Known:
    """What is known of a task graph; oldest graphs are forgotten."""
    key = hashlib.sha256(json.dumps(graph.to_json(), sort_keys=True).encode()).hexdigest()
    if key not in _KNOWN:
        while len(_KNOWN) >= _MOST_GRAPHS:
            del _KNOWN[next(iter(_KNOWN))]
        _KNOWN[key] = Known()
    return _KNOWN[key]
