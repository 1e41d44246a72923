"""Pruning while a user's own loop trains: redundant units fade to zero, and are then removed."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from graphopt.budget import Budget
from graphopt.errors import UsageError
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import PassRecord
from graphopt.passes.prune.choice import Chosen
from graphopt.passes.prune.decay import Decay
from graphopt.passes.prune.loop_choice import LoopChooser, Units
from graphopt.passes.prune.prune import Prune, Run
from graphopt.passes.prune.request import Request, as_list, read_request
from graphopt.pipeline import Progress, silent
from graphopt.plain import to_plain

# Corrective cycles end at the latest after so many (CRIC).
_CYCLES = 10


def gradually(
    model: nn.Module,
    budget: Budget | str | Mapping[str, Any],
    example_inputs: Any,
    *,
    steps: int,
    periods: int = 5,
    sampling: int = 8,
    corrective: bool = False,
    example_kwargs: Mapping[str, Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    dynamic: Any = "batch",
    time_limit: float = 60.0,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> GradualPruning:
    """A context around a training loop, in which a model becomes prunable at no further loss.

        with gradually(model, "flops=50%", (x,), steps=400) as pruning:
            for x, y in batches:
                optimizer.zero_grad()
                loss(model(x), y).backward()
                optimizer.step()
                pruning.step()
        small = pruning.module

    The model stays the user's and is changed as training changes it, but for this: in `periods`
    of equal length units are found redundant, in the last one as many as the budget asks for, and
    in step t = 0 .. T-1 of a period of length T, after the optimizer's step, their weights are
    multiplied by (T-t-1)/(T-t), so that they come down evenly and are exactly zero at its end
    (HESSO; Chen et al. 2024). From then on they are held at zero. On the way out the units are
    removed: `pruning.module` keeps the budget and computes what the model does by then.

    With `corrective` (CRIC, of the same authors) redundant units are looked for first: those that
    scores point at decay on trial over `sampling` steps, scores are collected on the way with the
    weights as they were before, these are put back, and with the mean of all scores so far the next
    trial is made of units that had none yet; until no such unit is left, or ten times.

    Args:
        model: The model that the loop trains; it is captured on the way in.
        budget: ``"flops=50%"``, also of ``params``, ``bytes`` or ``latency``.
        example_inputs: Positional inputs; the budget is for their sizes.
        steps: Steps of the optimizer until all weights of removed units are zero, no more than the
            loop takes; the rest of the loop trains what is left.
        periods: How often units are ranked, while the limit comes down to the budget.
        sampling: Of how many steps the scores are averaged before units are chosen.
        corrective: Whether to look for redundant units in trials first.
        example_kwargs: Keyword inputs.
        data: Batches to score units on; None: the gradients that the loop's own steps leave.
        loss: The loss on these, as in `graphopt.optimize`.
        dynamic: Which sizes stay free in the result, as in `graphopt.capture`.
        time_limit: Seconds for choosing widths, over all periods.
        seed: Of everything random.
        progress: Told what goes on.
        **options: Further options of the pass `prune`: ``criterion`` (here ``taylor2`` by default),
            ``allocation``, ``round_to``, ``min_keep``, ``caps``, ``freeze``, ``norm``.

    Raises:
        UsageError: Too few steps for so many periods; options that there aren't.
        BudgetInfeasible: Raised by the `step` with which the last period begins.
        CaptureError: The model can't be captured.
    """
    first = sampling if data is None else 0
    least = first + periods + (_CYCLES * sampling if corrective else 0)
    if min(periods, sampling) < 1 or steps < least:
        raise UsageError(
            f"{steps} steps are too few for {periods} periods and scores of {sampling} steps",
            hint=f"at least {least}; or fewer periods, a smaller sampling",
        )
    settings: dict[str, Any] = {"time_limit": time_limit, "seed": seed, "progress": progress}
    request = read_request(
        model, budget, example_inputs, {"criterion": "taylor2", **options},
        example_kwargs=example_kwargs, data=as_list(data), loss=loss, dynamic=dynamic, **settings,
    )  # fmt: skip
    return GradualPruning(request, steps, periods, sampling, corrective)


class GradualPruning:
    """The context that `gradually` makes.

    Attributes:
        module: The pruned module, after the context; it shares nothing with the model.
        cycles: How many corrective cycles there were.
    """

    def __init__(
        self, request: Request, steps: int, periods: int, sampling: int, corrective: bool
    ) -> None:
        """Prepare; nothing happens before the context is entered.

        Args:
            request: What to prune.
            steps: Steps until all is zero.
            periods: Of decay.
            sampling: Steps that scores are averaged over.
            corrective: Whether there are trials.
        """
        self.request, self.steps, self.periods = request, steps, periods
        self.sampling, self.corrective = sampling, corrective
        self.run = Run(request.options, request.program, request.context)
        self.run.chooser = self.chooser = LoopChooser(
            request.options,
            request.program,
            request.context,
            self.run.analysis,
            solves=periods + (_CYCLES if corrective else 0),
        )
        if corrective and self.chooser.criterion.needs != "gradients":
            raise UsageError(
                f"trials collect scores of gradients, not {self.chooser.criterion.name}",
                hint="criterion=hesso, taylor or taylor2; or corrective=False",
            )
        self.cycles = self.taken = 0
        self._chosen: Chosen | None = None
        self._at_once = False
        self._trial: tuple[Decay, list[Any]] | None = None
        self._gone = Decay(self.run.analysis, frozenset())
        self._course = self._taking_course()
        self._module: OptimizedModule | None = None
        self._tensors = _identities(request.model)

    @property
    def module(self) -> OptimizedModule:
        """The pruned module, once the context has been left."""
        if self._module is None:
            raise UsageError(
                "there is no pruned module yet",
                hint="it is made when the context is left; or call finish()",
            )
        return self._module

    @property
    def is_zero(self) -> bool:
        """Whether the weights of all units that will be removed are zero by now."""
        return self._chosen is not None and self._gone.units == self._chosen.removed

    def __enter__(self) -> Self:
        next(self._course)
        return self

    def step(self) -> None:
        """Let redundant weights decay; call it after each `optimizer.step()`.

        Raises:
            UsageError: No parameter has a gradient that units could be scored by.
            BudgetInfeasible: No pruning keeps the budget.
        """
        self.taken += 1
        next(self._course)

    def finish(self) -> OptimizedModule:
        """Set what is left to zero at once, and give the pruned module.

        What remains of the training after it doesn't reach that module.
        """
        self._at_once = True
        while not self.is_zero:
            next(self._course)
        self._module = self._removed()
        return self._module

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._give_back()
            return
        if not self.is_zero:
            self._give_back()
            raise UsageError(
                f"the loop ended after {self.taken} of {self.steps} steps: weights of units that "
                "will be removed are not zero yet",
                hint="give steps= no more than the loop takes; finish() prunes what there is",
            )
        self._module = self._removed()

    def _taking_course(self) -> Iterator[None]:
        """All that happens; waits at each `yield` for the next step of the optimizer."""
        yield
        if self.chooser.reads_loop:
            for number in range(self.sampling):
                if number == 0 or not self._at_once:
                    self.chooser.collect()
                    yield
        else:
            self.chooser.collect()
        if self.corrective:
            yield from self._trials()
        alive = self.chooser.everything
        for period in range(self.periods):
            alive = self._left(alive, period)
            units = self.chooser.dimensions.removed(alive) - self._gone.units
            length = max(1, self._steps_left // (self.periods - period))
            yield from self._decaying(units, length, samples=period + 1 < self.periods)
        while True:
            self._gone.scale(0)
            yield

    def _left(self, alive: Units, period: int) -> Units:
        """The units that stay after a period."""
        if period + 1 < self.periods:
            return self.chooser.narrowed(alive, (period + 1) / self.periods)
        self._chosen = self.chooser.settled(alive)
        removed = self._chosen.removed
        return [[unit for unit in units if unit not in removed] for units in alive]

    def _decaying(self, units: frozenset[int], length: int, *, samples: bool) -> Iterator[None]:
        """Let units come down to zero over some steps; at the end, collect scores for the next."""
        decay, anew = Decay(self.run.analysis, units), True
        for number in range(length):
            last = self._at_once or number + 1 == length
            self._gone.scale(0)
            decay.scale(0 if last else (length - number - 1) / (length - number))
            if samples and not self._at_once and self._is_sampled(length - number):
                self.chooser.collect(anew=anew)
                anew = False
            if last:
                self._gone = Decay(self.run.analysis, self._gone.units | units)
            self.request.context.progress("weights of redundant units decay", self._done)
            yield
            if last:
                return

    def _is_sampled(self, left: int) -> bool:
        """Whether scores are collected so many steps before units are chosen."""
        if self.corrective:
            return False
        return left <= (self.sampling if self.chooser.reads_loop else 1)

    def _trials(self) -> Iterator[None]:
        """Collect scores while units that look redundant decay on trial."""
        seen: frozenset[int] = frozenset()
        while self.cycles < _CYCLES and not self._at_once:
            left = self.chooser.narrowed(self.chooser.everything, 1.0)
            violating = self.chooser.dimensions.removed(left) - seen
            if not violating:
                return
            seen |= violating
            self.cycles += 1
            self.request.context.progress(f"trial {self.cycles}, {len(violating)} units")
            yield from self._trial_of(Decay(self.run.analysis, violating))

    def _trial_of(self, decay: Decay) -> Iterator[None]:
        before = decay.values()
        self._trial = decay, before
        for number in range(self.sampling):
            gradients = self.chooser.gradients()
            now = decay.values()
            decay.put(before)
            self.chooser.collect(gradients)
            left = self.sampling - number
            if left == 1 or self._at_once:
                self._trial = None
                yield
                return
            decay.put(now)
            decay.scale((left - 1) / left)
            yield

    @property
    def _steps_left(self) -> int:
        """Steps until all must be zero, the one at hand included."""
        return self.steps - self.taken + 1

    @property
    def _done(self) -> float:
        return min(1.0, self.taken / self.steps)

    def _give_back(self) -> None:
        """End a trial: its units get their weights back."""
        if self._trial is not None:
            decay, before = self._trial
            decay.put(before)
            self._trial = None

    @torch.no_grad()
    def _follow_buffers(self) -> None:
        """A model may have put new buffers in place of those that were captured."""
        captured = dict(self.request.program.skeleton.root.named_buffers())
        for name, buffer in self.request.model.named_buffers():
            if name in captured and captured[name] is not buffer:
                captured[name].copy_(buffer)

    def _removed(self) -> OptimizedModule:
        """The module without the units that are zero."""
        assert self._chosen is not None
        model, began = self.request.model, time.perf_counter()
        if _identities(model) != self._tensors:
            raise UsageError(
                "parameters of the model were replaced by others while it was pruned",
                hint="enter the context after the model has got its parameters",
            )
        self._follow_buffers()
        result = self.run.finished(self.chooser.pruned(self._chosen))
        record = PassRecord(
            name=Prune.name,
            spec=str(self.request.options),
            changed=result.changed,
            report={name: to_plain(section) for name, section in result.report.items()},
            seconds=time.perf_counter() - began,
        )
        program = result.program.replace(history=(*result.program.history, record))
        module = copy.deepcopy(self.request.emit(program))
        self.request.compare(module, "the pruned module")
        return module


def _identities(model: nn.Module) -> dict[str, int]:
    """Which tensors the parameters are."""
    return {name: id(parameter) for name, parameter in model.named_parameters()}
