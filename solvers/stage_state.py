"""Plans as stages, compiled: the incremental bookkeeping under the stage search.

The state is any set of recomputations (stage, task < stage); see `stages.py` for the same thing
in plain Python. Adding or removing one changes the lifetimes of its task's inputs and outputs
only, so the bytes live in every stage, their excess over the budget and the total duration are
kept up to date in time linear in the stages that those lifetimes span.
"""

# ruff: noqa: ANN001, ANN201 -- compiled: types are inferred
from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from graphopt.solvers.arrays import Array, Arrays

MAX_RUNS = 8  # recomputations a task may have
EXTRA, EXCESS, LOGGED, DIRTY, TASKS, STAMP, NODES, MOST = range(8)


class State(NamedTuple):
    """A set of recomputations and what follows from it.

    Attributes:
        count: per task, how often it is recomputed.
        runs: per task, the stages that recompute it, ascending.
        head: per stage, the node of its last recomputation, or -1.
        node_task: per node, the task.
        node_next: per node, the node of the recomputation before it in the stage, or -1.
        free: stack of unused nodes; `stats[NODES]` is its height.
        over: per stage, peak bytes minus the budget.
        local: per stage, peak bytes minus the bytes live on entering the stage.
        listed: tasks that are recomputed, in any order.
        place: per task, its index in `listed`, or -1.
        log: changes since the last commit: (added, stage, task).
        dirty: stages whose `local` is out of date.
        is_dirty: per stage, whether it is in `dirty`.
        mark: scratch per value.
        stats: totals, see the constants above.
    """

    count: Array
    runs: Array
    head: Array
    node_task: Array
    node_next: Array
    free: Array
    over: Array
    local: Array
    listed: Array
    place: Array
    log: Array
    dirty: Array
    is_dirty: Array
    mark: Array
    stats: Array


def new_state(arrays: Arrays, budget: int) -> State:
    """The state without recomputation."""
    from graphopt.solvers.stages import StagePlan

    n, nodes = len(arrays.duration), 4 * len(arrays.duration) + 64
    local = arrays.out_bytes + arrays.workspace
    over = StagePlan(arrays).peaks() - budget
    stats = np.zeros(8, np.int64)
    stats[EXCESS] = np.maximum(over, 0).sum()
    stats[NODES] = nodes
    stats[MOST] = 2**62
    return State(
        count=np.zeros(n, np.int64),
        runs=np.zeros((n, MAX_RUNS), np.int64),
        head=np.full(n, -1, np.int64),
        node_task=np.zeros(nodes, np.int64),
        node_next=np.full(nodes, -1, np.int64),
        free=np.arange(nodes, dtype=np.int64),
        over=over,
        local=local.copy(),
        listed=np.zeros(n, np.int64),
        place=np.full(n, -1, np.int64),
        log=np.zeros((8 * n + 1024, 3), np.int64),
        dirty=np.zeros(n, np.int64),
        is_dirty=np.zeros(n, np.int64),
        mark=np.full(len(arrays.bytes), -1, np.int64),
        stats=stats,
    )


@njit(cache=True, nogil=True)
def run_before(st, task, stage):
    """The last stage <= `stage` in which the task runs (its own stage is <= `stage`)."""
    result = task
    for i in range(st.count[task]):
        if st.runs[task, i] <= stage:
            result = st.runs[task, i]
        else:
            break
    return result


@njit(cache=True, nogil=True)
def run_after(st, task, stage, n):
    """The first stage > `stage` in which the task runs; 2 n if there is none."""
    for i in range(st.count[task]):
        if st.runs[task, i] > stage:
            return st.runs[task, i]
    return 2 * n


@njit(cache=True, nogil=True)
def runs_in(st, task, stage):
    """Whether the task runs in the stage."""
    if task == stage:
        return True
    for i in range(st.count[task]):
        if st.runs[task, i] == stage:
            return True
    return False


@njit(cache=True, nogil=True)
def last_use(a, st, value, low, high):
    """The last stage in [low, high) that uses the value; `low` if there is none."""
    result = low
    for j in range(a.use_ptr[value], a.use_ptr[value + 1]):
        user = a.use_idx[j]
        if result < user < high:
            result = user
        for i in range(st.count[user]):
            s = st.runs[user, i]
            if result < s < high:
                result = s
    return result


