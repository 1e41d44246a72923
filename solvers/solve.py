"""Minimise the duration of an execution sequence with recomputation under a peak-memory budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.solvers.arrays import to_arrays
from graphopt.solvers.graph import TaskGraph, TaskGraphError
from graphopt.solvers.solution import Incumbent, OnProgress, Solution


def solve(
    graph: TaskGraph,
    budget: int,
    *,
    order: str = "input",
    time_limit: float = 60.0,
    step_limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    max_copies: int = 2,
    start: Sequence[int] | None = None,
) -> Solution:
    """Finds a short plan within a peak-memory budget, and proves how good it is.

    Args:
        graph: what to run.
        budget: most bytes that may be live at any step.
        order: "input": first executions follow the order of the tasks; "free": any order.
        time_limit: seconds.
        step_limit: bounds the work by counted steps as well (one is about a millisecond): the
            same limit and seed give the same plan, as long as the time limit does not strike.
        seed: of all random choices.
        on_progress: called with a `Progress` whenever something improves, and in between.
        max_copies: cap on the executions of a task in the constraint program (the searches have
            none); proofs by constraint programming hold for this cap.
        start: a plan to begin with.

    Raises:
        TaskGraphError: a budget, order or start that makes no sense.
    """
    _check_arguments(graph, budget, order, time_limit)
    incumbent = Incumbent(graph, budget, order, on_progress)
    if start is not None:
        incumbent.offer(start, "given")
    run = _Run(graph, incumbent, time_limit, step_limit, seed, max_copies)
    try:
        run.all()
    except KeyboardInterrupt:
        incumbent.report("interrupted")
    return run.solution()


def _check_arguments(graph: TaskGraph, budget: int, order: str, time_limit: float) -> None:
    if not isinstance(graph, TaskGraph):
        raise TaskGraphError("solve() takes a TaskGraph; read one with TaskGraph.from_json")
    if isinstance(budget, bool) or not isinstance(budget, int | np.integer) or budget < 0:
        raise TaskGraphError(f"the budget must be a whole number of bytes, not {budget!r}")
    if order not in ("input", "free"):
        raise TaskGraphError(f"order must be 'input' or 'free', not {order!r}")
    if not (isinstance(time_limit, int | float) and time_limit > 0 and not math.isnan(time_limit)):
        raise TaskGraphError(f"time_limit must be a positive number of seconds, not {time_limit!r}")


@dataclass
class _Run:
    """One call of `solve`."""

    graph: TaskGraph
    incumbent: Incumbent
    time_limit: float
    step_limit: int | None
    seed: int
    max_copies: int

    def left(self) -> float:
        return self.time_limit - self.incumbent.elapsed

    def all(self) -> None:
        from graphopt.solvers.cover import cover_bound, working_set
        from graphopt.solvers.stages import StagePlan

        self.arrays = to_arrays(self.graph)
        if self.incumbent.feasible or working_set(self.arrays) > self.incumbent.budget:
            return
        from graphopt.solvers.eviction import evict
        import time

        plan = StagePlan(self.arrays)
        now = time.perf_counter()
        evict(plan, self.incumbent.budget, now + min(self.left(), 5.0))
        self.incumbent.offer(plan.sequence(), "eviction")
        if self.left() > 2:
            bound = cover_bound(
                self.arrays, self.incumbent.budget, time_limit=min(10.0, self.left() * 0.2)
            )
            self.incumbent.raise_bound(self.graph.duration + bound.extra)
        self.drop_set()

    def drop_set(self) -> None:
        from graphopt.solvers import dropset as D

        a, inc = self.arrays, self.incumbent
        space = D.CutSpace(a)
        mean = self.graph.duration / len(self.graph.tasks)
        _, _, peaks = D.evaluate(a, space.start)
        price = 0.05 * self.graph.duration / max(1, np.maximum(peaks - inc.budget, 0).sum())
        cut = space.start.copy()
        best_cut, best = cut.copy(), np.array([2**62, 2**62])
        begin, cycle = self.left(), 0
        rate, round_time = 2000, min(15.0, max(2.0, begin / 3))
        while self.left() > 0.05 and not inc.optimal:
            t0 = inc.elapsed
            hot = mean * (1.0 if cycle % 2 == 0 else 0.3)
            while (part := (inc.elapsed - t0) / round_time) < 1 and self.left() > 0.02:
                before = inc.elapsed
                temp = hot * (0.003**part)
                price = D.anneal(
                    a,
                    inc.budget,
                    cut,
                    best_cut,
                    best,
                    space.options,
                    space.opt_ptr,
                    space.gap_cut,
                    space.pool,
                    rate,
                    temp,
                    temp * 0.99,
                    price,
                    self.seed,
                )
                self.seed += 1
                took = inc.elapsed - before
                rate = int(max(50, min(2 * rate, rate * 0.1 / max(took, 1e-4))))
                if (
                    best[0] == 0
                    and self.graph.duration + best[1] < inc.duration
                    or (not inc.feasible)
                ):
                    _, stage, _ = D.evaluate(a, best_cut)
                    inc.offer(D.to_sequence(stage), "drop set")
                inc.report("drop-set search")
                if inc.optimal:
                    return
            cycle += 1
            cut[:] = best_cut

    def solution(self) -> Solution:
        """The answer as it stands."""
        from graphopt.solvers.cover import working_set

        inc = self.incumbent
        status = "optimal" if inc.optimal else "feasible" if inc.feasible else "infeasible"
        return Solution(
            sequence=inc.sequence,
            duration=inc.duration,
            peak=inc.peak,
            budget=inc.budget,
            lower_bound=inc.lower_bound,
            gap=inc.gap(),
            status=status,
            seconds=inc.elapsed,
            order=inc.order,
            scope="any number of recomputations, input order",
            starts=dict(inc.starts),
            min_peak=inc.min_peak,
            min_peak_bound=working_set(to_arrays(self.graph)),
        )
