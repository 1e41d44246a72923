"""Stage search: simulated annealing over any set of recomputations, several a task if need be.

A move evicts a value from a gap between two uses and recomputes it, lazily, in the stage of the
later use; dead inputs are recomputed as well (a chain), brought forward from a later stage, or
kept alive. Other moves take recomputations back, shift them, or do the same to a run of
neighbouring tasks or to every task of the same class (repeated blocks).
"""

# ruff: noqa: ANN001, ANN201, ANN202 -- compiled: types are inferred
from __future__ import annotations

import numpy as np
from numba import njit

from graphopt.solvers.stage_state import (
    EXCESS,
    EXTRA,
    LOGGED,
    MOST,
    TASKS,
    add,
    end_of,
    flush,
    last_use,
    next_use,
    remove,
    run_after,
    run_before,
    runs_in,
    undo,
)

EVICT, RELEASE, SWAP, SHIFT, EVICT_RUN, RELEASE_RUN, EVICT_CLASS, RELEASE_CLASS = range(8)
KINDS = 8


@njit(cache=True, nogil=True)
def recompute(a, st, stage, task, chain, pull, limit, stack):
    """Recomputes `task` in `stage`, and dead inputs with it.

    Args:
        a: the task graph.
        st: the state.
        stage: where.
        task: what.
        chain: probability that a dead input is recomputed rather than kept alive.
        pull: probability that a later recomputation of a dead input is brought forward.
        limit: most tasks to recompute; inputs of further ones are kept alive.
        stack: scratch, one entry a task.
    """
    n = len(a.duration)
    stack[0] = task
    height = 1
    while height > 0:
        height -= 1
        task = stack[height]
        if runs_in(st, task, stage):
            continue
        first = height
        for i in range(a.in_ptr[task], a.in_ptr[task + 1]):
            value = a.in_idx[i]
            producer = a.producer[value]
            if not a.recomputable[producer] or a.bytes[value] == 0:
                continue
            start = run_before(st, producer, stage)
            following = run_after(st, producer, stage, n)
            if start == stage or end_of(a, st, value, start, following) >= stage:
                continue
            if following < n and np.random.random() < pull:
                remove(a, st, following, producer)
            elif limit <= 1 or np.random.random() >= chain:
                continue
            if height < len(stack):
                stack[height] = producer
                height += 1
                limit -= 1
        if not add(a, st, stage, task):
            height = first


@njit(cache=True, nogil=True)
def tidy(a, st, stage, push, stack):
    """Removes the recomputations of a stage that nothing uses; may push others to later stages."""
    n = len(a.duration)
    node = st.head[stage]
    while node >= 0:
        task = st.node_task[node]
        node = st.node_next[node]
        following = run_after(st, task, stage, n)
        here = False
        later = 2 * n
        for i in range(a.out_ptr[task], a.out_ptr[task + 1]):
            value = a.out_idx[i]
            for j in range(a.use_ptr[value], a.use_ptr[value + 1]):
                if runs_in(st, a.use_idx[j], stage):
                    here = True
            later = min(later, next_use(a, st, value, stage))
        if here:
            continue
        if later >= following or later >= n:
            remove(a, st, stage, task)
        elif np.random.random() < push:
            remove(a, st, stage, task)
            recompute(a, st, later, task, 1.0, 1.0, 20, stack)


@njit(cache=True, nogil=True)
def _evict(a, st, task, longest, chain, pull, limit, stack):
    """Drops an output of `task` in one gap between uses and recomputes it after the gap."""
    n = len(a.duration)
    outputs = a.out_ptr[task + 1] - a.out_ptr[task]
    if outputs == 0 or not a.recomputable[task]:
        return
    value = a.out_idx[a.out_ptr[task] + int(np.random.random() * outputs)]
    if longest:
        position = task
        target = -1
        width = 1
        while True:
            following = next_use(a, st, value, position)
            if following >= n:
                break
            if following - position > width and not runs_in(st, task, following):
                width = following - position
                target = following
            position = following
    else:
        target = next_use(a, st, value, task + int(np.random.random() * (n - task)))
        if target >= n:
            target = last_use(a, st, value, task, n)
    if target > task and not runs_in(st, task, target):
        recompute(a, st, target, task, chain, pull, limit, stack)


