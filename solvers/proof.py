"""Proofs that no better plan exists, by the constraint program."""

from __future__ import annotations

import queue
import random
import threading

from ortools.sat.python import cp_model

from graphopt.solvers.arrays import Arrays
from graphopt.solvers.cover import CoverBounder
from graphopt.solvers.cpsat import RetentionModel, run
from graphopt.solvers.neighbourhood import Neighbourhood
from graphopt.solvers.solution import Incumbent
from graphopt.solvers.stages import from_sequence

_MOST_STAGES = 24  # cover conditions in the constraint program


class Prover:
    """Asks the constraint program for a plan better than the incumbent, or a proof of none.

    Attributes:
        busy: set while it wants all cores.
    """

    def __init__(self, arrays: Arrays, incumbent: Incumbent, copies: int, seed: int) -> None:
        """Notes the problem."""
        self._arrays, self._incumbent = arrays, incumbent
        self._copies, self._seed = max(2, copies), seed
        self._base = int(arrays.duration.sum())
        self._found: queue.SimpleQueue[list[int]] = queue.SimpleQueue()
        self._bounds: dict[int, int] = {}
        self._solver: cp_model.CpSolver | None = None
        self.busy = threading.Event()

    def found(self, sequence: list[int]) -> None:
        """Takes a plan from any thread; `deliver` hands it over."""
        self._found.put(sequence)

    def stop(self) -> None:
        """Ends a running proof early; may be called from another thread."""
        if self._solver is not None:
            self._solver.stop_search()

    def deliver(self) -> None:
        """Hands plans and bounds to the incumbent; call it from the thread that owns that."""
        while not self._found.empty():
            self._incumbent.offer(self._found.get(), "second search")
        if self._incumbent.feasible:
            for cap, bound in list(self._bounds.items()):
                self._incumbent.raise_capped_bound(cap, bound)

    def prove(
        self,
        cover: CoverBounder,
        time_limit: float,
        *,
        workers: int = 1,
        steps: float | None = None,
    ) -> bool:
        """Looks for a plan that is better than the incumbent; returns whether that is settled.

        The next call allows one copy more.

        Args:
            cover: the cover bound so far.
            time_limit: seconds.
            workers: threads.
            steps: CP-SAT's deterministic time, for repeatable answers.
        """
        if not self._incumbent.feasible:
            return False
        most = self._incumbent.duration - self._base - 1
        least = min(cover.extra, most)
        if workers > 1:
            self.busy.set()
        try:
            model = RetentionModel(
                self._arrays,
                self._incumbent.budget,
                self._copies,
                (least, most),
                cover.stages[:_MOST_STAGES],
            )
            self._solver = cp_model.CpSolver()
            status, bound = run(
                model,
                self._solver,
                time_limit=time_limit,
                steps=steps,
                workers=workers,
                seed=self._seed,
                found=self.found,
            )
        finally:
            self.busy.clear()
        if status == "infeasible":
            bound = most + 1
        self._bounds[self._copies] = self._base + bound
        if status == "unknown":
            return False
        self._copies += 1  # the next proof is of more
        return True

    def improve(self, time_limit: float, rng: random.Random) -> None:
        """Looks for a better plan near the incumbent (large-neighbourhood search).

        Args:
            time_limit: seconds.
            rng: chooses the neighbourhood.
        """
        n = len(self._arrays.duration)
        sequence = [*self._incumbent.sequence, *range(len(self._incumbent.graph.tasks), n)]
        near = Neighbourhood(self._arrays, from_sequence(self._arrays, sequence), rng)
        most = self._incumbent.duration - self._base - 1
        model = RetentionModel(
            self._arrays, self._incumbent.budget, near.copies, (0, most), stages=near.stages
        )
        self._solver = cp_model.CpSolver()
        run(
            model,
            self._solver,
            time_limit=time_limit,
            workers=1,
            seed=rng.randrange(2**31),
            found=self.found,
        )
