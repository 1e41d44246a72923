"""Large-neighbourhood search: most of the incumbent fixed, the rest left to CP-SAT."""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from graphopt.solvers.arrays import Arrays
from graphopt.solvers.stages import StagePlan

_RELEASED = 8  # recomputations of the incumbent that may move
_CANDIDATES = 30  # further tasks that may be recomputed


class Neighbourhood:
    """Where tasks may be recomputed: the incumbent's stages, and more for a few tasks.

    Args:
        arrays: the task graph.
        plan: the incumbent.
        rng: chooses the stage around which tasks are set free.
    """

    def __init__(self, arrays: Arrays, plan: StagePlan, rng: random.Random) -> None:
        """Chooses the tasks that are free."""
        self._a, self._plan = arrays, plan
        pairs = [(stage, task) for task, stages in plan.extras.items() for stage in stages]
        centre = rng.choice(pairs)[0] if pairs else rng.randrange(plan.n)
        near = sorted(pairs, key=lambda pair: abs(pair[0] - centre) + rng.random())
        self.free = {task for _, task in near[:_RELEASED]}
        self.free |= self._worth(centre, rng)
        self.copies = 2 + max((len(stages) for stages in plan.extras.values()), default=0)

    def _worth(self, centre: int, rng: random.Random) -> set[int]:
        """Tasks whose values live through the centre and are cheap for their bytes."""
        a = self._a
        last = np.where(
            a.use_ptr[1:] > a.use_ptr[:-1], a.use_idx[np.maximum(a.use_ptr[1:] - 1, 0)], -1
        )
        alive = (a.producer < centre) & (last > centre) & (a.bytes > 0)
        alive &= a.recomputable[a.producer] > 0
        values = np.flatnonzero(alive).tolist()
        values.sort(
            key=lambda v: -int(a.bytes[v]) / (int(a.duration[a.producer[v]]) + 1) * rng.random()
        )
        return {int(a.producer[v]) for v in values[:_CANDIDATES]}

    def stages(self, task: int) -> Sequence[int]:
        """The stages in which the task may be recomputed."""
        mine = set(self._plan.extras.get(task, ()))
        if task in self.free:
            for value in self._plan.outputs(task):
                mine.update(self._plan.uses(value))
        return sorted(stage for stage in mine if stage > task)