@njit(cache=True, nogil=True)
def next_use(a, st, value, after):
    """The first stage > `after` that uses the value; 2 n if there is none."""
    result = 2 * len(a.duration)
    for j in range(a.use_ptr[value], a.use_ptr[value + 1]):
        user = a.use_idx[j]
        if after < user < result:
            result = user
        for i in range(st.count[user]):
            s = st.runs[user, i]
            if after < s < result:
                result = s
    return result


@njit(cache=True, nogil=True)
def end_of(a, st, value, start, following):
    """The last stage that needs the instance created in `start`; n: it lives to the end."""
    n = len(a.duration)
    if following > n and a.keep[value]:
        return n
    return last_use(a, st, value, start, following)


@njit(cache=True, nogil=True)
def _soil(st, stage, n):
    if stage < n and not st.is_dirty[stage]:
        st.is_dirty[stage] = 1
        st.dirty[st.stats[DIRTY]] = stage
        st.stats[DIRTY] += 1


@njit(cache=True, nogil=True)
def _span(st, low, high, size, n):
    """Adds `size` to the bytes live on entering the stages low..high."""
    over = st.over
    before = 0
    after = 0
    for s in range(low, min(high, n - 1) + 1):
        before += max(over[s], 0)
        over[s] += size
        after += max(over[s], 0)
    st.stats[EXCESS] += after - before


@njit(cache=True, nogil=True)
def _link(a, st, stage, task):
    i = st.count[task]
    while i > 0 and st.runs[task, i - 1] > stage:
        st.runs[task, i] = st.runs[task, i - 1]
        i -= 1
    st.runs[task, i] = stage
    st.count[task] += 1
    if st.place[task] < 0:
        st.place[task] = st.stats[TASKS]
        st.listed[st.stats[TASKS]] = task
        st.stats[TASKS] += 1
    st.stats[NODES] -= 1
    node = st.free[st.stats[NODES]]
    st.node_task[node] = task
    previous = -1
    current = st.head[stage]
    while current >= 0 and st.node_task[current] > task:
        previous = current
        current = st.node_next[current]
    st.node_next[node] = current
    if previous < 0:
        st.head[stage] = node
    else:
        st.node_next[previous] = node
    st.stats[EXTRA] += a.duration[task]


@njit(cache=True, nogil=True)
def _unlink(a, st, stage, task):
    i = 0
    while st.runs[task, i] != stage:
        i += 1
    st.count[task] -= 1
    while i < st.count[task]:
        st.runs[task, i] = st.runs[task, i + 1]
        i += 1
    if st.count[task] == 0:
        st.stats[TASKS] -= 1
        other = st.listed[st.stats[TASKS]]
        st.listed[st.place[task]] = other
        st.place[other] = st.place[task]
        st.place[task] = -1
    previous = -1
    current = st.head[stage]
    while st.node_task[current] != task:
        previous = current
        current = st.node_next[current]
    if previous < 0:
        st.head[stage] = st.node_next[current]
    else:
        st.node_next[previous] = st.node_next[current]
    st.free[st.stats[NODES]] = current
    st.stats[NODES] += 1
    st.stats[EXTRA] -= a.duration[task]


@njit(cache=True, nogil=True)
def _lifetimes(a, st, stage, task, sign):
    """Accounts for the recomputation of `task` in `stage`, which is not linked at this moment."""
    n = len(a.duration)
    for i in range(a.in_ptr[task], a.in_ptr[task + 1]):
        value = a.in_idx[i]
        producer = a.producer[value]
        start = run_before(st, producer, stage)
        end = end_of(a, st, value, start, run_after(st, producer, stage, n))
        if end < stage:
            _span(st, end + 1, stage, sign * a.bytes[value], n)
            _soil(st, end, n)
    start = run_before(st, task, stage)
    following = run_after(st, task, stage, n)
    for i in range(a.out_ptr[task], a.out_ptr[task + 1]):
        value = a.out_idx[i]
        if end_of(a, st, value, start, following) >= stage:
            end = last_use(a, st, value, start, stage)
            _span(st, end + 1, stage, -sign * a.bytes[value], n)
            _soil(st, end, n)
    _soil(st, stage, n)


