"""How much work a solver has left."""

from __future__ import annotations

from graphopt.solvers.solution import Incumbent


class Clock:
    """How much work is left: seconds, or counted steps for repeatable answers.

    Attributes:
        counted: whether steps are counted.
    """

    def __init__(self, incumbent: Incumbent, time_limit: float, step_limit: int | None) -> None:
        """Starts with the incumbent's clock."""
        self._incumbent, self._time_limit = incumbent, time_limit
        self._steps = step_limit
        self._total = step_limit
        self.counted = step_limit is not None

    def left(self) -> float:
        """Seconds until the time limit."""
        return self._time_limit - self._incumbent.elapsed

    def spend(self, steps: int) -> None:
        """Counts steps."""
        if self._steps is not None:
            self._steps -= steps

    def over(self) -> bool:
        """Whether nothing is left."""
        return self.left() <= 0.02 or (self._steps is not None and self._steps <= 0)

    def used(self) -> float:
        """Share of the work done, 0 to 1."""
        if self._steps is not None and self._total:
            return 1 - self._steps / self._total
        return 1 - self.left() / self._time_limit
