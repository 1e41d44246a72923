"""Questions about a plan as stages, compiled: when tasks run and until when values live.

All functions work on the array of `table.py`, called x.
"""

from __future__ import annotations

from numba import njit

from graphopt.solvers.table import (
    COUNT,
    KEEP,
    N_TASKS,
    RANDOM,
    RUNS,
    TOTAL,
    USE_IDX,
    USE_PTR,
)

# Only what Python calls needs a wrapper; leaving the others' out halves the time to compile.
JIT = {"cache": True, "nogil": True, "no_cfunc_wrapper": True, "error_model": "numpy"}
INNER = {
    "nogil": True,
    "no_cfunc_wrapper": True,
    "no_cpython_wrapper": True,
    "error_model": "numpy",
}


@njit(**INNER)
def rand(x):
    """A random number in [0, 1); the generator's state is part of the table."""
    state = (x[TOTAL, RANDOM] * 25214903917 + 11) & 281474976710655
    x[TOTAL, RANDOM] = state
    return (state >> 16) * 2.3283064365386963e-10


@njit(**INNER)
def run_before(x, task, stage):
    """The last stage <= `stage` in which the task runs (its own stage is <= `stage`)."""
    result = task
    for i in range(x[COUNT, task]):
        if x[RUNS + i, task] <= stage:
            result = x[RUNS + i, task]
        else:
            break
    return result


@njit(**INNER)
def run_after(x, task, stage, n):
    """The first stage > `stage` in which the task runs; 2 n if there is none."""
    for i in range(x[COUNT, task]):
        if x[RUNS + i, task] > stage:
            return x[RUNS + i, task]
    return 2 * n


@njit(**INNER)
def runs_in(x, task, stage):
    """Whether the task runs in the stage."""
    found = task == stage
    for i in range(x[COUNT, task]):
        found = found or x[RUNS + i, task] == stage
    return found


@njit(**INNER)
def last_use(x, value, low, high):
    """The last stage in [low, high) that uses the value; `low` if there is none."""
    result = low
    for j in range(x[USE_PTR, value], x[USE_PTR, value + 1]):
        user = x[USE_IDX, j]
        if result < user < high:
            result = user
        for i in range(x[COUNT, user]):
            s = x[RUNS + i, user]
            if result < s < high:
                result = s
    return result


@njit(**INNER)
def next_use(x, value, after):
    """The first stage > `after` that uses the value; 2 n if there is none."""
    result = 2 * x[TOTAL, N_TASKS]
    for j in range(x[USE_PTR, value], x[USE_PTR, value + 1]):
        user = x[USE_IDX, j]
        if after < user < result:
            result = user
        for i in range(x[COUNT, user]):
            s = x[RUNS + i, user]
            if after < s < result:
                result = s
    return result


@njit(**INNER)
def end_of(x, value, start, following):
    """The last stage that needs the instance created in `start`; n: it lives to the end."""
    n = x[TOTAL, N_TASKS]
    if following > n and x[KEEP, value]:
        return n
    return last_use(x, value, start, following)
