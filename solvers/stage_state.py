"""Plans as stages, compiled: the incremental bookkeeping under the stage search.

The state is any set of recomputations (stage, task < stage); see `stages.py` for the same thing
in plain Python. Adding or removing one changes the lifetimes of its task's inputs and outputs
only, so the bytes live in every stage, their excess over the budget and the total duration are
kept up to date in time linear in the stages that those lifetimes span.

All functions work on the array of `table.py`, called x.
"""

from __future__ import annotations

from numba import njit

from graphopt.solvers.stage_queries import (
    INNER,
    end_of,
    last_use,
    next_use,
    rand,
    run_after,
    run_before,
    runs_in,
)
from graphopt.solvers.table import (
    ADD,
    BEST_COUNT,
    BEST_EXCESS,
    BEST_EXTRA,
    BEST_RUNS,
    BYTES,
    CHAIN,
    COUNT,
    DIRTY,
    DROP,
    DURATION,
    EXCESS,
    EXTRA,
    FREE,
    HEAD,
    IN_IDX,
    IN_PTR,
    IS_DIRTY,
    JOB,
    JOB_STAGE,
    JOB_TASK,
    JOBS,
    LIMIT,
    LISTED,
    LOCAL,
    LOG,
    LOG_SIZE,
    LOG_STAGE,
    LOG_TASK,
    LOGGED,
    MARK,
    MAX_RUNS,
    MOST,
    N_TASKS,
    NEVER,
    NODE_NEXT,
    NODE_TASK,
    NODES,
    OUT_BYTES,
    OUT_IDX,
    OUT_PTR,
    OVER,
    PLACE,
    PRODUCER,
    PULL,
    PUSH,
    PUT,
    RECOMPUTABLE,
    RUNS,
    SOILED,
    STAMP,
    TASKS,
    TIDY,
    TOTAL,
    WORKSPACE,
)


@njit(**INNER)
def _soil(x, stage, n):
    if stage < n and not x[IS_DIRTY, stage]:
        x[IS_DIRTY, stage] = 1
        x[DIRTY, x[TOTAL, SOILED]] = stage
        x[TOTAL, SOILED] += 1


@njit(**INNER)
def _span(x, low, high, size, n):
    """Adds `size` to the bytes live on entering the stages low..high."""
    over = x[OVER]
    before = 0
    after = 0
    for s in range(low, min(high, n - 1) + 1):
        before += max(over[s], 0)
        over[s] += size
        after += max(over[s], 0)
    x[TOTAL, EXCESS] += after - before


@njit(**INNER)
def _link(x, stage, task):
    i = x[COUNT, task]
    while i > 0 and x[RUNS + i - 1, task] > stage:
        x[RUNS + i, task] = x[RUNS + i - 1, task]
        i -= 1
    x[RUNS + i, task] = stage
    x[COUNT, task] += 1
    if x[PLACE, task] < 0:
        x[PLACE, task] = x[TOTAL, TASKS]
        x[LISTED, x[TOTAL, TASKS]] = task
        x[TOTAL, TASKS] += 1
    x[TOTAL, NODES] -= 1
    node = x[FREE, x[TOTAL, NODES]]
    x[NODE_TASK, node] = task
    previous = -1
    current = x[HEAD, stage]
    while current >= 0 and x[NODE_TASK, current] > task:
        previous = current
        current = x[NODE_NEXT, current]
    x[NODE_NEXT, node] = current
    if previous < 0:
        x[HEAD, stage] = node
    else:
        x[NODE_NEXT, previous] = node
    x[TOTAL, EXTRA] += x[DURATION, task]


@njit(**INNER)
def _unlink(x, stage, task):
    i = 0
    while x[RUNS + i, task] != stage:
        i += 1
    x[COUNT, task] -= 1
    while i < x[COUNT, task]:
        x[RUNS + i, task] = x[RUNS + i + 1, task]
        i += 1
    if x[COUNT, task] == 0:
        x[TOTAL, TASKS] -= 1
        other = x[LISTED, x[TOTAL, TASKS]]
        x[LISTED, x[PLACE, task]] = other
        x[PLACE, other] = x[PLACE, task]
        x[PLACE, task] = -1
    previous = -1
    current = x[HEAD, stage]
    while x[NODE_TASK, current] != task:
        previous = current
        current = x[NODE_NEXT, current]
    if previous < 0:
        x[HEAD, stage] = x[NODE_NEXT, current]
    else:
        x[NODE_NEXT, previous] = x[NODE_NEXT, current]
    x[FREE, x[TOTAL, NODES]] = current
    x[TOTAL, NODES] += 1
    x[TOTAL, EXTRA] -= x[DURATION, task]


