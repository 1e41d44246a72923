"""Plans as stages, in plain Python: any set of recomputations, changed one at a time.

Stage s of a plan holds the recomputations right before the first execution of task s, in input
order, and then that execution. Any set of pairs (stage, task < stage) is a valid plan: values
that are needed later simply live longer.
"""

from __future__ import annotations

from bisect import bisect_right, insort

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

    def inputs(self, task: int) -> list[int]:
        """Values the task takes."""
        return self.a.in_idx[self.a.in_ptr[task] : self.a.in_ptr[task + 1]].tolist()

    def outputs(self, task: int) -> list[int]:
        """Values the task creates."""
        return self.a.out_idx[self.a.out_ptr[task] : self.a.out_ptr[task + 1]].tolist()

    def users(self, value: int) -> list[int]:
        """Tasks that take the value."""
        return self.a.use_idx[self.a.use_ptr[value] : self.a.use_ptr[value + 1]].tolist()

    def runs(self, task: int) -> list[int]:
        """Stages in which the task runs, ascending."""
        return [task, *self.extras.get(task, ())]

    def uses(self, value: int) -> list[int]:
        """Stages that use the value, ascending."""
        users = self.users(value)
        more = [s for user in users if user in self.extras for s in self.extras[user]]
        return sorted({*users, *more}) if more else users

    def intervals(self, value: int) -> list[tuple[int, int]]:
        """(production, last use) of every instance, in stages; n: to the end."""
        runs, uses = self.runs(int(self.a.producer[value])), self.uses(value)
        result = []
        for i, start in enumerate(runs):
            limit = runs[i + 1] if i + 1 < len(runs) else self.n + 1
            k = bisect_right(uses, limit - 1)
            end = max(start, uses[k - 1]) if k else start
            if i + 1 == len(runs) and self.a.keep[value]:
                end = self.n
            result.append((start, end))
        return result

    def _account(self, value: int, sign: int) -> None:
        size = sign * int(self.a.bytes[value])
        for start, end in self.intervals(value):
            self.carry[start + 1 : end + 1] += size

    def _touched(self, task: int) -> list[int]:
        return list({*self.inputs(task), *self.outputs(task)})

    def add(self, stage: int, task: int) -> None:
        """Recomputes `task` in `stage`."""
        for value in self._touched(task):
            self._account(value, -1)
        insort(self.extras.setdefault(task, []), stage)
        insort(self.by_stage.setdefault(stage, []), task)
        for value in self._touched(task):
            self._account(value, 1)
        self.extra += int(self.a.duration[task])

    def remove(self, stage: int, task: int) -> None:
        """Takes back the recomputation of `task` in `stage`."""
        for value in self._touched(task):
            self._account(value, -1)
        self.extras[task].remove(stage)
        if not self.extras[task]:
            del self.extras[task]
        self.by_stage[stage].remove(task)
        if not self.by_stage[stage]:
            del self.by_stage[stage]
        for value in self._touched(task):
            self._account(value, 1)
        self.extra -= int(self.a.duration[task])

    def live_after(self, value: int, stage: int) -> bool:
        """Whether an instance of the value lives on after the stage."""
        return any(start <= stage < end for start, end in self.intervals(value))

    def peaks(self) -> Array:
        """Most bytes live at any step of each stage."""
        result = self.carry[: self.n] + self.flat
        for stage, tasks in self.by_stage.items():
            result[stage] = self._stage_peak(stage, tasks)
        return result

    def _stage_peak(self, stage: int, tasks: list[int]) -> int:
        """Walks a stage backwards from what lives after it."""
        sizes = self.a.bytes
        live, seen, peak = int(self.carry[stage + 1]), set(), 0
        for task in (stage, *reversed(tasks)):
            for value in self.inputs(task):
                if value not in seen and not self.live_after(value, stage):
                    seen.add(value)
                    live += int(sizes[value])
            outputs = self.outputs(task)
            total = live + int(self.a.workspace[task])
            for value in outputs:
                if value in seen or self.live_after(value, stage):
                    live -= int(sizes[value])
                else:
                    total += int(sizes[value])
            peak = max(peak, total)
        return peak

    def sequence(self) -> list[int]:
        """The plan as task indices."""
        return [t for s in range(self.n) for t in (*self.by_stage.get(s, ()), s)]


def from_sequence(arrays: Arrays, sequence: list[int]) -> StagePlan:
    """The stages of a plan whose first executions follow the input order."""
    plan = StagePlan(arrays)
    stage = 0
    for task in sequence:
        if task == stage:
            stage += 1
        elif stage not in plan.extras.get(task, ()):
            plan.add(stage, task)
    return plan
