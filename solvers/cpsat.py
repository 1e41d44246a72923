"""Moccasin's constraint program in OR-Tools CP-SAT, for proofs and improvements.

Retention intervals with at most `copies` executions a task, staged start domains on the input
order and a cumulative memory constraint: Bartan et al., "Moccasin: Efficient Tensor
Rematerialization for Neural Networks" (ICML 2023), generalised to several values a task and
workspace. First executions are constants, precedence is a clause of support literals, and the
conditions of the cover bound tie recomputations to the stages that are over budget.

Time is counted in slots: stage s owns the slots s(s+1)/2 .. s(s+1)/2 + s; in slot s(s+1)/2 + v
task v < s may be recomputed, and in its last one task s runs for the first time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from graphopt.solvers.arrays import Arrays
from graphopt.solvers.cover import add_conditions


def slot(stage: int, task: int) -> int:
    """The slot of `task` in `stage`."""
    return stage * (stage + 1) // 2 + task


class RetentionModel:
    """The constraint program for one task graph and budget.

    Args:
        arrays: the task graph.
        budget: bytes.
        copies: most executions of a task.
        extra: least and most duration of all recomputations.
        cover: stages whose cover conditions to add.
        stages: the stages in which each task may be recomputed; None: all after its own. Anything
            narrower makes the program a neighbourhood and its bound a local one.
    """

    def __init__(
        self,
        arrays: Arrays,
        budget: int,
        copies: int,
        extra: tuple[int, int],
        cover: Sequence[int] = (),
        stages: Callable[[int], Sequence[int]] | None = None,
    ) -> None:
        """Builds the program."""
        self.a, self.n = arrays, len(arrays.duration)
        self.end = slot(self.n, 0)
        self.model = cp_model.CpModel()
        self._starts: list[list[Any]] = []
        self._present: list[list[Any]] = []
        self._ends: dict[tuple[int, int], cp_model.IntVar] = {}
        self._intervals: list[cp_model.IntervalVar] = []
        self._demands: list[int] = []
        for task in range(self.n):
            may = bool(arrays.recomputable[task]) and arrays.duration[task] <= extra[1]
            chosen = range(task + 1, self.n) if stages is None else stages(task)
            self._executions(task, copies if may else 1, list(chosen))
        for value in range(len(arrays.bytes)):
            self._instances(value)
        for task in range(self.n):
            for copy in range(len(self._starts[task])):
                self._supports(task, copy)
        self.model.add_cumulative(self._intervals, self._demands, budget)
        self._objective(extra)
        self._cover(budget, cover)

    def _row(self, pointers: np.ndarray, items: np.ndarray, index: int) -> list[int]:
        return items[pointers[index] : pointers[index + 1]].tolist()

    def _executions(self, task: int, copies: int, stages: list[int]) -> None:
        starts: list[Any] = [slot(task, task)]
        present: list[Any] = [1]
        domain = cp_model.Domain.from_values([slot(s, task) for s in stages])
        for _ in range(copies - 1 if stages else 0):
            starts.append(self.model.new_int_var_from_domain(domain, ""))
            present.append(self.model.new_bool_var(""))
            if len(present) > 2:
                self.model.add_implication(present[-1], present[-2])
        self._starts.append(starts)
        self._present.append(present)
        work = int(self.a.workspace[task])
        for start, here in zip(starts, present, strict=True):
            if work:
                self._intervals.append(
                    self.model.new_optional_fixed_size_interval_var(start, 1, here, "")
                )
                self._demands.append(work)

    def _instances(self, value: int) -> None:
        producer = int(self.a.producer[value])
        starts, present = self._starts[producer], self._present[producer]
        for copy, (start, here) in enumerate(zip(starts, present, strict=True)):
            low = slot(producer, producer) + 1 if copy == 0 else 1
            stop = self.model.new_int_var(low, self.end, "")
            self._ends[value, copy] = stop
            if self.a.bytes[value]:
                size = self.model.new_int_var(1, self.end, "")
                self._intervals.append(
                    self.model.new_optional_interval_var(start, size, stop, here, "")
                )
                self._demands.append(int(self.a.bytes[value]))
            else:
                self.model.add(stop >= start + 1).only_enforce_if(here)
            if copy:
                self.model.add(self._ends[value, copy - 1] <= start).only_enforce_if(here)
            if self.a.keep[value]:
                alone = [here]
                if copy + 1 < len(present):
                    alone.append(~present[copy + 1])
                self.model.add(stop == self.end).only_enforce_if(alone)

    def _supports(self, task: int, copy: int) -> None:
        """Some instance of every input is live when the task runs."""
        when, here = self._starts[task][copy], self._present[task][copy]
        for value in self._row(self.a.in_ptr, self.a.in_idx, task):
            producer = int(self.a.producer[value])
            literals = []
            for other, start in enumerate(self._starts[producer]):
                literal = self.model.new_bool_var("")
                literals.append(literal)
                self.model.add(self._ends[value, other] >= when + 1).only_enforce_if(literal)
                if other:
                    self.model.add(start < when).only_enforce_if(literal)
                    self.model.add_implication(literal, self._present[producer][other])
            clause = self.model.add_bool_or(literals)
            if copy:
                clause.only_enforce_if(here)

    def _objective(self, extra: tuple[int, int]) -> None:
        terms = [
            int(self.a.duration[task]) * here
            for task in range(self.n)
            for here in self._present[task][1:]
        ]
        total = sum(terms)
        if terms:
            self.model.add_linear_constraint(total, *extra)
        self.model.minimize(total)

    def _cover(self, budget: int, stages: Sequence[int]) -> None:
        """Ties "runs again after stage k" of the cover conditions to the starts."""
        again = {t: self._present[t][1] for t in range(self.n) if len(self._present[t]) > 1}
        limited = self.a._replace(
            recomputable=np.array([int(t in again) for t in range(self.n)], np.int64)
        )
        for stage in stages:
            late = add_conditions(self.model, limited, budget, stage, again)
            for task, literal in late.items():
                last = self._starts[task][-1]
                if len(self._starts[task]) == 2:
                    self.model.add(last > slot(stage, stage)).only_enforce_if(literal)

    def sequence(self, solver: cp_model.CpSolver | cp_model.CpSolverSolutionCallback) -> list[int]:
        """The plan of a solution."""
        events = []
        for task in range(self.n):
            events.append((slot(task, task), task))
            for start, here in zip(self._starts[task][1:], self._present[task][1:], strict=True):
                if solver.value(here):
                    events.append((solver.value(start), task))
        return [task for _, task in sorted(events)]


class _Watcher(cp_model.CpSolverSolutionCallback):
    """Hands every plan over as soon as it is found."""

    def __init__(self, model: RetentionModel, found: Callable[[list[int]], None]) -> None:
        super().__init__()
        self._model, self._found = model, found

    def on_solution_callback(self) -> None:
        """Called by CP-SAT."""
        self._found(self._model.sequence(self))


def run(
    model: RetentionModel,
    solver: cp_model.CpSolver,
    *,
    time_limit: float,
    steps: float | None = None,
    workers: int = 1,
    seed: int = 0,
    found: Callable[[list[int]], None],
) -> tuple[str, int]:
    """Solves the program; returns ("optimal" | "infeasible" | "unknown", bound on the extra).

    Args:
        model: the program.
        solver: to be able to stop it from another thread.
        time_limit: seconds.
        steps: CP-SAT's deterministic time, for repeatable answers.
        workers: threads.
        seed: of CP-SAT.
        found: called with every plan found.
    """
    parameters = solver.parameters
    parameters.num_workers = workers
    parameters.random_seed = seed & (2**31 - 1)
    parameters.catch_sigint_signal = False
    parameters.linearization_level = 2
    parameters.max_time_in_seconds = max(0.05, time_limit)
    if steps is not None:
        parameters.max_deterministic_time = steps
    status = solver.solve(model.model, _Watcher(model, found))
    bound = solver.best_objective_bound
    extra = math.ceil(bound - 1e-6) if abs(bound) < 2**60 else 0
    if status == cp_model.OPTIMAL:
        return "optimal", extra
    if status == cp_model.INFEASIBLE:
        return "infeasible", 0
    return "unknown", extra


__all__ = ["RetentionModel", "run", "slot"]
