"""Plans as stages, in plain Python: any set of recomputations, changed one at a time.

Stage s of a plan holds the recomputations right before the first execution of task s, in input
order, and then that execution. Any set of pairs (stage, task < stage) is a valid plan: values
that are needed later simply live longer.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from itertools import pairwise

import numpy as np

from graphopt.solvers.arrays import Array, Arrays


class StagePlan:
    """A set of recomputations with the bytes live in every stage.

    Attributes:
        a: the task graph.
        extras: the stages that recompute a task, ascending, for tasks that have any.
        by_stage: the tasks recomputed in a stage, ascending, for stages that have any.
        carry: bytes live on entering each stage (n + 1 entries).
        extra: duration of all recomputations.
    """

    def __init__(self, arrays: Arrays) -> None:
        """Starts without recomputation."""
        self.a = arrays
        self.n = len(arrays.duration)
        self.extras: dict[int, list[int]] = {}
        self.by_stage: dict[int, list[int]] = {}
        self.extra = 0
        self.flat = arrays.out_bytes + arrays.workspace
        last = arrays.producer.copy()
        used = np.diff(arrays.use_ptr) > 0
        last[used] = arrays.use_idx[arrays.use_ptr[1:][used] - 1]
        last[arrays.keep > 0] = self.n
        change = np.zeros(self.n + 2, np.int64)
        np.add.at(change, arrays.producer + 1, arrays.bytes)
        np.add.at(change, last + 1, -arrays.bytes)
        self.carry = np.cumsum(change)[: self.n + 1]
        self._inputs, self._outputs = (
            _rows(arrays.in_ptr, arrays.in_idx),
            _rows(arrays.out_ptr, arrays.out_idx),
        )
        self._users = _rows(arrays.use_ptr, arrays.use_idx)
        self._sizes = arrays.bytes.tolist()
        self._producers = arrays.producer.tolist()
        self._intervals: dict[int, list[tuple[int, int]]] = {}
        self._uses: dict[int, list[int]] = {}
        self._local: dict[int, int] = {}  # peak minus carry of stages with recomputations

    def inputs(self, task: int) -> list[int]:
        """Values the task takes."""
        return self._inputs[task]

    def outputs(self, task: int) -> list[int]:
        """Values the task creates."""
        return self._outputs[task]

    def users(self, value: int) -> list[int]:
        """Tasks that take the value."""
        return self._users[value]

    def runs(self, task: int) -> list[int]:
        """Stages in which the task runs, ascending."""
        return [task, *self.extras.get(task, ())]

    def uses(self, value: int) -> list[int]:
        """Stages that use the value, ascending."""
        found = self._uses.get(value)
        if found is None:
            users = self._users[value]
            more = [s for user in users if user in self.extras for s in self.extras[user]]
            found = self._uses[value] = sorted({*users, *more}) if more else users
        return found

    def intervals(self, value: int) -> list[tuple[int, int]]:
        """(production, last use) of every instance, in stages; n: to the end."""
        found = self._intervals.get(value)
        if found is not None:
            return found
        runs, uses = self.runs(self._producers[value]), self.uses(value)
        found = []
        for i, start in enumerate(runs):
            limit = runs[i + 1] if i + 1 < len(runs) else self.n + 1
            k = bisect_right(uses, limit - 1)
            end = max(start, uses[k - 1]) if k else start
            if i + 1 == len(runs) and self.a.keep[value]:
                end = self.n
            found.append((start, end))
        self._intervals[value] = found
        return found

    def _account(self, touched: list[int], sign: int) -> set[int]:
        """Adds the values' bytes to, or takes them from, the stages they live through."""
        ends = set()
        for value in touched:
            size = sign * self._sizes[value]
            for start, end in self.intervals(value):
                ends.add(end)
                if end > start:
                    self.carry[start + 1 : end + 1] += size
        return ends

    def _change(self, stage: int, task: int, insert: bool) -> None:
        touched = list({*self._inputs[task], *self._outputs[task]})
        stale = self._account(touched, -1)
        for mine, key, item in ((self.extras, task, stage), (self.by_stage, stage, task)):
            if insert:
                insort(mine.setdefault(key, []), item)
            else:
                mine[key].remove(item)
                if not mine[key]:
                    del mine[key]
        for value in touched:
            self._intervals.pop(value, None)
            self._uses.pop(value, None)
        for other in {stage} | stale | self._account(touched, 1):
            self._local.pop(other, None)
        self.extra += int(self.a.duration[task]) * (1 if insert else -1)

    def add(self, stage: int, task: int) -> None:
        """Recomputes `task` in `stage`."""
        self._change(stage, task, insert=True)

    def remove(self, stage: int, task: int) -> None:
        """Takes back the recomputation of `task` in `stage`."""
        self._change(stage, task, insert=False)

    def live_after(self, value: int, stage: int) -> bool:
        """Whether an instance of the value lives on after the stage."""
        return any(start <= stage < end for start, end in self.intervals(value))

    def peaks(self) -> Array:
        """Most bytes live at any step of each stage."""
        result = self.carry[: self.n] + self.flat
        for stage, tasks in self.by_stage.items():
            local = self._local.get(stage)
            if local is None:
                local = self._stage_peak(stage, tasks) - int(self.carry[stage])
                self._local[stage] = local
            result[stage] = self.carry[stage] + local
        return result

    def _stage_peak(self, stage: int, tasks: list[int]) -> int:
        """Walks a stage backwards from what lives after it."""
        sizes = self._sizes
        live, seen, peak = int(self.carry[stage + 1]), set(), 0
        for task in (stage, *reversed(tasks)):
            for value in self.inputs(task):
                if value not in seen and not self.live_after(value, stage):
                    seen.add(value)
                    live += sizes[value]
            outputs = self.outputs(task)
            total = live + int(self.a.workspace[task])
            for value in outputs:
                if value in seen or self.live_after(value, stage):
                    live -= sizes[value]
                else:
                    total += sizes[value]
            peak = max(peak, total)
        return peak

    def sequence(self) -> list[int]:
        """The plan as task indices."""
        return [t for s in range(self.n) for t in (*self.by_stage.get(s, ()), s)]


def _rows(pointers: Array, items: Array) -> list[list[int]]:
    """The rows of a CSR list as Python lists."""
    bounds, flat = pointers.tolist(), items.tolist()
    return [flat[a:b] for a, b in pairwise(bounds)]


def from_sequence(arrays: Arrays, sequence: list[int]) -> StagePlan:
    """The stages of a plan whose first executions follow the input order."""
    plan = StagePlan(arrays)
    stage = 0
    for task in sequence:
        if task == stage:
            stage += 1
        elif stage == plan.n:
            raise ValueError("recomputation after the last first execution")
        elif stage not in plan.extras.get(task, ()):
            plan.add(stage, task)
    return plan