@njit(cache=True, nogil=True)
def _relieve(a, st, tries, pool, chain, pull, limit, stack):
    """Evicts a value from a stage that is over budget; the best of a few at random."""
    n = len(a.duration)
    stage = int(np.random.random() * n)
    seen = 0
    while st.over[stage] <= 0 and seen <= n:
        stage = stage + 1 if stage + 1 < n else 0
        seen += 1
    best = -1.0
    task = -1
    target = -1
    for _ in range(tries):
        other = pool[int(np.random.random() * len(pool))]
        if other >= stage or runs_in(st, other, stage):
            continue
        start = run_before(st, other, stage)
        following = run_after(st, other, stage, n)
        held = 0
        first = 2 * n
        for i in range(a.out_ptr[other], a.out_ptr[other + 1]):
            value = a.out_idx[i]
            if end_of(a, st, value, start, following) > stage:
                use = next_use(a, st, value, stage - 1)
                if use > stage:
                    held += a.bytes[value]
                    first = min(first, use)
        if held == 0 or first >= n:
            continue
        score = np.random.random() * min(held, st.over[stage]) / (a.duration[other] + 1e-9)
        if score > best:
            best = score
            task = other
            target = first
    if task >= 0:
        recompute(a, st, target, task, chain, pull, limit, stack)


@njit(cache=True, nogil=True)
def _release(a, st, task, push, stack):
    """Takes back one recomputation of `task`, and what only served it."""
    stage = st.runs[task, int(np.random.random() * st.count[task])]
    remove(a, st, stage, task)
    tidy(a, st, stage, push, stack)


@njit(cache=True, nogil=True)
def _shift(a, st, task, stack):
    """Moves one recomputation of `task` to another stage of the same gap, or a later use."""
    n = len(a.duration)
    stage = st.runs[task, int(np.random.random() * st.count[task])]
    outputs = a.out_ptr[task + 1] - a.out_ptr[task]
    if outputs == 0:
        return
    remove(a, st, stage, task)
    value = a.out_idx[a.out_ptr[task] + int(np.random.random() * outputs)]
    if np.random.random() < 0.5:
        target = next_use(a, st, value, stage)
    else:
        start = run_before(st, task, stage)
        low = last_use(a, st, value, start, stage) + 1
        target = low + int(np.random.random() * (stage - low))
    chain = 1.0 if np.random.random() < 0.6 else 0.0
    if task < target < n:
        recompute(a, st, target, task, chain, 1.0, 20, stack)
    tidy(a, st, stage, 0.5, stack)


@njit(cache=True, nogil=True)
def _limit(n):
    """How long a chain may get: mostly short, sometimes a third of the graph."""
    return 1 + int(np.exp(np.random.random() ** 2 * np.log(2.0 + n / 3)))


@njit(cache=True, nogil=True)
def _group(a, st, task, kind, low, high, member, stack):
    """Evicts or releases a run of neighbours, or all tasks of a class, within [low, high)."""
    for other in range(high - 1, low - 1, -1):
        if task >= 0 and member[other] != member[task]:
            continue
        if kind == 0:
            if st.count[other] == 0:
                _evict(a, st, other, True, 1.0, 1.0, high - low + 2, stack)
        elif st.count[other] > 0:
            _release(a, st, other, 0.7, stack)


