"""Minimise the duration of an execution sequence with recomputation under a peak-memory budget."""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphopt.solvers.arrays import to_arrays
from graphopt.solvers.blocks import task_classes
from graphopt.solvers.clock import Clock
from graphopt.solvers.companion import accompany
from graphopt.solvers.cover import CoverBounder, working_set
from graphopt.solvers.eviction import evict
from graphopt.solvers.graph import TaskGraph, TaskGraphError, with_end
from graphopt.solvers.order import reorder
from graphopt.solvers.proof import Prover
from graphopt.solvers.solution import Incumbent, OnProgress, Progress, Solution
from graphopt.solvers.stages import StagePlan

_PROVABLE = 160  # tasks up to which a proof by constraint programming is tried
_NEIGHBOURLY = 600  # tasks up to which large-neighbourhood search is tried
_BEFORE_PROOF = 0.12  # share of the time that the search has before that
_STEP_SECONDS = 0.001  # deterministic time of CP-SAT that one counted step is worth


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
    tolerance: float = 0.0,
) -> Solution:
    """Finds a short plan within a peak-memory budget, and proves how good it is.

    Args:
        graph: what to run.
        budget: most bytes that may be live at any step.
        order: "input": first executions follow the order of the tasks; "free": any order.
        time_limit: seconds.
        step_limit: bounds the work by counted steps instead (one is about a millisecond): the
            same limit and seed give the same plan, as long as the time limit does not strike.
        seed: of all random choices.
        on_progress: called with a `Progress` whenever something improves, and in between.
        max_copies: cap on the executions of a task in the constraint program (the searches have
            none); proofs by constraint programming hold for this cap.
        start: a plan to begin with.
        tolerance: stop when the gap is proven to be no larger than this.

    Raises:
        TaskGraphError: a budget, order or start that makes no sense.
    """
    _check_arguments(graph, budget, order, time_limit)
    if order == "free":
        return _solve_free(
            graph, int(budget), time_limit, step_limit, seed, on_progress, max_copies, start,
            tolerance,
        )  # fmt: skip
    incumbent = Incumbent(graph, int(budget), order, on_progress, tolerance)
    if start is not None:
        incumbent.offer(start, "given")
    run = Run(graph, incumbent, time_limit, step_limit, seed, max_copies)
    try:
        run.all()
    except KeyboardInterrupt:
        incumbent.report("interrupted")
    finally:
        run.close()
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


def _solve_free(
    graph: TaskGraph,
    budget: int,
    time_limit: float,
    step_limit: int | None,
    seed: int,
    on_progress: OnProgress | None,
    max_copies: int,
    start: Sequence[int] | None,
    tolerance: float,
) -> Solution:
    """Finds an order with few bytes live, then plans recomputation for that order."""
    began = time.perf_counter()
    incumbent = Incumbent(graph, budget, "free", on_progress)
    if start is not None:
        incumbent.offer(start, "given")
    incumbent.report("reordering")
    order = reorder(
        graph,
        time_limit=min(15.0, 0.2 * time_limit),
        step_limit=None if step_limit is None else max(1, step_limit // 50),
        seed=seed,
    )
    incumbent.offer(order, "reordered")
    if incumbent.duration > graph.duration or not incumbent.feasible:
        left = max(0.1, time_limit - (time.perf_counter() - began))
        found = solve(
            graph.reordered(order), budget, time_limit=left, step_limit=step_limit, seed=seed,
            on_progress=_shifted(on_progress, incumbent), max_copies=max_copies,
            tolerance=tolerance,
        )  # fmt: skip
        incumbent.offer([order[task] for task in found.sequence])
        for name, figures in found.starts.items():
            incumbent.starts.setdefault(f"reordered, {name}", figures)
        incumbent.min_peak = min(incumbent.min_peak, found.min_peak)
    return _answer(incumbent, working_set(to_arrays(graph)), "any plan in any order")


def _shifted(on_progress: OnProgress | None, outer: Incumbent) -> OnProgress | None:
    """The callback, with the time since the outer start and a bound that holds for any order."""
    if on_progress is None:
        return None

    def call(progress: Progress) -> None:
        gap = math.inf
        if progress.duration is not None:
            gap = 1 - outer.lower_bound / max(1, progress.duration)
        on_progress(
            replace(progress, elapsed=outer.elapsed, lower_bound=outer.lower_bound, gap=gap)
        )

    return call


def _answer(inc: Incumbent, least: int, scope: str) -> Solution:
    """The incumbent as an answer."""
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
        scope=scope,
        starts=dict(inc.starts),
        min_peak=inc.min_peak,
        min_peak_bound=min(least, inc.min_peak),
    )


