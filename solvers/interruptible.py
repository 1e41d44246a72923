"""CP-SAT in a thread of its own, so that the caller's can take an interrupt."""

from __future__ import annotations

import threading

from ortools.sat.python import cp_model


def solve_interruptibly(
    solver: cp_model.CpSolver,
    model: cp_model.CpModel,
    watcher: cp_model.CpSolverSolutionCallback,
) -> int:
    """Solves a constraint program with one worker; an interrupt stops it and goes on upwards.

    Args:
        solver: its parameters say how long.
        model: the program.
        watcher: called, from another thread, with every solution.

    Returns:
        CP-SAT's status.

    Raises:
        AssertionError: the program is invalid.
    """
    solver.parameters.catch_sigint_signal = False
    status: list[int] = []
    thread = threading.Thread(
        target=lambda: status.append(int(solver.solve(model, watcher))), daemon=True
    )
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.05)
    finally:
        while thread.is_alive():
            solver.stop_search()
            thread.join(0.05)
    if not status or status[0] == cp_model.MODEL_INVALID:
        raise AssertionError(model.validate() or "CP-SAT failed")
    return status[0]
