"""Pruning around a user's own training: what is asked for, read, captured and checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from graphopt import registry
from graphopt.budget import Budget
from graphopt.comparison import Observation, observe, unequal
from graphopt.errors import UsageError, VerificationError
from graphopt.ir.capture import capture
from graphopt.ir.mode import in_modes_of
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import Program
from graphopt.passes.prune.prune import Prune, rounding
from graphopt.pipeline import PassContext, Pipeline, option_types
from graphopt.report import Report
from graphopt.requests import check_model, read_budget, read_inputs, read_loss


@dataclass(frozen=True)
class Request:
    """A model to prune.

    Attributes:
        model: The user's model; the program shares its parameters and buffers.
        budget: What the result may take.
        options: The pass with the budget's limits.
        program: The model, captured, and brought into the form that the pass expects.
        context: Example inputs, data, limits.
    """

    model: nn.Module
    budget: Budget
    options: Prune
    program: Program
    context: PassContext

    def emit(self, program: Program) -> OptimizedModule:
        """The module of a pruned program, with its report, in the modes of the model."""
        report = Report.of(program, self.budget.to_dict())
        return in_modes_of(program.replace(report=report).emit(), self.model)

    def compare(self, module: OptimizedModule, what: str) -> None:
        """Check that a module gives what the user's model gives on the example inputs.

        Raises:
            VerificationError: It doesn't, in eval mode.
        """
        expected = self._observed(self.model)
        allowed = {"outputs": rounding(module.program), "gradients": None, "buffers": None}
        worst = unequal(
            expected, self._observed(module), allowed, lambda: self._observed(self.model)
        )
        if worst is not None:
            raise VerificationError(
                f"{what} differs from the model: {worst.name} by {worst.error:.3g} (relative)",
                claim="outputs",
                pass_name=Prune.name,
                hint="does forward depend on something besides its inputs, buffers and torch's "
                "random numbers? Were parameters replaced?",
            )

    def _observed(self, module: nn.Module) -> Observation:
        context = self.context
        return observe(
            module, context.args, context.kwargs, training=False, loss=context.loss,
            seed=context.seed,
        )  # fmt: skip


def read_request(
    model: nn.Module,
    budget: Budget | str | Mapping[str, Any],
    example_inputs: Any,
    options: Mapping[str, Any],
    *,
    example_kwargs: Mapping[str, Any] | None,
    data: Iterable[Any] | None,
    loss: Any,
    dynamic: Any,
    **settings: Any,
) -> Request:
    """Read what a caller asks for, capture the model and check the capture.

    Args:
        model: The model.
        budget: Of FLOPs, parameters: what `Prune` serves.
        example_inputs: Positional inputs.
        options: Further options of `Prune`.
        example_kwargs: Keyword inputs.
        data: Batches, or None.
        loss: Of outputs, or of outputs and targets, or None.
        dynamic: Which sizes stay free.
        **settings: Of `PassContext`.

    Raises:
        UsageError: An option that there isn't, a budget that pruning doesn't serve.
    """
    wanted = read_budget(budget, None)
    other = [name for name in wanted.items() if name not in Prune.serves]
    if other or not wanted:
        raise UsageError(
            f"pruning keeps no budget {', '.join(other) or '(none was given)'}",
            hint=f"one of {', '.join(Prune.serves)}; pass the result to optimize() for the rest",
        )
    unknown = [name for name in options if name not in option_types(Prune)]
    if unknown:
        raise UsageError(f"prune has no option {unknown[0]!r}")
    args, kwargs = read_inputs(example_inputs, example_kwargs)
    check_model(model, args, kwargs)
    example_loss, data = read_loss(loss, data)
    context = PassContext(
        args, kwargs, budget=wanted, loss=example_loss, data_loss=loss, data=data, **settings
    )
    chosen = registry.choose(wanted).passes
    before = [each for each in chosen if each.position < Prune.position]
    program = capture(model, args, kwargs, dynamic=dynamic)
    program = Pipeline(tuple(before)).run(program, context)
    serving = dataclasses.replace(Prune.from_budget(wanted), **options)  # type: ignore[type-var]
    assert isinstance(serving, Prune)
    request = Request(model, wanted, serving, program, context)
    request.compare(program.emit(), "the captured graph")
    return request


def as_list(data: Iterable[Any] | None) -> Sequence[Any] | None:
    """Data that can be read more than once."""
    return data if data is None or isinstance(data, Sequence) else list(data)
