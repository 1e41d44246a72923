"""The cover bound: a lower bound on the duration, valid for any number of recomputations.

Take the moment of the first execution of task k in any plan that follows the input order. Every
value that a first execution at or after k needs is live then, or its task runs again later. A
task that runs again needs each input live at k, or recomputed after k as well. The bytes live at
k fit the budget. So, with r(t) = 1 if task t is recomputed at all:

    minimise sum of duration(t) * r(t)  subject to these conditions, for a choice of stages k.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from graphopt.solvers.arrays import Array, Arrays
from graphopt.solvers.stages import StagePlan


@dataclass(frozen=True)
class CoverBound:
    """A bound on what has to be recomputed.

    Attributes:
        extra: no plan within the budget recomputes less than this duration.
        infeasible: whether it is proven that no plan fits the budget.
        tasks: the recomputed tasks of the relaxation's best solution, a hint.
    """

    extra: int
    infeasible: bool
    tasks: tuple[int, ...] = ()


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


def cover_bound(
    arrays: Arrays,
    budget: int,
    *,
    time_limit: float = 5.0,
    step_limit: float | None = None,
    rounds: int = 6,
    workers: int = 1,
) -> CoverBound:
    """Solves the cover relaxation over the stages that bind, added round by round.

    Args:
        arrays: the task graph.
        budget: bytes.
        time_limit: seconds.
        step_limit: CP-SAT's deterministic time instead, for repeatable answers.
        rounds: how often violated stages are added.
        workers: threads of CP-SAT.
    """
    if working_set(arrays) > budget:
        return CoverBound(0, infeasible=True)
    peaks = StagePlan(arrays).peaks()
    chosen: list[int] = []
    best = CoverBound(0, infeasible=False)
    for _ in range(rounds):
        fresh = _violated(arrays, budget, peaks, chosen, best.tasks)
        if not fresh:
            break
        chosen = sorted({*chosen, *fresh})
        found = _relaxation(
            arrays,
            budget,
            chosen,
            time_limit / rounds,
            None if step_limit is None else step_limit / rounds,
            workers,
        )
        if found.infeasible:
            return found
        if found.extra >= best.extra:
            best = found
    return best


def _violated(
    arrays: Arrays, budget: int, peaks: Array, chosen: list[int], tasks: tuple[int, ...]
) -> list[int]:
    """Stages that stay over budget when the given tasks' values are dropped; the worst few."""
    n = len(arrays.duration)
    dropped = np.zeros(n, bool)
    dropped[list(tasks)] = True
    relief = np.zeros(n + 1, np.int64)
    for value in np.flatnonzero(dropped[arrays.producer]).tolist():
        uses = arrays.use_idx[arrays.use_ptr[value] : arrays.use_ptr[value + 1]]
        points = [int(arrays.producer[value]), *uses.tolist()]
        if arrays.keep[value]:
            points.append(n)
        for start, end in zip(points, points[1:], strict=False):
            relief[start + 1 : end] += arrays.bytes[value]
    over = peaks - relief[:n] - budget
    over[chosen] = 0
    order = np.argsort(-over, kind="stable")
    picked: list[int] = []
    for stage in order.tolist():
        if over[stage] <= 0 or len(picked) >= 8:
            break
        if all(abs(stage - other) > n // 60 for other in picked):
            picked.append(stage)
    return picked


def _relaxation(
    arrays: Arrays,
    budget: int,
    stages: list[int],
    time_limit: float,
    step_limit: float | None,
    workers: int,
) -> CoverBound:
    model = cp_model.CpModel()
    again: dict[int, cp_model.IntVar] = {}
    for stage in stages:
        _conditions(model, arrays, budget, stage, again)
    tasks = sorted(again)
    weights = [int(arrays.duration[t]) for t in tasks]
    model.minimize(sum(w * again[t] for w, t in zip(weights, tasks, strict=True)))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = workers
    if step_limit is None:
        solver.parameters.max_time_in_seconds = max(0.05, time_limit)
    else:
        solver.parameters.max_deterministic_time = step_limit
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return CoverBound(0, infeasible=True)
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        picked = tuple(t for t in tasks if solver.value(again[t]))
    else:
        picked = ()
    bound = solver.best_objective_bound if status != cp_model.MODEL_INVALID else 0.0
    return CoverBound(max(0, int(np.ceil(bound - 1e-6))), False, picked)


def _conditions(
    model: cp_model.CpModel,
    arrays: Arrays,
    budget: int,
    stage: int,
    again: dict[int, cp_model.IntVar],
) -> None:
    """What must hold when task `stage` runs for the first time."""
    late: dict[int, cp_model.IntVar] = {}
    live: dict[int, cp_model.IntVar] = {}
    fixed = int(arrays.out_bytes[stage] + arrays.workspace[stage])
    inputs = set(arrays.in_idx[arrays.in_ptr[stage] : arrays.in_ptr[stage + 1]].tolist())
    fixed += sum(int(arrays.bytes[v]) for v in inputs)
    needed, todo = [], []
    for value in range(len(arrays.bytes)):
        if arrays.producer[value] >= stage or value in inputs:
            continue
        last = arrays.use_ptr[value + 1] - 1
        used = last >= arrays.use_ptr[value] and arrays.use_idx[last] > stage
        if used or arrays.keep[value]:
            needed.append(value)

    def present(value: int) -> cp_model.IntVar | int:
        if value in inputs:
            return 1
        if value not in live:
            live[value] = model.new_bool_var("")
        return live[value]

    def later(task: int) -> cp_model.IntVar | int:
        if not arrays.recomputable[task]:
            return 0
        if task not in late:
            late[task] = model.new_bool_var("")
            total = again.get(task)
            if total is None:
                total = again[task] = model.new_bool_var("")
            model.add_implication(late[task], total)
            todo.append(task)
        return late[task]

    for value in needed:
        model.add(present(value) + later(int(arrays.producer[value])) >= 1)
    while todo:
        task = todo.pop()
        for value in arrays.in_idx[arrays.in_ptr[task] : arrays.in_ptr[task + 1]].tolist():
            if value in inputs:
                continue
            held, redo = present(value), later(int(arrays.producer[value]))
            model.add(held + redo >= late[task])
    sizes = [int(arrays.bytes[v]) for v in live]
    model.add(
        fixed + sum(size * var for size, var in zip(sizes, live.values(), strict=True)) <= budget
    )