@njit(**INNER)
def _lifetimes(x, stage, task, sign):
    """Accounts for the recomputation of `task` in `stage`, which is not linked at this moment."""
    n = x[TOTAL, N_TASKS]
    for i in range(x[IN_PTR, task], x[IN_PTR, task + 1]):
        value = x[IN_IDX, i]
        producer = x[PRODUCER, value]
        start = run_before(x, producer, stage)
        end = end_of(x, value, start, run_after(x, producer, stage, n))
        if end < stage:
            _span(x, end + 1, stage, sign * x[BYTES, value], n)
            _soil(x, end, n)
    start = run_before(x, task, stage)
    following = run_after(x, task, stage, n)
    for i in range(x[OUT_PTR, task], x[OUT_PTR, task + 1]):
        value = x[OUT_IDX, i]
        if end_of(x, value, start, following) >= stage:
            end = last_use(x, value, start, stage)
            _span(x, end + 1, stage, -sign * x[BYTES, value], n)
            _soil(x, end, n)
    _soil(x, stage, n)


@njit(**INNER)
def push(x, job, stage, task):
    """Puts a job on the stack of work to do."""
    top = x[TOTAL, JOBS]
    if top < x[TOTAL, LOG_SIZE]:
        x[JOB, top] = job
        x[JOB_STAGE, top] = stage
        x[JOB_TASK, top] = task
        x[TOTAL, JOBS] = top + 1


@njit(**INNER)
def _may_add(x, stage, task):
    """Whether the task can be recomputed in the stage, and the duration is not past `MOST`."""
    return (
        task < stage
        and x[COUNT, task] < MAX_RUNS
        and x[TOTAL, NODES] > 0
        and x[TOTAL, LOGGED] < x[TOTAL, LOG_SIZE]
        and x[RECOMPUTABLE, task]
        and not runs_in(x, task, stage)
        and x[TOTAL, EXTRA] <= x[TOTAL, MOST]
    )


@njit(**INNER)
def _may_drop(x, stage, task):
    """Whether the task is recomputed in the stage, and there is room to note the change."""
    room = x[TOTAL, LOGGED] < x[TOTAL, LOG_SIZE]
    return room and task != stage and runs_in(x, task, stage)


@njit(**INNER)
def _call_inputs(x, stage, task):
    """Asks for the dead inputs of a task that is to be recomputed in the stage.

    A later recomputation of a dead input is brought forward with probability PULL / 1000; else
    the input is recomputed with probability CHAIN / 1000, at most LIMIT of them; else it is kept
    alive.
    """
    n = x[TOTAL, N_TASKS]
    for i in range(x[IN_PTR, task], x[IN_PTR, task + 1]):
        value = x[IN_IDX, i]
        producer = x[PRODUCER, value]
        if not x[RECOMPUTABLE, producer] or x[BYTES, value] == 0:
            continue
        start = run_before(x, producer, stage)
        following = run_after(x, producer, stage, n)
        if start == stage or end_of(x, value, start, following) >= stage:
            continue
        pull = following < n and rand(x) * 1000 < x[TOTAL, PULL]
        if pull or (x[TOTAL, LIMIT] > 0 and rand(x) * 1000 < x[TOTAL, CHAIN]):
            x[TOTAL, LIMIT] -= 1
            push(x, ADD, stage, producer)
            if pull:
                push(x, DROP, following, producer)


@njit(**INNER)
def _tidy(x, stage, below):
    """Finds the last recomputation of a task < `below` that its stage does not need.

    Nothing uses it, or only later stages do; it is removed or, with probability PUSH / 1000,
    moved to the first later use.
    """
    n = x[TOTAL, N_TASKS]
    node = x[HEAD, stage]
    while node >= 0:
        task = x[NODE_TASK, node]
        node = x[NODE_NEXT, node]
        if task >= below:
            continue
        here = False
        later = 2 * n
        for i in range(x[OUT_PTR, task], x[OUT_PTR, task + 1]):
            value = x[OUT_IDX, i]
            use = next_use(x, value, stage - 1)
            if use == stage:
                here = True
                break
            later = min(later, use)
        if here:
            continue
        useless = later >= n or later >= run_after(x, task, stage, n)
        if useless or rand(x) * 1000 < x[TOTAL, PUSH]:
            push(x, TIDY, stage, task)
            if not useless:
                push(x, ADD, later, task)
            push(x, DROP, stage, task)
            return


@njit(**INNER)
def _note(x, added, stage, task):
    """Logs a change, so that it can be undone."""
    last = x[TOTAL, LOGGED]
    x[LOG, last] = added
    x[LOG_STAGE, last] = stage
    x[LOG_TASK, last] = task
    x[TOTAL, LOGGED] = last + 1


