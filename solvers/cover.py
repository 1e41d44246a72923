"""The cover bound: a lower bound on the duration, valid for any number of recomputations.

Take the moment of the first execution of task k in any plan that follows the input order. Every
value that a first execution at or after k needs is live then, or its task runs again later. A
task that runs again needs each input live at k, or recomputed after k as well. The bytes live at
k fit the budget. So, with r(t) = 1 if task t is recomputed at all:

    minimise sum of duration(t) * r(t)  subject to these conditions, for a choice of stages k.
"""

from __future__ import annotations

import math

import numpy as np
from ortools.sat.python import cp_model

from graphopt.solvers.arrays import Arrays, to_arrays
from graphopt.solvers.graph import TaskGraph
from graphopt.solvers.stages import StagePlan

_HUGE = 2**60


def working_set(arrays: Arrays) -> int:
    """Most bytes any single task needs at once; no plan in any order has a lower peak."""
    needed = arrays.out_bytes + arrays.workspace
    inputs = np.zeros(len(arrays.duration), np.int64)
    np.add.at(
        inputs,
        np.repeat(np.arange(len(inputs)), np.diff(arrays.in_ptr)),
        arrays.bytes[arrays.in_idx],
    )
    return int((needed + inputs).max())


def least_peak(graph: TaskGraph) -> int:
    """A lower bound on the peak of every plan in every order: its largest working set."""
    return working_set(to_arrays(graph))