@njit(cache=True, nogil=True)
def add(a, st, stage, task):
    """Recomputes `task` in `stage`, if there is room and the duration is not past `stats[MOST]`."""
    if (
        st.count[task] >= MAX_RUNS
        or st.stats[NODES] == 0
        or st.stats[LOGGED] >= len(st.log)
        or not a.recomputable[task]
        or runs_in(st, task, stage)
        or st.stats[EXTRA] > st.stats[MOST]
    ):
        return False
    _lifetimes(a, st, stage, task, 1)
    _link(a, st, stage, task)
    _note(st, 1, stage, task)
    return True


@njit(cache=True, nogil=True)
def remove(a, st, stage, task):
    """Takes back the recomputation of `task` in `stage`."""
    if st.stats[LOGGED] >= len(st.log):
        return False
    _unlink(a, st, stage, task)
    _lifetimes(a, st, stage, task, -1)
    _note(st, 0, stage, task)
    return True


@njit(cache=True, nogil=True)
def _note(st, added, stage, task):
    k = st.stats[LOGGED]
    st.log[k, 0] = added
    st.log[k, 1] = stage
    st.log[k, 2] = task
    st.stats[LOGGED] = k + 1


@njit(cache=True, nogil=True)
def undo(a, st):
    """Takes back everything since the last commit."""
    for k in range(st.stats[LOGGED] - 1, -1, -1):
        stage = st.log[k, 1]
        task = st.log[k, 2]
        if st.log[k, 0]:
            _unlink(a, st, stage, task)
            _lifetimes(a, st, stage, task, -1)
        else:
            _lifetimes(a, st, stage, task, 1)
            _link(a, st, stage, task)
    st.stats[LOGGED] = 0
    flush(a, st)


@njit(cache=True, nogil=True)
def flush(a, st):
    """Brings `local`, `over` and the excess up to date."""
    for k in range(st.stats[DIRTY]):
        stage = st.dirty[k]
        st.is_dirty[stage] = 0
        if st.head[stage] < 0:
            new = a.out_bytes[stage] + a.workspace[stage]
        else:
            new = _stage_peak(a, st, stage)
        if new != st.local[stage]:
            before = max(st.over[stage], 0)
            st.over[stage] += new - st.local[stage]
            st.local[stage] = new
            st.stats[EXCESS] += max(st.over[stage], 0) - before
    st.stats[DIRTY] = 0


@njit(cache=True, nogil=True)
def _stage_peak(a, st, stage):
    """Peak of a stage minus the bytes live on entering it, walked backwards from its last step.

    The walk counts relative to the bytes live after the stage; on entering, `live` is what the
    walk has come down to.
    """
    n = len(a.duration)
    st.stats[STAMP] += 1
    stamp = st.stats[STAMP]
    live = 0
    peak = 0
    task = stage
    node = st.head[stage]
    while True:
        for i in range(a.in_ptr[task], a.in_ptr[task + 1]):
            value = a.in_idx[i]
            if st.mark[value] != stamp:
                following = run_after(st, a.producer[value], stage, n)
                if end_of(a, st, value, stage, following) <= stage:
                    st.mark[value] = stamp
                    live += a.bytes[value]
        dies = a.workspace[task]
        born = 0
        following = run_after(st, task, stage, n)
        for i in range(a.out_ptr[task], a.out_ptr[task + 1]):
            value = a.out_idx[i]
            if st.mark[value] == stamp or end_of(a, st, value, stage, following) > stage:
                born += a.bytes[value]
            else:
                dies += a.bytes[value]
        peak = max(peak, live + dies)
        live -= born
        if node < 0:
            return peak - live
        task = st.node_task[node]
        node = st.node_next[node]


@njit(cache=True, nogil=True)
def load(a, st, count, runs):
    """Replaces the state by the recomputations given as `count` and `runs`."""
    clear(a, st)
    for task in range(len(a.duration)):
        for i in range(count[task]):
            st.stats[LOGGED] = 0
            add(a, st, runs[task, i], task)
    st.stats[LOGGED] = 0
    flush(a, st)


@njit(cache=True, nogil=True)
def clear(a, st):
    """Removes all recomputations."""
    for task in range(len(a.duration)):
        while st.count[task] > 0:
            st.stats[LOGGED] = 0
            remove(a, st, st.runs[task, st.count[task] - 1], task)
    st.stats[LOGGED] = 0
    flush(a, st)
