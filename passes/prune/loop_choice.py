"""Which units go while a training goes on: by scores that are collected along its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Analysis
from graphopt.passes.prune.choice import Chooser, Chosen, best
from graphopt.passes.prune.criteria import Calibration, Scores, score
from graphopt.passes.prune.criteria.gradients import gradients
from graphopt.pipeline import PassContext

Units = Sequence[Sequence[int]]
"""Units of each dimension."""


class LoopChooser(Chooser):
    """Ranks units by the mean of scores that were collected beforehand.

    Attributes:
        everything: All units.
        collected: The scores so far.
    """

    def __init__(
        self,
        options: Any,
        program: Program,
        context: PassContext,
        analysis: Analysis,
        solves: int,
    ) -> None:
        """Choose for a program that is trained.

        Args:
            options: The pass `Prune`.
            program: The program; its parameters are those that are trained.
            context: Data, loss, limits.
            analysis: Of the program.
            solves: How often widths are chosen, which share the time limit.

        Raises:
            UsageError: Options that make no sense while training goes on.
        """
        super().__init__(options, program, context, analysis)
        if options.refine:
            raise UsageError(
                "refine= brings units back that have come down to zero", hint="leave it out"
            )
        if context.data is None and self.criterion.needs == "activations":
            raise UsageError(
                f"criterion={self.criterion.name} needs activations, which the loop does not show",
                hint="give data=, or a criterion of gradients",
            )
        self.allocator.solves = solves
        self.everything: Units = [dim.units for dim in self.dimensions.all]
        self.collected: list[Scores] = []

    @property
    def reads_loop(self) -> bool:
        """Whether the gradients are those of the training, since there is no data."""
        return self.context.data is None

    def narrowed(self, alive: Units, done: float) -> Units:
        """Of the units that are left those that stay.

        Args:
            alive: The units that are left.
            done: How far the limits have come down, from 0 to 1: the budget.
        """
        limits = self._limits()
        costs = [self._cost(name, limit) for name, limit in limits.items()]
        problem, ranked = self._problem(self._towards(costs, done), alive, done)
        return best(ranked, self.allocator.allocation(problem, limits).widths)

    def settled(self, alive: Units) -> Chosen:
        """The last choice among the units that are left; the program, counted, keeps the limits.

        Args:
            alive: The units that are left.

        Raises:
            BudgetInfeasible: What is left can't be narrowed so far.
        """
        limits = self._limits()
        costs = [self._cost(name, limit) for name, limit in limits.items()]
        problem, ranked = self._problem(costs, alive)
        return self._within(problem, ranked, limits)

    def collect(
        self, known: Sequence[Mapping[str, Tensor]] | None = None, *, anew: bool = False
    ) -> None:
        """Score all units by the weights as they are, on the data or by the loop's gradients.

        Args:
            known: What `gradients` gave, perhaps at other weights; None: ask it now.
            anew: Forget what was collected before.

        Raises:
            UsageError: No parameter has a gradient.
        """
        if known is None and not self.reads_loop:
            found = super()._scores(self.everything)
        else:
            known = self.gradients() if known is None else known
            seed = self.context.seed
            calibration = Calibration(self.program, self.program, (), seed, tuple(known))
            found = score(self.criterion, self.dimensions, calibration)
        self.collected = [found] if anew else [*self.collected, found]

    def gradients(self) -> Sequence[Mapping[str, Tensor]]:
        """Gradients at the weights as they are: on the data, or those that the loop has left."""
        if self.criterion.needs != "gradients":
            return ()
        if not self.reads_loop:
            seed = self.context.seed
            calibration = Calibration(self.program, self.program, self._batches, seed)
            return list(gradients(calibration))
        slots = [slot for slot in self.analysis.slots.values() if slot.is_trained]
        found = {s.path: s.tensor.grad for s in slots if s.tensor.grad is not None}
        if not found:
            raise UsageError(
                "no parameter has a gradient",
                hint="call step() after optimizer.step() and before optimizer.zero_grad()",
            )
        return (found,)

    def _scores(self, alive: Units) -> Scores:
        count = len(self.collected)
        return {
            unit: sum(each.get(unit, 0.0) for each in self.collected) / count
            for units in alive
            for unit in units
        }
