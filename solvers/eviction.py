"""Eviction greedy: while the peak is over budget, drop the value that helps most for its price.

A value may be evicted in several gaps, and an eviction may recompute a whole chain. Written in
plain numpy, so that the first plan never waits for a compiler.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from graphopt.solvers.arrays import Array
from graphopt.solvers.stages import StagePlan

Recomputations = list[tuple[int, int]]  # (stage, task)
Changes = list[tuple[int, int, int]]  # (first stage, stage after the last, bytes)


def evict(plan: StagePlan, budget: int, deadline: float, seed: int = 0, noise: float = 0.0) -> bool:
    """Adds recomputations to `plan` until its peak is within the budget.

    Args:
        plan: changed in place.
        budget: bytes.
        deadline: `time.perf_counter()` value at which to give up.
        seed: of the noise.
        noise: relative noise on the score of a candidate, for several different starts.

    Returns:
        Whether the budget is met.
    """
    random = np.random.default_rng(seed)
    stuck: set[tuple[int, int]] = set()
    for _ in range(4 * plan.n):
        peaks = plan.peaks()
        over = peaks - budget
        worst = int(np.argmax(over))
        if over[worst] <= 0:
            prune(plan, budget, deadline)
            return True
        if time.perf_counter() > deadline:
            return False
        best, best_score = None, 0.0
        for recomputations, change in _candidates(plan, worst, int(over[worst]), stuck):
            price = sum(int(plan.a.duration[task]) for _, task in recomputations) + 1e-9
            gain = _gain(over, change)
            score = gain / price * (1 + noise * random.uniform(-1, 1))
            if score > best_score:
                best, best_score = recomputations, score
        if best is None:
            return False
        before = np.maximum(over, 0).sum()
        for stage, task in best:
            plan.add(stage, task)
        if np.maximum(plan.peaks() - budget, 0).sum() >= before:
            for stage, task in reversed(best):
                plan.remove(stage, task)
            stuck.add(best[-1])
    return False


def _gain(over: Array, changes: Changes) -> float:
    low = min(start for start, _, _ in changes)
    high = max(end for _, end, _ in changes)
    change = np.zeros(high - low, np.int64)
    for start, end, size in changes:
        change[start - low : end - low] += size
    part = over[low:high]
    return float((np.maximum(part, 0) - np.maximum(part + change, 0)).sum())


def _candidates(
    plan: StagePlan, worst: int, excess: int, stuck: set[tuple[int, int]], most: int = 50
) -> Iterator[tuple[Recomputations, Changes]]:
    """Evictions of values that live through the stage without being used in it."""
    a = plan.a
    ranked = []
    alive = (a.producer < worst) & (a.bytes > 0) & (a.recomputable[a.producer] > 0)
    for value in np.flatnonzero(alive).tolist():
        task, uses = int(a.producer[value]), plan.uses(value)
        k = bisect_left(uses, worst)
        if k == len(uses) or uses[k] == worst or (uses[k], task) in stuck:
            continue
        intervals = plan.intervals(value)
        start = next((i[0] for i in intervals if i[0] <= worst < i[1]), worst)
        if start == worst:
            continue
        last = max(uses[k - 1], start) if k else start
        size = int(a.bytes[value])
        rank = min(size, excess) * (uses[k] - last) ** 0.5 / (int(a.duration[task]) + 1e-3)
        ranked.append((-rank, task, uses[k], (last + 1, uses[k], -size)))
    for _, task, upcoming, freed in sorted(ranked)[:most]:
        for chain in (False, True):
            found = _insert(plan, task, upcoming, chain)
            if found is not None:
                yield found[0], [freed, *found[1]]
            if found is None or not found[1]:
                break


def _insert(
    plan: StagePlan, task: int, stage: int, chain: bool, limit: int = 40
) -> tuple[Recomputations, Changes] | None:
    """Recomputations that bring back `task` in `stage`, and the inputs they prolong.

    Args:
        plan: the plan so far; not changed.
        task: what to recompute.
        stage: where.
        chain: recompute dead inputs as well, instead of prolonging them.
        limit: longest chain.
    """
    needed, todo, longer = {task}, [task], []
    while todo:
        for value in plan.inputs(todo.pop()):
            producer = int(plan.a.producer[value])
            if producer in needed or plan.a.bytes[value] == 0:
                continue
            intervals = plan.intervals(value)
            start, end = next(i for i in reversed(intervals) if i[0] <= stage)
            if end >= stage:
                continue
            if chain and plan.a.recomputable[producer] and start < stage:
                needed.add(producer)
                todo.append(producer)
                if len(needed) > limit:
                    return None
            else:
                longer.append((end + 1, stage, int(plan.a.bytes[value])))
    return [(stage, t) for t in sorted(needed)], longer


def prune(plan: StagePlan, budget: int, deadline: float) -> None:
    """Removes recomputations that the budget does not need, the dearest first."""
    pairs = [(s, t) for t, stages in plan.extras.items() for s in stages]
    pairs.sort(key=lambda pair: -int(plan.a.duration[pair[1]]))
    for stage, task in pairs:
        if time.perf_counter() > deadline:
            return
        plan.remove(stage, task)
        if int(plan.peaks().max()) > budget:
            plan.add(stage, task)