@njit(cache=True, nogil=True)
def _move(a, st, kind, pool, member, stack):
    """One random move of a kind."""
    n = len(a.duration)
    size = len(pool)
    task = pool[int(np.random.random() * size)]
    tasks = st.stats[TASKS]
    if tasks > 0:
        chosen = st.listed[int(np.random.random() * tasks)]
    elif kind != EVICT_RUN and kind != EVICT_CLASS:
        kind = EVICT
    if kind == RELEASE or kind == SWAP:
        _release(a, st, chosen, 0.7, stack)
        flush(a, st)
    if kind == EVICT or kind == SWAP:
        chain = 1.0 if np.random.random() < 0.7 else np.random.random()
        pull = 0.9 if np.random.random() < 0.8 else 0.2
        for _ in range(1 + int(np.random.random() * 1.5)):
            if st.stats[EXCESS] > 0 and np.random.random() < 0.8:
                tries = 4 + int(np.random.random() * 40)
                _relieve(a, st, tries, pool, chain, pull, _limit(n), stack)
            else:
                longest = np.random.random() < 0.5
                _evict(a, st, task, longest, chain, pull, _limit(n), stack)
                task = pool[int(np.random.random() * size)]
    elif kind == SHIFT:
        _shift(a, st, chosen, stack)
    elif kind == EVICT_RUN or kind == RELEASE_RUN:
        length = 1 + _limit(n)
        low = int(np.random.random() * n)
        _group(a, st, -1, int(kind == RELEASE_RUN), low, min(n, low + length), member, stack)
    elif kind == EVICT_CLASS or kind == RELEASE_CLASS:
        low = 0
        high = n
        if np.random.random() < 0.5:
            low = int(np.random.random() * n)
            high = low + int(np.random.random() * (n - low))
        if kind == RELEASE_CLASS:
            task = chosen
        _group(a, st, task, int(kind == RELEASE_CLASS), low, high, member, stack)


@njit(cache=True, nogil=True)
def _pick(weights):
    """A kind of move, by weight."""
    total = np.random.random() * weights.sum()
    for kind in range(len(weights)):
        total -= weights[kind]
        if total < 0:
            return kind
    return 0


@njit(cache=True, nogil=True)
def anneal(a, st, best, best_count, best_runs, pool, member, score, steps, t0, t1, price, seed):
    """Simulated annealing; `st` is the state, `best*` the incumbent, both changed in place.

    Args:
        a: the task graph.
        st: the current state.
        best: (excess, extra duration) of the best state.
        best_count: its recomputations a task.
        best_runs: their stages.
        pool: tasks worth evicting.
        member: per task, the class of tasks that look alike.
        score: per kind of move, (work, successes) so far, changed in place; kinds that succeed
            more often for their work are tried more often.
        steps: moves to make.
        t0: first temperature, in units of duration.
        t1: last temperature.
        price: duration that one byte of excess is worth; adapted on the way and returned.
        seed: of the random numbers.
    """
    np.random.seed(seed)
    stack = np.empty(4 * len(a.duration) + 64, np.int64)
    infeasible = 0
    extra = st.stats[EXTRA]
    excess = st.stats[EXCESS]
    weights = np.ones(len(score))
    for step in range(steps):
        if step % 100 == 0:
            score *= 0.98
            weights = (score[:, 1] + 0.5) / (score[:, 0] + 10.0)
            weights = np.maximum(weights, 0.02 * weights.max())
        kind = _pick(weights)
        temperature = t0 * (t1 / t0) ** (step / steps)
        st.stats[MOST] = int(extra + min(1e18, price * excess + 12 * temperature))
        _move(a, st, kind, pool, member, stack)
        score[kind, 0] += 1 + st.stats[LOGGED]
        flush(a, st)
        delta = st.stats[EXTRA] - extra + price * (st.stats[EXCESS] - excess)
        if delta <= 0 or np.random.random() < np.exp(-delta / temperature):
            score[kind, 1] += delta < 0
            st.stats[LOGGED] = 0
            extra = st.stats[EXTRA]
            excess = st.stats[EXCESS]
            if excess < best[0] or (excess == best[0] and extra < best[1]):
                best[0] = excess
                best[1] = extra
                best_count[:] = st.count
                best_runs[:] = st.runs
        else:
            undo(a, st)
        infeasible += excess > 0
        if step % 100 == 99:
            price *= 1.15 if infeasible > 60 else (0.9 if infeasible < 20 else 1.0)
            infeasible = 0
    st.stats[MOST] = 2**62
    return price