@njit(**INNER)
def work(x, undoing):
    """Does all jobs, or takes back everything since the last commit."""
    while True:
        if undoing:
            if x[TOTAL, LOGGED] == 0:
                return
            last = x[TOTAL, LOGGED] - 1
            x[TOTAL, LOGGED] = last
            added = x[LOG, last] == 0
            stage = x[LOG_STAGE, last]
            task = x[LOG_TASK, last]
        else:
            if x[TOTAL, JOBS] == 0:
                return
            last = x[TOTAL, JOBS] - 1
            x[TOTAL, JOBS] = last
            job = x[JOB, last]
            stage = x[JOB_STAGE, last]
            task = x[JOB_TASK, last]
            if job == TIDY:
                _tidy(x, stage, task)
                continue
            added = job != DROP
            if not (_may_add(x, stage, task) if added else _may_drop(x, stage, task)):
                continue
            if job == ADD:
                _call_inputs(x, stage, task)
            _note(x, added, stage, task)
        if not added:
            _unlink(x, stage, task)
        _lifetimes(x, stage, task, 1 if added else -1)
        if added:
            _link(x, stage, task)


@njit(**INNER)
def flush(x):
    """Brings `local`, `over` and the excess up to date."""
    for k in range(x[TOTAL, SOILED]):
        stage = x[DIRTY, k]
        x[IS_DIRTY, stage] = 0
        if x[HEAD, stage] < 0:
            new = x[OUT_BYTES, stage] + x[WORKSPACE, stage]
        else:
            new = _stage_peak(x, stage)
        if new != x[LOCAL, stage]:
            before = max(x[OVER, stage], 0)
            x[OVER, stage] += new - x[LOCAL, stage]
            x[LOCAL, stage] = new
            x[TOTAL, EXCESS] += max(x[OVER, stage], 0) - before
    x[TOTAL, SOILED] = 0


@njit(**INNER)
def _stage_peak(x, stage):
    """Peak of a stage minus the bytes live on entering it, walked backwards from its last step.

    The walk counts relative to the bytes live after the stage; on entering, `live` is what the
    walk has come down to.
    """
    n = x[TOTAL, N_TASKS]
    x[TOTAL, STAMP] += 1
    stamp = x[TOTAL, STAMP]
    live = 0
    peak = 0
    task = stage
    node = x[HEAD, stage]
    while True:
        for i in range(x[IN_PTR, task], x[IN_PTR, task + 1]):
            value = x[IN_IDX, i]
            if x[MARK, value] != stamp:
                following = run_after(x, x[PRODUCER, value], stage, n)
                if end_of(x, value, stage, following) <= stage:
                    x[MARK, value] = stamp
                    live += x[BYTES, value]
        dies = x[WORKSPACE, task]
        born = 0
        following = run_after(x, task, stage, n)
        for i in range(x[OUT_PTR, task], x[OUT_PTR, task + 1]):
            value = x[OUT_IDX, i]
            if x[MARK, value] == stamp or end_of(x, value, stage, following) > stage:
                born += x[BYTES, value]
            else:
                dies += x[BYTES, value]
        peak = max(peak, live + dies)
        live -= born
        if node < 0:
            return peak - live
        task = x[NODE_TASK, node]
        node = x[NODE_NEXT, node]


@njit(**INNER)
def load_best(x):
    """Replaces the state by the incumbent."""
    x[TOTAL, LOGGED] = 0
    x[TOTAL, MOST] = NEVER
    for task in range(x[TOTAL, N_TASKS]):
        for phase in range(2):
            if phase == 0:
                for i in range(x[COUNT, task]):
                    push(x, DROP, x[RUNS + i, task], task)
            else:
                for i in range(x[BEST_COUNT, task]):
                    push(x, PUT, x[BEST_RUNS + i, task], task)
            work(x, False)
            x[TOTAL, LOGGED] = 0
    flush(x)


@njit(**INNER)
def keep_if_best(x):
    """Makes the state the incumbent if it has less excess, or as much and a shorter duration."""
    excess = x[TOTAL, EXCESS]
    if excess > x[TOTAL, BEST_EXCESS]:
        return
    if excess == x[TOTAL, BEST_EXCESS] and x[TOTAL, EXTRA] >= x[TOTAL, BEST_EXTRA]:
        return
    x[TOTAL, BEST_EXCESS] = excess
    x[TOTAL, BEST_EXTRA] = x[TOTAL, EXTRA]
    for task in range(x[TOTAL, N_TASKS]):
        x[BEST_COUNT, task] = x[COUNT, task]
        for i in range(x[COUNT, task]):
            x[BEST_RUNS + i, task] = x[RUNS + i, task]
