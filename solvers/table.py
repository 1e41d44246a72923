"""The one array that the compiled stage search works on.

A task graph, a set of recomputations and the search's incumbent share one two-dimensional array
of integers; its rows are named here. One array rather than thirty keeps compiling fast: every
array that a compiled function takes adds half a dozen arguments to every call.
"""

from __future__ import annotations

import numpy as np

from graphopt.solvers.arrays import Array, Arrays
from graphopt.solvers.stages import StagePlan

MAX_RUNS = 8  # recomputations a task may have

# Totals: columns of the row TOTAL.
(N_TASKS, EXTRA, EXCESS, LOGGED, LOG_SIZE, SOILED, TASKS, STAMP, NODES, MOST, POOLED,
 BEST_EXTRA, BEST_EXCESS, RANDOM, JOBS, CHAIN, PULL, PUSH, LIMIT) = range(19)  # fmt: skip

_ROWS = [
    # the graph; per task
    "DURATION", "WORKSPACE", "RECOMPUTABLE", "IN_PTR", "OUT_PTR", "OUT_BYTES", "MEMBER",
    # per value
    "BYTES", "PRODUCER", "KEEP", "USE_PTR",
    # lists
    "IN_IDX", "OUT_IDX", "USE_IDX", "POOL",
    # the state; per task: how often it is recomputed, where it stands in LISTED
    "COUNT", "PLACE", "LISTED",
    # per stage: last node, peak minus budget, peak minus bytes live on entering, stale ones
    "HEAD", "OVER", "LOCAL", "DIRTY", "IS_DIRTY",
    # per node: the task recomputed, the node before it in the stage; unused nodes
    "NODE_TASK", "NODE_NEXT", "FREE",
    # work to do
    "JOB", "JOB_STAGE", "JOB_TASK",
    # scratch per value, totals
    "MARK", "TOTAL",
    # changes since the last commit
    "LOG", "LOG_STAGE", "LOG_TASK",
    # the incumbent
    "BEST_COUNT",
]  # fmt: skip
(DURATION, WORKSPACE, RECOMPUTABLE, IN_PTR, OUT_PTR, OUT_BYTES, MEMBER, BYTES, PRODUCER, KEEP,
 USE_PTR, IN_IDX, OUT_IDX, USE_IDX, POOL, COUNT, PLACE, LISTED, HEAD, OVER, LOCAL, DIRTY,
 IS_DIRTY, NODE_TASK, NODE_NEXT, FREE, JOB, JOB_STAGE, JOB_TASK, MARK, TOTAL, LOG, LOG_STAGE,
 LOG_TASK, BEST_COUNT) = range(len(_ROWS))  # fmt: skip
PUT, ADD, DROP, TIDY = range(4)  # kinds of jobs
RUNS = len(_ROWS)  # MAX_RUNS rows: the stages that recompute a task, ascending
BEST_RUNS = RUNS + MAX_RUNS  # the same for the incumbent
NEVER = 2**62


def new_table(arrays: Arrays, budget: int, classes: Array | None = None) -> Array:
    """The table of a task graph with nothing recomputed.

    Args:
        arrays: the task graph.
        budget: bytes.
        classes: per task, a number that tasks of repeated blocks share.
    """
    n = len(arrays.duration)
    nodes = 4 * n + 64
    width = max(nodes, len(arrays.in_idx), len(arrays.out_idx), len(arrays.bytes)) + 1
    x = np.zeros((BEST_RUNS + MAX_RUNS, width), np.int64)
    for name in Arrays._fields:
        column = getattr(arrays, name)
        x[globals()[name.upper()], : len(column)] = column
    pool = np.flatnonzero((arrays.recomputable > 0) & (np.diff(arrays.out_ptr) > 0))
    x[POOL, : len(pool)] = pool
    x[MEMBER, :n] = np.arange(n) if classes is None else classes
    x[LOCAL, :n] = arrays.out_bytes + arrays.workspace
    x[OVER, :n] = StagePlan(arrays).peaks() - budget
    x[FREE, :nodes] = np.arange(nodes)
    for row in (HEAD, PLACE, NODE_NEXT, MARK):
        x[row] = -1
    x[TOTAL, N_TASKS] = n
    x[TOTAL, EXCESS] = np.maximum(x[OVER, :n], 0).sum()
    x[TOTAL, NODES] = nodes
    x[TOTAL, LOG_SIZE] = width
    x[TOTAL, MOST] = NEVER
    x[TOTAL, POOLED] = len(pool)
    x[TOTAL, BEST_EXTRA] = x[TOTAL, BEST_EXCESS] = NEVER
    return x


def set_best(x: Array, plan: StagePlan, budget: int) -> None:
    """Makes `plan` the incumbent; recomputations beyond `MAX_RUNS` a task are left out."""
    x[BEST_COUNT] = 0
    for task, stages in plan.extras.items():
        kept = stages[:MAX_RUNS]
        x[BEST_COUNT, task] = len(kept)
        x[BEST_RUNS : BEST_RUNS + len(kept), task] = kept
    x[TOTAL, BEST_EXTRA] = plan.extra
    x[TOTAL, BEST_EXCESS] = np.maximum(plan.peaks() - budget, 0).sum()
    if any(len(stages) > MAX_RUNS for stages in plan.extras.values()):
        x[TOTAL, BEST_EXTRA] = x[TOTAL, BEST_EXCESS] = NEVER


def best_plan(x: Array) -> list[int]:
    """The incumbent as a plan."""
    n = int(x[TOTAL, N_TASKS])
    stages: list[list[int]] = [[] for _ in range(n)]
    for task in np.flatnonzero(x[BEST_COUNT, :n]).tolist():
        for i in range(int(x[BEST_COUNT, task])):
            stages[int(x[BEST_RUNS + i, task])].append(task)
    return [task for stage in range(n) for task in (*stages[stage], stage)]