class CoverBounder:
    """Raises the cover bound round by round, with more and more stages."""

    def __init__(self, arrays: Arrays, budget: int) -> None:
        """Ranks the stages by how far the plain order is over budget there."""
        self.arrays, self.budget = arrays, budget
        self.infeasible = working_set(arrays) > budget
        self.extra = 0  # no plan within the budget recomputes for a shorter duration
        self.stages: list[int] = []
        self.exhausted = False
        over = StagePlan(arrays).peaks() - budget
        worst = int(np.argmax(over))
        if over[worst] > 0 and not self.infeasible:
            self._knapsack(worst, int(over[worst]))
        self._ranked = [s for s in np.argsort(-over, kind="stable").tolist() if over[s] > 0]
        self._solver: cp_model.CpSolver | None = None
        self._stopped = False

    def _knapsack(self, stage: int, excess: int) -> None:
        """The bound in closed form: whole values dropped at one stage, the last in part."""
        a = self.arrays
        used = a.use_ptr[1:] > a.use_ptr[:-1]
        last = np.full(len(a.bytes), -1)
        last[used] = a.use_idx[a.use_ptr[1:][used] - 1]
        live = (a.producer < stage) & ((last > stage) | (a.keep > 0))
        live[a.in_idx[a.in_ptr[stage] : a.in_ptr[stage + 1]]] = False
        freed = np.zeros(len(a.duration), np.int64)
        np.add.at(freed, a.producer[live], a.bytes[live])
        tasks = np.flatnonzero((freed > 0) & (a.recomputable > 0))
        tasks = tasks[np.argsort(a.duration[tasks] / freed[tasks], kind="stable")]
        for task in tasks.tolist():
            part = min(1.0, excess / int(freed[task]))
            self.extra += math.floor(part * int(a.duration[task]))
            excess -= int(freed[task])
            if excess <= 0:
                return
        self.infeasible = True

    def stop(self) -> None:
        """Ends a running round early; may be called from another thread."""
        self._stopped = True
        if self._solver is not None:
            self._solver.stop_search()

    def round(self, time_limit: float, steps: float | None = None, target: int = _HUGE) -> bool:
        """Adds stages and solves the relaxation again.

        Args:
            time_limit: seconds.
            steps: CP-SAT's deterministic time, for repeatable answers.
            target: stop once the bound on the extra duration is this high.

        Returns:
            Whether the relaxation was solved to the end.
        """
        self._widen()
        model = cp_model.CpModel()
        again: dict[int, cp_model.IntVar] = {}
        for stage in self.stages:
            if self._stopped:
                return False
            add_conditions(model, self.arrays, self.budget, stage, again)
        extra = sum(int(self.arrays.duration[t]) * var for t, var in again.items())
        if again:
            model.add(extra >= self.extra)
        model.minimize(extra)
        solver = self._solver = cp_model.CpSolver()
        solver.parameters.num_workers = 1
        solver.parameters.linearization_level = 2
        solver.parameters.catch_sigint_signal = False
        solver.parameters.max_time_in_seconds = max(0.05, time_limit)
        if steps is not None:
            solver.parameters.max_deterministic_time = steps
        solver.best_bound_callback = lambda bound: self._note(bound, target, solver)
        status = solver.solve(model)
        if status == cp_model.INFEASIBLE:
            self.infeasible = True
        elif status != cp_model.MODEL_INVALID:
            self._note(solver.best_objective_bound, target, solver)
        return status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)

    def _note(self, bound: float, target: int, solver: cp_model.CpSolver) -> None:
        if abs(bound) < _HUGE:
            self.extra = max(self.extra, math.ceil(bound - 1e-6))
        if self.extra >= target:
            solver.stop_search()

    def _widen(self) -> None:
        """Adds the stages most over budget, well apart; then the ones in between."""
        n, wanted = len(self.arrays.duration), max(1, 2 * len(self.stages))
        distance = max(1, n // 50)
        while len(self.stages) < wanted and distance:
            for stage in self._ranked:
                if len(self.stages) >= wanted:
                    break
                if all(abs(stage - other) >= distance for other in self.stages):
                    self.stages.append(stage)
            distance //= 2
        self.exhausted = len(self.stages) >= len(self._ranked)


def add_conditions(
    model: cp_model.CpModel,
    arrays: Arrays,
    budget: int,
    stage: int,
    again: dict[int, cp_model.IntVar],
) -> dict[int, cp_model.IntVar]:
    """Adds what must hold when task `stage` runs for the first time.

    Args:
        model: changed in place.
        arrays: the task graph.
        budget: bytes.
        stage: the task.
        again: per task, "is recomputed"; filled where missing.

    Returns:
        Per task that matters, "runs again after that moment".
    """
    return _Moment(model, arrays, budget, stage, again).late


class _Moment:
    """The conditions at one stage."""

    def __init__(
        self,
        model: cp_model.CpModel,
        arrays: Arrays,
        budget: int,
        stage: int,
        again: dict[int, cp_model.IntVar],
    ) -> None:
        self._model, self._a, self._again = model, arrays, again
        self._inputs = set(self._inputs_of(stage))
        self._live: dict[int, cp_model.IntVar] = {}
        self._todo: list[int] = []
        self.late: dict[int, cp_model.IntVar] = {}
        for value in self._needed(stage):
            model.add(self._held(value) + self._later(int(arrays.producer[value])) >= 1)
        while self._todo:
            task = self._todo.pop()
            for value in self._inputs_of(task):
                if value not in self._inputs:
                    redo = self._later(int(arrays.producer[value]))
                    model.add(self._held(value) + redo >= self.late[task])
        fixed = int(arrays.out_bytes[stage] + arrays.workspace[stage])
        fixed += sum(int(arrays.bytes[v]) for v in self._inputs)
        load = sum(int(arrays.bytes[v]) * var for v, var in self._live.items())
        model.add(fixed + load <= budget)

    def _inputs_of(self, task: int) -> list[int]:
        return self._a.in_idx[self._a.in_ptr[task] : self._a.in_ptr[task + 1]].tolist()

    def _needed(self, stage: int) -> list[int]:
        """Values made before the stage, not its inputs, that something later needs."""
        a = self._a
        used = a.use_ptr[1:] > a.use_ptr[:-1]
        last = np.where(
            used, a.use_idx[np.maximum(a.use_ptr[1:] - 1, 0)] if len(a.use_idx) else 0, -1
        )
        needed = (a.producer < stage) & ((last > stage) | (a.keep > 0))
        return [v for v in np.flatnonzero(needed).tolist() if v not in self._inputs]

    def _held(self, value: int) -> cp_model.IntVar:
        if value not in self._live:
            self._live[value] = self._model.new_bool_var("")
        return self._live[value]

    def _later(self, task: int) -> cp_model.IntVar | int:
        if not self._a.recomputable[task]:
            return 0
        if task not in self.late:
            self.late[task] = self._model.new_bool_var("")
            if task not in self._again:
                self._again[task] = self._model.new_bool_var("")
            self._model.add_implication(self.late[task], self._again[task])
            self._todo.append(task)
        return self.late[task]
