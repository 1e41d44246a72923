"""Plan search: drop-set and stage search in turns, in short compiled chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from graphopt.solvers import table as T
from graphopt.solvers.arrays import Array, Arrays, to_arrays
from graphopt.solvers.blocks import task_classes
from graphopt.solvers.clock import Clock
from graphopt.solvers.compiling import Compiled
from graphopt.solvers.graph import Task, TaskGraph, Value
from graphopt.solvers.solution import Incumbent
from graphopt.solvers.stages import StagePlan, from_sequence

_CHUNK = 0.1  # seconds of compiled work between looks at the clock
_FALL = 0.002  # last temperature of a cycle relative to its first
# A cycle: the search, its first temperature relative to the mean duration, its share of the time.
_CYCLES = (
    ("stage", 0.3, 1.0),
    ("drop", 1.0, 1.0),
    ("stage", 0.1, 1.0),
    ("stage", 0.3, 2.0),
    ("drop", 0.3, 1.0),
    ("stage", 0.05, 1.0),
    ("stage", 0.6, 2.0),
    ("stage", 0.1, 2.0),
)


class Search:
    """Searches for one call of `solve`, improving the incumbent.

    Args:
        graph: the task graph.
        arrays: the same, flat.
        incumbent: what to improve.
        clock: how long to go on.
        seed: of all random choices.
        stop: asked between chunks whether to give up early.
    """

    def __init__(
        self,
        graph: TaskGraph,
        arrays: Arrays,
        incumbent: Incumbent,
        clock: Clock,
        seed: int,
        stop: Callable[[], bool],
    ) -> None:
        """Builds the tables both searches work on."""
        from graphopt.solvers.dropset import CutSpace
        from graphopt.solvers.stage_search import KINDS

        self.graph, self.arrays, self.incumbent, self.clock = graph, arrays, incumbent, clock
        self.stop, self.seed = stop, seed
        self.mean = max(graph.duration, 1) / len(graph.tasks)
        self.space = CutSpace(arrays)
        self.cut = self.space.start.copy()
        self.best_cut, self.best = self.cut.copy(), np.full(2, T.NEVER, np.int64)
        self.x = T.new_table(arrays, incumbent.budget, task_classes(graph))
        self.x[T.TOTAL, T.RANDOM] = (seed * 7919 + 12345) & (2**48 - 1)
        self.score = np.zeros((KINDS, 4))
        excess = max(1, int(self.x[T.TOTAL, T.EXCESS]))
        self.price = {"stage": graph.duration / excess, "drop": 0.05 * graph.duration / excess}
        self.drop_helps = True  # until it has had its turn without an improvement
        self.rate = {"stage": 300, "drop": 300}

    def run(self, plan: StagePlan | None = None) -> None:
        """Cycles until the clock runs out, the incumbent is good enough, or it is told to stop.

        Args:
            plan: where the stage search begins, even if it is over budget.
        """
        if plan is not None:
            T.set_best(self.x, plan, self.incumbent.budget)
        begin = 0.0 if self.clock.counted else self.clock.used()
        unit = (1.0 - begin) / sum(share for _, _, share in _CYCLES)
        number = 0
        while not self._done():
            kind, heat, share = _CYCLES[number % len(_CYCLES)]
            if kind == "drop" and not self.drop_helps:
                kind, heat = "stage", 0.2
            if kind == "drop" and not drop_set.wait(1e9 if self.clock.counted else 0.02):
                kind = "stage"
            if kind == "drop" and self.best[0] == T.NEVER:
                self._checkpoint_starts()
            until = self.clock.used() + unit * share
            before = self.incumbent.sequence
            self._cycle(kind, heat, until)
            if kind == "drop":
                self.drop_helps = self.incumbent.sequence != before
            number += 1

    def _done(self) -> bool:
        return self.clock.over() or self.incumbent.done or self.stop()

    def _cycle(self, kind: str, heat: float, until: float) -> None:
        start, reload = self.clock.used(), True
        name = "stage search" if kind == "stage" else "drop-set search"
        self.incumbent.report(name)
        if kind == "stage":
            self._share_incumbent()
        else:
            self.cut[:] = self.best_cut
        while not self._done():
            part = (self.clock.used() - start) / max(until - start, 1e-9)
            if part >= 1:
                return
            hot = heat * self.mean * _FALL**part
            began = time.thread_time()  # not wall time: other threads may hold the interpreter
            moves = self.rate[kind]
            if kind == "stage":
                self._stage_chunk(moves, hot, reload)
            else:
                self._drop_chunk(moves, hot)
            reload = False
            self._account(kind, moves, time.thread_time() - began)
            self.incumbent.report()

    def _account(self, kind: str, moves: int, seconds: float) -> None:
        if self.clock.counted:
            self.clock.spend(max(1, moves // 50))
            return
        factor = min(3.0, _CHUNK / max(seconds, 1e-4))
        self.rate[kind] = int(np.clip(moves * factor, 50, 10_000_000))

    def _stage_chunk(self, moves: int, hot: float, reload: bool) -> None:
        from graphopt.solvers.stage_search import anneal

        x, before = self.x, (self.x[T.TOTAL, T.BEST_EXCESS], self.x[T.TOTAL, T.BEST_EXTRA])
        self.price["stage"] = anneal(
            x, self.score, moves, hot, hot * 0.99, self.price["stage"], reload
        )
        after = (x[T.TOTAL, T.BEST_EXCESS], x[T.TOTAL, T.BEST_EXTRA])
        if after < before and (after[0] == 0 or not self.incumbent.feasible):
            self.incumbent.offer(T.best_plan(x), "stage search")

    def _drop_chunk(self, moves: int, hot: float) -> None:
        from graphopt.solvers.dropset import anneal

        self.seed += 1
        before = tuple(self.best)
        s = self.space
        self.price["drop"] = anneal(
            self.arrays, self.incumbent.budget, self.cut, self.best_cut, self.best,
            s.options, s.opt_ptr, s.gap_cut, s.pool, moves, hot, hot * 0.99,
            self.price["drop"], self.seed & (2**31 - 1),
        )  # fmt: skip
        if tuple(self.best) < before and (self.best[0] == 0 or not self.incumbent.feasible):
            self._offer_cut(self.best_cut, "drop-set search")

    def _offer_cut(self, cut: Array, name: str) -> None:
        from graphopt.solvers.dropset import evaluate, to_sequence

        _, stage, _ = evaluate(self.arrays, cut)
        self.incumbent.offer(to_sequence(stage), name)

    def _share_incumbent(self) -> None:
        """Hands the incumbent to the stage search if it is better than what that has."""
        n = len(self.graph.tasks)
        sequence = [*self.incumbent.sequence, *range(len(self.incumbent.graph.tasks), n)]
        plan = from_sequence(self.arrays, sequence)
        excess = int(np.maximum(plan.peaks() - self.incumbent.budget, 0).sum())
        mine = (int(self.x[T.TOTAL, T.BEST_EXCESS]), int(self.x[T.TOTAL, T.BEST_EXTRA]))
        if (excess, plan.extra) < mine:
            T.set_best(self.x, plan, self.incumbent.budget)

    def _checkpoint_starts(self) -> None:
        """Offers block, square-root and min-cut checkpointing; the best begins the drop sets."""
        from graphopt.solvers.dropset import evaluate
        from graphopt.solvers.starts import checkpoint_cuts

        for name, cut in checkpoint_cuts(self.arrays, self.space):
            extra, _, peaks = evaluate(self.arrays, cut)
            excess = int(np.maximum(peaks - self.incumbent.budget, 0).sum())
            if (excess, extra) < (int(self.best[0]), int(self.best[1])):
                self.best[:] = (excess, extra)
                self.best_cut[:] = cut
            known = self.incumbent.starts.get(name)
            peak = int(peaks.max())
            found = (peak, self.graph.duration + extra)
            if known is None or (peak > self.incumbent.budget, found[1], peak) < (
                known[0] > self.incumbent.budget,
                known[1],
                known[0],
            ):
                self._offer_cut(cut, name)
            if self._done():
                return


def _tiny_search() -> Search:
    tasks = tuple(Task(1, (i - 1,) if i else (), (i,)) for i in range(4))
    graph = TaskGraph(tasks, tuple(Value(1, i) for i in range(4)))
    incumbent = Incumbent(graph, 0, "input", None)
    return Search(graph, to_arrays(graph), incumbent, Clock(incumbent, 60, 1), 0, lambda: False)


def _compile_stage() -> None:
    search = _tiny_search()
    search._stage_chunk(1, 1.0, True)
    drop_set.start()


def _compile_drop() -> None:
    search = _tiny_search()
    search._drop_chunk(1, 1.0)


stage_search = Compiled(_compile_stage)
drop_set = Compiled(_compile_drop)


def prepare(seconds: float = 0.0) -> bool:
    """Begins to compile the searches in the background; a later `solve` has them sooner.

    Args:
        seconds: how long to wait for them.

    Returns:
        Whether they are ready.
    """
    return stage_search.wait(seconds)
