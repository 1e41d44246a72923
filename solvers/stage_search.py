"""Stage search: simulated annealing over any set of recomputations, several a task if need be.

A move evicts a value from a gap between two uses and recomputes it, lazily, in the stage of the
later use; dead inputs are recomputed as well (a chain), brought forward from a later stage, or
kept alive. Other moves take recomputations back, shift them, or do the same to a run of
neighbouring tasks or to every task of the same class (repeated blocks).
"""

from __future__ import annotations

import math

from numba import njit

from graphopt.solvers.stage_queries import (
    INNER,
    JIT,
    end_of,
    last_use,
    next_use,
    rand,
    run_after,
    run_before,
    runs_in,
)
from graphopt.solvers.stage_state import flush, keep_if_best, load_best, push, work
from graphopt.solvers.table import (
    ADD,
    BYTES,
    CHAIN,
    COUNT,
    DROP,
    DURATION,
    EXCESS,
    EXTRA,
    JOBS,
    LIMIT,
    LISTED,
    LOGGED,
    MEMBER,
    MOST,
    N_TASKS,
    NEVER,
    OUT_IDX,
    OUT_PTR,
    OVER,
    POOL,
    POOLED,
    PULL,
    PUSH,
    RECOMPUTABLE,
    RUNS,
    TASKS,
    TIDY,
    TOTAL,
)

EVICT, RELEASE, SWAP, SHIFT, EVICT_RUN, RELEASE_RUN, EVICT_CLASS, RELEASE_CLASS = range(8)
KINDS = 8


@njit(**INNER)
def _evict(x, task, longest):
    """Drops an output of `task` in one gap between uses and recomputes it after the gap."""
    n = x[TOTAL, N_TASKS]
    outputs = x[OUT_PTR, task + 1] - x[OUT_PTR, task]
    value = x[OUT_IDX, x[OUT_PTR, task] + int(rand(x) * outputs)]
    position = task
    if not longest:
        position = task + int(rand(x) * (n - task))
    target = -1
    width = 0
    while True:
        following = next_use(x, value, position)
        if following >= n:
            break
        if following - position > width and not runs_in(x, task, following):
            width = following - position
            target = following
        position = following
        if not longest:
            break
    if target > task:
        push(x, ADD, target, task)


@njit(**INNER)
def _relieve(x, tries):
    """Evicts a value from a stage that is over budget; the best of a few at random."""
    n = x[TOTAL, N_TASKS]
    stage = int(rand(x) * n)
    seen = 0
    while x[OVER, stage] <= 0 and seen <= n:
        stage = stage + 1 if stage + 1 < n else 0
        seen += 1
    best = -1.0
    task = -1
    target = -1
    for _ in range(tries):
        other = x[POOL, int(rand(x) * x[TOTAL, POOLED])]
        if other >= stage or runs_in(x, other, stage):
            continue
        start = run_before(x, other, stage)
        following = run_after(x, other, stage, n)
        held = 0
        first = 2 * n
        for i in range(x[OUT_PTR, other], x[OUT_PTR, other + 1]):
            value = x[OUT_IDX, i]
            use = next_use(x, value, stage - 1)
            if use > stage and use < n and end_of(x, value, start, following) > stage:
                held += x[BYTES, value]
                first = min(first, use)
        if held == 0 or first >= n:
            continue
        score = rand(x) * min(held, x[OVER, stage]) / (x[DURATION, other] + 1e-9)
        if score > best:
            best = score
            task = other
            target = first
    if task >= 0:
        push(x, ADD, target, task)


@njit(**INNER)
def _release(x, task):
    """Takes back one recomputation of `task`, and what only served it."""
    stage = x[RUNS + int(rand(x) * x[COUNT, task]), task]
    push(x, TIDY, stage, stage)
    push(x, DROP, stage, task)


@njit(**INNER)
def _shift(x, task):
    """Moves one recomputation of `task` to another stage of the same gap, or a later use."""
    n = x[TOTAL, N_TASKS]
    stage = x[RUNS + int(rand(x) * x[COUNT, task]), task]
    outputs = x[OUT_PTR, task + 1] - x[OUT_PTR, task]
    value = x[OUT_IDX, x[OUT_PTR, task] + int(rand(x) * outputs)]
    if rand(x) < 0.5:
        target = next_use(x, value, stage)
    else:
        low = last_use(x, value, run_before(x, task, stage - 1), stage) + 1
        target = low + int(rand(x) * (stage - low))
    push(x, TIDY, stage, stage)
    if task < target < n:
        push(x, ADD, target, task)
    push(x, DROP, stage, task)


@njit(**INNER)
def _length(x):
    """How long a chain or a run may get: mostly short, sometimes a third of the graph."""
    return 1 + int(math.exp(rand(x) ** 2 * math.log(2.0 + x[TOTAL, N_TASKS] / 3)))


