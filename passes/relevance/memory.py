"""Explaining within a peak memory: values are recomputed instead of being kept.

The flat graph is forward and backward at once, so it is one rematerialization problem (Bartan et
al. 2023, "Moccasin"), for the solver that plans training steps too.  What is recomputed is computed
by the same calls on the same values: relevance stays equal bit for bit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt import solvers
from graphopt.budget import Quantity
from graphopt.cost.allocator import trace_memory
from graphopt.cost.flops import flops
from graphopt.cost.sizes import Substitution
from graphopt.errors import BudgetInfeasible
from graphopt.passes.relevance.schedule import Tasks, allocating, scheduled, tasks_of
from graphopt.passes.relevance.tracing import Flat
from graphopt.report import MemoryReport, PlanReport
from graphopt.solvers import Solution

# A plan that is proven to be within this share of the shortest run is not improved any more.
_TOLERANCE = 0.01
_COMPILING_SECONDS = 60.0
_ATTEMPTS = 4
_PLAN_SECONDS, _LEAST_SECONDS = 6.0, 6.0

Measure = Callable[[Flat], int]


@dataclass(frozen=True)
class Schedule:
    """Which calls run, in which order.

    Attributes:
        sequence: Names of calls of the flat graph; one that comes again is recomputed.
        memory: Peaks.
        plan: What is recomputed.
    """

    sequence: tuple[str, ...]
    memory: MemoryReport
    plan: PlanReport

    def applied(self, flat: Flat) -> Flat:
        """A flat graph that runs so.

        Raises:
            KeyError: The graph has other calls.
        """
        calls = allocating(flat.graph.graph)
        if {n.name for n in calls} != set(self.sequence):
            raise KeyError("the plan is for another graph")
        return _applied(flat, self.sequence)


def _applied(flat: Flat, sequence: Sequence[str]) -> Flat:
    graph = fx.GraphModule(flat.graph, scheduled(flat.graph.graph, sequence))
    return dataclasses.replace(flat, graph=graph)


def peak_of(call: Callable[[], Any], device: Any) -> int:
    """Peak bytes of a call, its results included, above what lives before; runs it twice."""
    call()
    return trace_memory(call, device=device).peak


def plan_memory(flat: Flat, sizes: Substitution, budget: Quantity, measure: Measure) -> Schedule:
    """Find a schedule of a flat graph whose measured peak keeps a budget.

    Args:
        flat: The flat graph.
        sizes: The example sizes, for which the budget is promised.
        budget: Bytes, or a share of the peak without a budget.
        measure: Measures the peak of a flat graph on the example inputs.

    Raises:
        BudgetInfeasible: No schedule was found; carries the smallest budget that would do.
    """
    solvers.prepare()  # compiles in the background while the run is measured
    free = measure(flat)
    asked = budget.bytes_of(free)
    tasks = tasks_of(flat.graph.graph, sizes)
    solvers.prepare(_COMPILING_SECONDS)
    search = _Search(tasks, flat, sizes, measure)
    return search.found(asked, free)


@dataclass(frozen=True)
class _Search:
    tasks: Tasks
    flat: Flat
    sizes: Substitution
    measure: Measure

    def found(self, asked: int, free: int) -> Schedule:
        """Plan and measure until what runs keeps the budget."""
        allowed = asked
        start: Sequence[int] | None = None
        for attempt in range(_ATTEMPTS):
            solution = self._solved(allowed, start)
            measured = self.measure(_applied(self.flat, self._names(solution)))
            if measured <= asked:
                return self._schedule(solution, asked, free, measured)
            if solution.peak > allowed or attempt == _ATTEMPTS - 1:
                raise self._infeasible(asked, max(measured, solution.peak), solution)
            allowed = max(0, allowed - (measured - asked))
            start = solution.sequence
        raise AssertionError("the last attempt returns or raises")

    def _solved(self, allowed: int, start: Sequence[int] | None) -> Solution:
        graph = self.tasks.graph
        options: dict[str, Any] = {"time_limit": _PLAN_SECONDS, "tolerance": _TOLERANCE}
        solution = solvers.solve(graph, allowed, start=start, **options)
        if solution.peak <= allowed:
            return solution
        least = solvers.minimise(graph, time_limit=_LEAST_SECONDS)
        if least.peak <= allowed:
            return solvers.solve(graph, allowed, start=least.sequence, **options)
        return min(least, solution, key=lambda s: s.peak)

    def _names(self, solution: Solution) -> tuple[str, ...]:
        return tuple(self.tasks.calls[t].name for t in solution.sequence)

    def _schedule(self, solution: Solution, asked: int, free: int, measured: int) -> Schedule:
        base = max(1, self.tasks.graph.duration)
        overhead = solution.duration / base - 1
        bound = max(0.0, solution.lower_bound / base - 1)
        work = [flops(call, self.sizes) for call in self.tasks.calls]
        done = sum(work[t] for t in solution.sequence)
        plan = PlanReport(
            status=solution.status,
            overhead=overhead,
            lower_bound=bound,
            gap=max(0.0, overhead - bound),
            recomputed_flops=done - sum(work),
            step_flops=sum(work),
            seconds=solution.seconds,
            scope=solution.scope,
        )
        memory = MemoryReport(free, asked, solution.peak, measured, "activations", "eval")
        return Schedule(self._names(solution), memory, plan)

    def _infeasible(self, asked: int, smallest: int, solution: Solution) -> BudgetInfeasible:
        bound = solvers.least_peak(self.tasks.graph)
        return BudgetInfeasible(
            f"No order of an explanation keeps a peak of {asked:,} bytes.",
            field="memory",
            requested=asked,
            smallest=math.ceil(1.01 * smallest),
            obstacle=self._obstacle(solution),
            proven=bound > asked,
            bound=bound,
        )

    def _obstacle(self, solution: Solution) -> str:
        """The call that needs most by itself."""
        graph = self.tasks.graph

        def alone(task: int) -> int:
            held = (*graph.tasks[task].inputs, *graph.tasks[task].outputs)
            return sum(graph.values[v].bytes for v in held) + graph.tasks[task].workspace

        worst = max(range(len(graph.tasks)), key=alone)
        return f"{self.tasks.calls[worst].name} alone takes {alone(worst):,} bytes"
