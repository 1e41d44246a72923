"""What a caller of the doors asks for: read, checked, and refused where it makes no sense."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt import registry
from graphopt.batches import check_data, takes_targets
from graphopt.budget import Budget
from graphopt.cost.models import COST_MODELS
from graphopt.errors import BudgetError, ModelError, NonFiniteError, UsageError
from graphopt.ir.untouched import ordinary
from graphopt.pipeline import Pass, Pipeline


def read_budget(budget: Any, memory_scope: str | None) -> Budget:
    """The budget, with the scope if that is given apart."""
    wanted = Budget.parse(budget)
    if memory_scope is None:
        return wanted
    if wanted.memory_scope not in (None, memory_scope):
        raise BudgetError(
            f"memory_scope is both {wanted.memory_scope} and {memory_scope}",
            hint="give it once",
        )
    return dataclasses.replace(wanted, memory_scope=memory_scope)


def read_pipeline(budget: Budget, passes: str | Sequence[Pass] | None) -> Pipeline:
    """The passes that the budget chooses, or those given, filled from the budget."""
    if passes is None:
        return registry.choose(budget)
    if isinstance(passes, str):
        pipeline = registry.parse(passes)
    else:
        wrong = [p for p in passes if not isinstance(p, Pass)]
        if wrong:
            raise UsageError(f"passes= takes passes or pipeline text, not {wrong[0]!r}")
        pipeline = Pipeline(tuple(passes))
    return Pipeline(tuple(_filled(pass_, budget) for pass_ in pipeline.passes))


def _filled(pass_: Pass, budget: Budget) -> Pass:
    """The pass with options that it leaves open taken from the budget."""
    offered = type(pass_).from_budget(budget).options()
    given = pass_.options()
    missing = {name: value for name, value in offered.items() if name not in given}
    return dataclasses.replace(pass_, **missing) if missing else pass_


def read_loss(
    loss: Callable[..., Any] | None, data: Iterable[Any] | None
) -> tuple[Callable[[Any], Any] | None, Iterable[Any] | None]:
    """The loss on the example inputs: one of outputs and targets takes the first batch's targets.

    Returns:
        That loss, and the data with its first batch still in it.

    Raises:
        UsageError: The data is none, or holds no pairs although the loss takes targets.
    """
    check_data(data)
    if loss is None or not takes_targets(loss):
        return loss, data
    iterator = iter(data if data is not None else ())
    first = next(iterator, None)
    if not isinstance(first, (tuple, list)) or len(first) != 2:
        raise UsageError(
            "loss takes outputs and targets, but data yields no pairs (inputs, targets)",
            hint="pass data= with pairs, or a loss of the outputs alone",
        )
    targets = pytree.tree_map(ordinary, first[1])
    if iterator is data:  # it can be read only once
        data = itertools.chain([first], iterator)
    return _WithTargets(loss, targets), data


@dataclasses.dataclass(frozen=True)
class _WithTargets:
    """A loss with its targets; an ordinary object, so that it pickles with a plan."""

    loss: Callable[..., Any]
    targets: Any

    def __call__(self, outputs: Any) -> Any:
        return self.loss(outputs, _first(self.targets, outputs))


def _first(targets: Any, outputs: Any) -> Any:
    """As many targets as there are outputs, whose batch may be smaller, or larger: in turn."""
    sizes = [
        t.shape[0] for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.dim()
    ]
    size = sizes[0] if sizes else 0

    def fitting(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.dim() or not value.shape[0]:
            return value
        if not size or value.shape[0] == size:
            return value
        if value.shape[0] > size:
            return value[:size]
        return value[torch.arange(size, device=value.device) % value.shape[0]]

    return pytree.tree_map(fitting, targets)


def option_names(cls: type[Pass]) -> set[str]:
    """The names of a pass's options."""
    return {f.name for f in dataclasses.fields(cls)}


def check_options(time_limit: float, cost_model: str) -> None:
    """Refuses options out of range.

    Raises:
        UsageError: Says which.
    """
    if not time_limit > 0:
        raise UsageError(f"time_limit={time_limit}: seconds, more than 0")
    if cost_model not in COST_MODELS:
        raise UsageError(f"cost_model={cost_model!r}: one of {', '.join(COST_MODELS)}")


def read_inputs(
    args: Any, kwargs: Mapping[str, Any] | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments that autograd takes."""
    return pytree.tree_map(ordinary, (as_args(args), dict(kwargs or {})))


def as_args(inputs: Any) -> tuple[Any, ...]:
    """Positional inputs, of which one tensor may come alone.

    Raises:
        UsageError: They are no sequence.
    """
    if isinstance(inputs, torch.Tensor):
        return (inputs,)
    if isinstance(inputs, Mapping) or not isinstance(inputs, Sequence) or isinstance(inputs, str):
        raise UsageError(
            f"example inputs are a tuple of positional inputs, not {type(inputs).__name__}",
            hint="write (x,); keyword inputs go to example_kwargs",
        )
    return tuple(inputs)


def check_model(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuses what is no module, and NaN.

    Raises:
        ModelError: It is no module.
        NonFiniteError: A parameter or an example input holds NaN.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    named = dict(model.named_parameters())
    _check_nan(named, "parameter")
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    _check_nan({str(i): t for i, t in enumerate(tensors)}, "example input")


def _check_nan(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.is_meta and bool(tensor.isnan().any()):
            raise NonFiniteError(
                f"{what} {name} holds NaN", hint="graphopt compares numbers; NaN equals nothing"
            )