@njit(**INNER)
def _move(x, kind, phase):
    """Jobs for one random move of a kind; returns whether there are any."""
    tasks = x[TOTAL, TASKS]
    if tasks == 0 and kind != EVICT_RUN and kind != EVICT_CLASS:
        kind = EVICT
    if phase == 1 and kind != SWAP:
        return False
    task = x[POOL, int(rand(x) * x[TOTAL, POOLED])]
    if tasks > 0 and kind not in (EVICT, EVICT_RUN, EVICT_CLASS) and phase == 0:
        task = x[LISTED, int(rand(x) * tasks)]
    x[TOTAL, CHAIN] = 1000 if rand(x) < 0.7 else int(rand(x) * 1000)
    x[TOTAL, PULL] = 900 if rand(x) < 0.8 else 200
    x[TOTAL, PUSH] = 700
    x[TOTAL, LIMIT] = _length(x)
    if kind == EVICT or phase == 1:
        for _ in range(1 + int(rand(x) * 1.5)):
            if x[TOTAL, EXCESS] > 0 and rand(x) < 0.8:
                _relieve(x, 4 + int(rand(x) * 40))
            else:
                _evict(x, task, rand(x) < 0.5)
                task = x[POOL, int(rand(x) * x[TOTAL, POOLED])]
    elif kind in (RELEASE, SWAP):
        _release(x, task)
    elif kind == SHIFT:
        _shift(x, task)
    else:
        _group(x, task, kind)
    return x[TOTAL, JOBS] > 0


@njit(**INNER)
def _has_outputs(x, task):
    return x[RECOMPUTABLE, task] and x[OUT_PTR, task + 1] > x[OUT_PTR, task]


@njit(**INNER)
def _group(x, task, kind):
    """Evicts or releases a run of neighbours, or tasks of one class."""
    n = x[TOTAL, N_TASKS]
    low = int(rand(x) * n)
    high = n
    one_class = kind in (EVICT_CLASS, RELEASE_CLASS)
    if not one_class:
        high = min(n, low + 1 + _length(x))
    elif rand(x) < 0.5:
        low = 0
    else:
        high = low + int(rand(x) * (n - low))
    x[TOTAL, CHAIN] = 1000
    x[TOTAL, PULL] = 1000
    x[TOTAL, LIMIT] = 4 * (high - low) + 2
    evict = kind in (EVICT_RUN, EVICT_CLASS)
    for other in range(low, high):
        if one_class and x[MEMBER, other] != x[MEMBER, task]:
            continue
        if not evict and x[COUNT, other] > 0:
            _release(x, other)
        elif evict and x[COUNT, other] == 0 and _has_outputs(x, other):
            _evict(x, other, True)


@njit(**INNER)
def _weigh(score):
    """Fills `score[:, 3]`: a kind's share of the work follows its successes for its work."""
    most = 0.0
    for kind in range(KINDS):
        for column in range(3):
            score[kind, column] *= 0.98
        score[kind, 3] = (score[kind, 1] + 0.5) / (score[kind, 0] + 10.0)
        most = max(most, score[kind, 3])
    for kind in range(KINDS):
        work = (score[kind, 0] + 5.0) / (score[kind, 2] + 1.0)
        score[kind, 3] = max(score[kind, 3], 0.03 * most) / work


@njit(**INNER)
def _pick(x, score):
    """A kind of move, by weight."""
    total = 0.0
    for kind in range(KINDS):
        total += score[kind, 3]
    total *= rand(x)
    for kind in range(KINDS):
        total -= score[kind, 3]
        if total < 0:
            return kind
    return 0


@njit(**JIT)
def anneal(x, score, steps, t0, t1, price, reload):
    """Simulated annealing on the state of the table, which also keeps the incumbent.

    Args:
        x: the table.
        score: per kind of move, (work, successes, tries, weight), changed in place; kinds that
            succeed more often for their work are tried more often.
        steps: moves to make.
        t0: first temperature, in units of duration.
        t1: last temperature.
        price: duration that one byte of excess is worth; adapted on the way and returned.
        reload: whether to begin from the incumbent.
    """
    if reload:
        load_best(x)
    keep_if_best(x)
    infeasible = 0
    extra = x[TOTAL, EXTRA]
    excess = x[TOTAL, EXCESS]
    temperature = t0
    for step in range(steps):
        if step % 100 == 0:
            temperature = t0 * (t1 / t0) ** (step / steps)
            _weigh(score)
        kind = _pick(x, score)
        x[TOTAL, MOST] = int(extra + min(1e17, price * excess + 12 * temperature))
        for phase in range(2):
            if _move(x, kind, phase):
                work(x, False)
                flush(x)
        score[kind, 0] += 1 + x[TOTAL, LOGGED]
        score[kind, 2] += 1
        delta = x[TOTAL, EXTRA] - extra + price * (x[TOTAL, EXCESS] - excess)
        if delta <= 0 or rand(x) < math.exp(-delta / temperature):
            score[kind, 1] += delta < 0
            x[TOTAL, LOGGED] = 0
            extra = x[TOTAL, EXTRA]
            excess = x[TOTAL, EXCESS]
            if delta < 0:
                keep_if_best(x)
        else:
            work(x, True)
            flush(x)
        infeasible += excess > 0
        if step % 100 == 99:
            price *= 1.15 if infeasible > 60 else (0.9 if infeasible < 20 else 1.0)
            infeasible = 0
    x[TOTAL, MOST] = NEVER
    return price
