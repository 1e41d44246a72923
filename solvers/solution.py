"""What a solver answers, and the incumbent it keeps while it works."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.solvers.check import check
from graphopt.solvers.graph import TaskGraph, TaskGraphError

# A plan that is the best within a cap on copies ends the search after this times the time it took.
_AFTER_CAPPED = 4.0


@dataclass(frozen=True)
class Progress:
    """Where a solver stands.

    Attributes:
        elapsed: seconds since the start.
        phase: what it is doing.
        peak: peak bytes of the incumbent.
        duration: duration of the incumbent, None while none fits the budget.
        lower_bound: proven lower bound on the duration.
        gap: (duration - lower_bound) / duration, inf while there is no incumbent.
    """

    elapsed: float
    phase: str
    peak: int
    duration: int | None
    lower_bound: int
    gap: float


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Solution:
    """A plan and what is proven about it.

    Attributes:
        sequence: task indices in the order of execution; a repeated index is a recomputation.
            If nothing within the budget was found: the plan with the smallest peak.
        duration: sum of the durations of all executions.
        peak: most bytes live at any step.
        budget: bytes allowed.
        lower_bound: no plan of the stated scope is shorter.
        gap: (duration - lower_bound) / duration.
        status: "optimal", "feasible", or "infeasible" (no plan within the budget was found; it is
            proven that none exists if `min_peak_bound` exceeds the budget).
        seconds: time used.
        order: "input": first executions follow the input order; "free": any order.
        scope: for which plans the bound and "optimal" hold.
        starts: (peak, duration) of every start that was tried, by name.
        min_peak: the smallest peak met.
        min_peak_bound: no plan of the stated scope has a smaller peak.
    """

    sequence: tuple[int, ...]
    duration: int
    peak: int
    budget: int
    lower_bound: int
    gap: float
    status: str
    seconds: float
    order: str
    scope: str
    starts: dict[str, tuple[int, int]] = field(default_factory=dict)
    min_peak: int = 0
    min_peak_bound: int = 0

    @property
    def proven_infeasible(self) -> bool:
        """Whether no plan of the stated scope fits the budget."""
        return self.min_peak_bound > self.budget

    def to_dict(self, graph: TaskGraph | None = None) -> dict[str, Any]:
        """JSON form; with the graph, the sequence is given in the graph's own ids."""
        data = dict(vars(self))
        ids = graph.ids if graph else range(len(self.sequence))
        data["sequence"] = [ids[task] for task in self.sequence] if graph else [*self.sequence]
        data["starts"] = {name: list(pair) for name, pair in self.starts.items()}
        return data


class Incumbent:
    """The best plan met so far: within the budget the shortest, else the one of least peak."""

    def __init__(
        self,
        graph: TaskGraph,
        budget: int,
        order: str,
        on_progress: OnProgress | None,
        tolerance: float = 0.0,
    ) -> None:
        """Starts with the input order, nothing recomputed."""
        self.graph, self.budget, self.order = graph, budget, order
        self.tolerance = tolerance
        self.began = time.perf_counter()
        self.any_copies = graph.duration  # bounds the duration of all plans
        self.capped: dict[int, int] = {}  # cap on copies -> the same for plans within it
        self.capped_after = 0.0  # seconds until the first of these
        self.starts: dict[str, tuple[int, int]] = {}
        self.on_progress = on_progress
        self.phase = "input order"
        plain = check(graph, range(len(graph.tasks)))
        self.sequence: tuple[int, ...] = tuple(range(len(graph.tasks)))
        self.peak, self.duration = plain.peak, plain.duration
        self.min_peak = plain.peak
        self.starts["input order"] = (plain.peak, plain.duration)

    @property
    def feasible(self) -> bool:
        """Whether the incumbent fits the budget."""
        return self.peak <= self.budget

    @property
    def cap(self) -> int:
        """The cap on copies that `lower_bound` rests on; 0 if it holds for all plans."""
        return self._best_bound()[1]

    @property
    def lower_bound(self) -> int:
        """No plan (none within `cap`, if there is one) is shorter."""
        return self._best_bound()[0]

    def _best_bound(self) -> tuple[int, int]:
        """The highest bound and its cap.

        A plan that undercuts the bound for a cap is beyond that cap, and shorter than all within.
        """
        duration = self.duration  # other threads read while it changes
        capped = [(min(bound, duration), cap) for cap, bound in list(self.capped.items())]
        best = max(capped, default=(0, 0))
        return best if best[0] > self.any_copies else (self.any_copies, 0)

    @property
    def optimal(self) -> bool:
        """Whether nothing better can exist."""
        return self.feasible and self.duration <= self.lower_bound

    @property
    def done(self) -> bool:
        """Whether it is known to be as good as was asked for.

        Where that holds for capped plans alone, others are looked for a while longer.
        """
        waited = not self.cap or self.elapsed > _AFTER_CAPPED * self.capped_after
        return self.feasible and self.gap() <= self.tolerance and waited

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def offer(self, sequence: Sequence[int], start: str | None = None) -> bool:
        """Takes a plan if it is valid and better; `start` names it among the starts.

        Tasks past the graph's own (the end that `with_end` appends) are left out.
        """
        count = len(self.graph.tasks)
        sequence = [int(task) for task in sequence if task < count]
        found = check(self.graph, sequence, order=self.order)
        if found.errors:
            raise TaskGraphError(f"not a valid plan: {'; '.join(found.errors[:3])}")
        if start is not None:
            self.starts[start] = (found.peak, found.duration)
        self.min_peak = min(self.min_peak, found.peak)
        fits = found.peak <= self.budget
        if self.feasible:
            better = fits and (found.duration, found.peak) < (self.duration, self.peak)
        else:
            better = fits or (found.peak, found.duration) < (self.peak, self.duration)
        if better:
            self.sequence = tuple(sequence)
            self.peak, self.duration = found.peak, found.duration
            self.report()
        return better

    def raise_bound(self, bound: int) -> None:
        """Takes a lower bound on the duration if it is higher."""
        if bound > self.any_copies:
            self.any_copies = bound
            self.report()

    def raise_capped_bound(self, cap: int, bound: int) -> None:
        """Takes a lower bound on the duration of plans that run no task more than `cap` times."""
        if bound > self.capped.get(cap, 0):
            self.capped_after = self.capped_after or self.elapsed
            self.capped[cap] = bound
            self.report()

    def gap(self) -> float:
        """Relative distance of the incumbent from the bound."""
        if not self.feasible:
            return math.inf
        return max(0.0, (self.duration - self.lower_bound) / max(1, self.duration))

    def report(self, phase: str | None = None) -> None:
        """Tells the progress callback where things stand."""
        self.phase = phase or self.phase
        if self.on_progress:
            duration = self.duration if self.feasible else None
            self.on_progress(
                Progress(
                    self.elapsed, self.phase, self.peak, duration, self.lower_bound, self.gap()
                )
            )
