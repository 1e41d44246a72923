"""Drop-set search: which values to drop, recomputed lazily, found by simulated annealing.

The state has one number a value, its *cut*: the stage after which its first instance may die.
A cut of `n` keeps the value for all its uses. A value that is needed after its cut is recomputed
once, right before the first such use, and so are, recursively, the cut values it is made from.
The plan and its exact peak follow from the cuts in time linear in the size of the graph.

Stage s of a plan is: some recomputations, then the first execution of task s.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numba import njit

from graphopt.solvers.arrays import Array, Arrays


@njit(cache=True, nogil=True)
def recompute_stages(a, cut, stage):
    """Fills `stage[t]` with the stage that recomputes task t (n: never); returns the duration."""
    n = len(a.duration)
    extra = 0
    for t in range(n - 1, -1, -1):
        first = n
        if a.recomputable[t]:
            for i in range(a.out_ptr[t], a.out_ptr[t + 1]):
                v = a.out_idx[i]
                c = cut[v]
                if c >= n:
                    continue
                for j in range(a.use_ptr[v], a.use_ptr[v + 1]):
                    u = a.use_idx[j]
                    if c < u < first:
                        first = u
                    if c < stage[u] < first:
                        first = stage[u]
        stage[t] = first
        if first < n:
            extra += a.duration[t]
    return extra


@njit(cache=True, nogil=True)
def stage_peaks(a, stage, end1, end2, carry, head, link, mark, peaks):
    """Fills `peaks[s]`, the most bytes live at any step of stage s.

    Args:
        a: the task graph.
        stage: per task, the stage that recomputes it, or n.
        end1: scratch per value: last stage of its first instance.
        end2: scratch per value: last stage of its second instance.
        carry: scratch, n + 2: bytes live between stage s - 1 and stage s.
        head: scratch, n + 1: last task recomputed in a stage, or -1.
        link: scratch, n: the task recomputed before this one in the same stage, or -1.
        mark: scratch per value.
        peaks: the result.
    """
    n = len(a.duration)
    _lifetimes(a, stage, end1, end2, carry)
    for s in range(n):
        head[s] = -1
        peaks[s] = carry[s] + a.out_bytes[s] + a.workspace[s]
    for t in range(n):
        if stage[t] < n:
            link[t] = head[stage[t]]
            head[stage[t]] = t
    for v in range(len(a.bytes)):
        mark[v] = -1
    for s in range(n):
        if head[s] >= 0:
            peaks[s] = _mixed_stage(a, s, stage, end1, end2, carry[s + 1], head[s], link, mark)


@njit(cache=True, nogil=True)
def _lifetimes(a, stage, end1, end2, carry):
    """Fills the last stages of both instances of every value, and the bytes between stages."""
    n = len(a.duration)
    carry[:] = 0
    for v in range(len(a.bytes)):
        p = a.producer[v]
        r = stage[p]
        last1 = p
        last2 = r
        for j in range(a.use_ptr[v], a.use_ptr[v + 1]):
            user = a.use_idx[j]
            for u in (user, stage[user]):
                if u < r:
                    last1 = max(last1, u)
                elif u < n:
                    last2 = max(last2, u)
        if a.keep[v]:
            if r < n:
                last2 = n
            else:
                last1 = n
        end1[v] = last1
        end2[v] = last2
        size = a.bytes[v]
        carry[p + 1] += size
        carry[last1 + 1] -= size
        if r < n:
            carry[r + 1] += size
            carry[last2 + 1] -= size
    for s in range(1, n + 1):
        carry[s] += carry[s - 1]


@njit(cache=True, nogil=True)
def _mixed_stage(a, s, stage, end1, end2, live, t, link, mark):
    """Peak of a stage with recomputations, walked backwards from its last step."""
    task = s
    peak = 0
    while task >= 0:
        for i in range(a.in_ptr[task], a.in_ptr[task + 1]):
            v = a.in_idx[i]
            end = end2[v] if stage[a.producer[v]] <= s else end1[v]
            if end <= s and mark[v] != s:
                mark[v] = s
                live += a.bytes[v]
        dies = a.workspace[task]
        freed = 0
        for i in range(a.out_ptr[task], a.out_ptr[task + 1]):
            v = a.out_idx[i]
            end = end1[v] if task == s else end2[v]
            if end > s or mark[v] == s:
                freed += a.bytes[v]
            else:
                dies += a.bytes[v]
        peak = max(peak, live + dies)
        live -= freed
        task = t if task == s else link[task]
    return peak


@njit(cache=True, nogil=True)
def anneal(
    a,
    budget,
    cut,
    best_cut,
    best,
    options,
    opt_ptr,
    gap_cut,
    pool,
    steps,
    t0,
    t1,
    price,
    seed,
):
    """Simulated annealing over cuts; `cut` is the state, `best_cut` and `best` the incumbent.

    Args:
        a: the task graph.
        budget: bytes.
        cut: the current state, changed in place.
        best_cut: the best state met, changed in place.
        best: its (excess bytes, extra duration), changed in place.
        options: the cuts each value may have, in CSR form with `opt_ptr`.
        opt_ptr: see `options`.
        gap_cut: per value, the cut right before its longest gap between uses.
        pool: the values that moves may touch, ordered by producer.
        steps: evaluations to make.
        t0: first temperature, in units of duration.
        t1: last temperature.
        price: duration that one byte of excess is worth; adapted on the way and returned.
        seed: of the random numbers.
    """
    np.random.seed(seed)
    n = len(a.duration)
    m = len(a.bytes)
    stage = np.empty(n, np.int64)
    end1 = np.empty(m, np.int64)
    end2 = np.empty(m, np.int64)
    carry = np.empty(n + 2, np.int64)
    head = np.empty(n + 1, np.int64)
    link = np.empty(n, np.int64)
    mark = np.empty(m, np.int64)
    peaks = np.empty(n, np.int64)
    undo_v = np.empty(m + 8, np.int64)
    undo_c = np.empty(m + 8, np.int64)
    extra = recompute_stages(a, cut, stage)
    stage_peaks(a, stage, end1, end2, carry, head, link, mark, peaks)
    excess = np.maximum(peaks - budget, 0).sum()
    infeasible = 0
    for step in range(steps):
        temperature = t0 * (t1 / t0) ** (step / steps)
        changed = _move(cut, options, opt_ptr, gap_cut, pool, n, undo_v, undo_c)
        if changed == 0:
            continue
        new_extra = recompute_stages(a, cut, stage)
        stage_peaks(a, stage, end1, end2, carry, head, link, mark, peaks)
        new_excess = np.maximum(peaks - budget, 0).sum()
        delta = new_extra - extra + price * (new_excess - excess)
        if delta <= 0 or np.random.random() < np.exp(-delta / temperature):
            extra = new_extra
            excess = new_excess
            if excess < best[0] or (excess == best[0] and extra < best[1]):
                best[0] = excess
                best[1] = extra
                best_cut[:] = cut
        else:
            for i in range(changed - 1, -1, -1):
                cut[undo_v[i]] = undo_c[i]
        infeasible += excess > 0
        if step % 200 == 199:
            price *= 1.15 if infeasible > 120 else (0.9 if infeasible < 40 else 1.0)
            infeasible = 0
    return price


@njit(cache=True, nogil=True)
def _move(cut, options, opt_ptr, gap_cut, pool, n, undo_v, undo_c):
    """Changes 1-3 values, or a run of neighbours, and notes how to undo it."""
    changed = 0
    size = len(pool)
    if np.random.random() < 0.8:
        for _ in range(1 + int(np.random.random() * 3)):
            v = pool[int(np.random.random() * size)]
            new = gap_cut[v]
            if new == cut[v] or np.random.random() < 0.3:
                k = opt_ptr[v + 1] - opt_ptr[v]
                if np.random.random() < 0.7:  # never, or after the last use
                    new = options[opt_ptr[v + 1] - 1 - int(np.random.random() * 2)]
                else:
                    new = options[opt_ptr[v] + int(np.random.random() * k)]
            if new != cut[v]:
                undo_v[changed] = v
                undo_c[changed] = cut[v]
                cut[v] = new
                changed += 1
        return changed
    length = 2 + int(np.exp(np.random.random() * np.log(max(3, size // 3))))
    start = int(np.random.random() * size)
    kind = int(np.random.random() * 3)
    every = 1 if np.random.random() < 0.6 else 2
    for i in range(start, min(size, start + length), every):
        v = pool[i]
        if kind == 0:
            new = gap_cut[v]
        elif kind == 1:
            new = options[opt_ptr[v + 1] - 2]
        else:
            new = n
        if new != cut[v]:
            undo_v[changed] = v
            undo_c[changed] = cut[v]
            cut[v] = new
            changed += 1
    return changed


class CutSpace:
    """The cuts that each value of a task graph may have.

    Attributes:
        options: in CSR form with `opt_ptr`: its producer's stage, each use, n.
        opt_ptr: offsets into `options`.
        gap_cut: the use before its longest gap.
        last_use: its last use (its producer if it has none).
        pool: values that are worth a decision, ordered by producer.
    """

    def __init__(self, arrays: Arrays) -> None:
        """Lists the cuts."""
        n, m = len(arrays.duration), len(arrays.bytes)
        rows = [
            [int(arrays.producer[v]), *arrays.use_idx[arrays.use_ptr[v] : arrays.use_ptr[v + 1]], n]
            for v in range(m)
        ]
        self.opt_ptr = np.zeros(m + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=self.opt_ptr[1:])
        self.options = np.array([c for row in rows for c in row], np.int64)
        self.last_use = np.array([row[-2] for row in rows], np.int64)
        self.gap_cut = np.array([_before_longest_gap(row) for row in rows], np.int64)
        free = (arrays.recomputable[arrays.producer] > 0) & (arrays.bytes > 0)
        used = np.diff(self.opt_ptr) > 2
        self.pool = np.flatnonzero(free & used).astype(np.int64)
        self.pool = self.pool[np.argsort(arrays.producer[self.pool], kind="stable")]
        self.start = np.full(m, n, np.int64)
        self.start[free] = self.last_use[free]


def _before_longest_gap(row: list[int]) -> int:
    uses = row[:-1]
    if len(uses) == 1:
        return uses[0]
    gaps = [later - before for before, later in pairwise(uses)]
    return uses[int(np.argmax(gaps))]


def evaluate(arrays: Arrays, cut: Array) -> tuple[int, Array, Array]:
    """Extra duration, recomputation stage per task and peak bytes per stage of a state."""
    n, m = len(arrays.duration), len(arrays.bytes)
    stage, peaks = np.empty(n, np.int64), np.empty(n, np.int64)
    extra = recompute_stages(arrays, cut, stage)
    end1, end2, mark = (np.empty(m, np.int64) for _ in range(3))
    carry, head, link = (np.empty(n + 2, np.int64) for _ in range(3))
    stage_peaks(arrays, stage, end1, end2, carry, head, link, mark, peaks)
    return int(extra), stage, peaks


def to_sequence(stage: Array) -> list[int]:
    """The plan in which stage s first recomputes, in order, the tasks t with `stage[t] == s`."""
    n = len(stage)
    extras: list[list[int]] = [[] for _ in range(n)]
    for task in np.flatnonzero(stage < n).tolist():
        extras[stage[task]].append(task)
    return [task for s in range(n) for task in (*extras[s], s)]
