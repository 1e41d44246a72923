"""An interrupt ends CP-SAT at once, and reaches the caller."""

from __future__ import annotations

import _thread
import random
import threading
import time

import pytest
from ortools.sat.python import cp_model

from graphopt.solvers.interruptible import solve_interruptibly


class Watcher(cp_model.CpSolverSolutionCallback):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.seen = fails, 0

    def on_solution_callback(self) -> None:
        self.seen += 1
        if self.fails:
            raise ZeroDivisionError


def market_split(rows: int, columns: int) -> cp_model.CpModel:
    """Equations over 0 and 1 that nobody solves quickly (Cornuejols and Dawande, 1998)."""
    model, chance = cp_model.CpModel(), random.Random(0)
    chosen = [model.new_bool_var("") for _ in range(columns)]
    for _ in range(rows):
        weights = [chance.randrange(100) for _ in range(columns)]
        total = sum(weight * x for weight, x in zip(weights, chosen, strict=True))
        model.add(total == sum(weights) // 2)
    return model


def test_an_interrupt_is_taken_while_the_solver_works() -> None:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.max_time_in_seconds = 60
    timer, began = threading.Timer(0.5, _thread.interrupt_main), time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        solve_interruptibly(solver, market_split(6, 50), Watcher())
    assert time.perf_counter() - began < 20


def test_the_status_comes_back() -> None:
    model = cp_model.CpModel()
    x = model.new_int_var(0, 5, "")
    model.maximize(x)
    solver = cp_model.CpSolver()
    watcher = Watcher()
    assert solve_interruptibly(solver, model, watcher) == cp_model.OPTIMAL
    assert solver.value(x) == 5
    assert watcher.seen
    model.add(x > 5)
    assert solve_interruptibly(solver, model, watcher) == cp_model.INFEASIBLE


def test_what_the_watcher_raises_is_not_lost() -> None:
    model = cp_model.CpModel()
    model.maximize(model.new_int_var(0, 5, ""))
    with pytest.raises(ZeroDivisionError):
        solve_interruptibly(cp_model.CpSolver(), model, Watcher(fails=True))