class Run:
    """One call of `solve`: starts, then search, with bounds and proofs in a second thread."""

    def __init__(
        self,
        graph: TaskGraph,
        incumbent: Incumbent,
        time_limit: float,
        step_limit: int | None,
        seed: int,
        max_copies: int,
    ) -> None:
        """Notes what to do."""
        self.graph, self.incumbent, self.seed = with_end(graph), incumbent, seed
        self.max_copies, self.step_limit = max_copies, step_limit
        self.clock = Clock(incumbent, time_limit, step_limit)
        self.arrays = to_arrays(self.graph)
        self.bounder = CoverBounder(self.arrays, incumbent.budget)
        self.closing = threading.Event()
        self.thread: threading.Thread | None = None
        self.plan: StagePlan | None = None
        self.prover = Prover(self.arrays, incumbent, max_copies, seed)

    def all(self) -> None:
        """Works until the clock runs out or nothing better can exist."""
        if self.incumbent.done or self.bounder.infeasible:
            return
        self.incumbent.raise_bound(self.graph.duration + self.bounder.extra)
        if self.clock.counted:
            self._bound_counted()
        self._evict()
        if self.incumbent.done or self.bounder.infeasible:
            return
        if not self.clock.counted:
            self.thread = threading.Thread(target=self._bound, daemon=True)
            self.thread.start()
        self._search()
        if self.clock.counted and len(self.graph.tasks) <= _PROVABLE:
            steps = _STEP_SECONDS * (self.step_limit or 0)
            self.prover.prove(self.bounder, self.clock.left(), steps=steps)
            self.prover.deliver()

    def close(self) -> None:
        """Ends the second thread."""
        self.closing.set()
        if self.thread is not None:
            while self.thread.is_alive():
                self.bounder.stop()
                self.prover.stop()
                self.thread.join(0.05)
        self.prover.deliver()

    def _evict(self) -> None:
        """The first plan, in plain numpy: it must not wait for a compiler."""
        plan = StagePlan(self.arrays)
        from graphopt.solvers.search import stage_search

        stage_search.start()
        patience = 0.8 if stage_search.wait(0.0) else 3.0
        limit = 1e9 if self.clock.counted else min(self.clock.left(), patience)
        evict(plan, self.incumbent.budget, time.perf_counter() + limit)
        self.incumbent.offer(plan.sequence(), "eviction")
        self.plan = plan

    def _search(self) -> None:
        from graphopt.solvers.search import Search, stage_search

        patience = 1e9 if self.clock.counted else self.clock.left()
        if stage_search.wait(patience):
            Search(self.graph, self.arrays, self.incumbent, self.clock, self.seed, self._poll).run(
                self.plan
            )

    def _poll(self) -> bool:
        """Takes what the second thread found; waits while that needs both cores."""
        self.prover.deliver()
        while self.prover.busy.is_set() and not self.clock.over():
            time.sleep(0.02)
            self.prover.deliver()
            self.incumbent.report("proof")
        return self.bounder.infeasible

    def _bound(self) -> None:
        """The second thread: cover bounds, then proofs on small graphs, else a second search."""
        until = self.clock.left() * 0.5
        while not (self._closed() or self.bounder.exhausted):
            if self.clock.left() < until + 0.1:
                break
            self.bounder.round(self.clock.left() - until, target=self._target())
            bound = self.graph.duration + self.bounder.extra
            self.incumbent.any_copies = max(self.incumbent.any_copies, bound)
        if len(self.graph.tasks) <= _PROVABLE:
            self._prove()
        else:
            self._improve()

    def _prove(self) -> None:
        workers = 2
        while not self._closed() and self.clock.left() > 0.5:
            if not self.incumbent.feasible or self.clock.used() < _BEFORE_PROOF:
                time.sleep(0.02)
            elif self.prover.prove(self.bounder, self.clock.left(), workers=workers):
                workers = 1  # the search goes on beside the proof for more copies
            else:
                return

    def _improve(self) -> None:
        from graphopt.solvers.search import stage_search

        if len(self.graph.tasks) <= _NEIGHBOURLY and self.incumbent.feasible:
            until = self.clock.left() * 0.8
            rng = random.Random(self.seed)
            while not self._closed() and self.clock.left() > until:
                self.prover.improve(min(4.0, self.clock.left() - until), rng)
        if stage_search.wait(self.clock.left()):
            accompany(
                self.arrays, self.incumbent, self.clock, self.seed + 1,
                task_classes(self.graph), self.prover.found, self._closed,
            )  # fmt: skip

    def _closed(self) -> bool:
        return self.closing.is_set() or self.bounder.infeasible or self.incumbent.done

    def _bound_counted(self) -> None:
        steps = _STEP_SECONDS * (self.step_limit or 0) / 4
        for _ in range(4):
            self.bounder.round(self.clock.left(), steps)
            self.incumbent.raise_bound(self.graph.duration + self.bounder.extra)
            if self.bounder.exhausted or self.bounder.infeasible:
                return

    def _target(self) -> int:
        if self.incumbent.feasible:
            return self.incumbent.duration - self.graph.duration
        return 2**60

    def solution(self) -> Solution:
        """The answer as it stands."""
        least = working_set(self.arrays)
        if self.bounder.infeasible:
            least = max(least, self.incumbent.budget + 1)
        copies = "any number of recomputations"
        if cap := self.incumbent.cap:
            copies = f"at most {cap} executions of a task, recomputed in input order"
        return _answer(self.incumbent, least, f"{copies}, first executions in input order")
