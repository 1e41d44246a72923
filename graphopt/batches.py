"""Batches of `data`: what the model takes, or pairs of that and targets."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.cost.losses import applied
from graphopt.errors import GraphoptError, InputMismatch, UsageError, first_line
from graphopt.pipeline import PassContext

MOST = 64
"""Batches that a pass reads for calibration."""


@dataclass(frozen=True)
class Batch:
    """One batch.

    Attributes:
        args: Positional inputs of the model.
        kwargs: Keyword inputs.
        criterion: The loss, of outputs and targets where there are targets, or None.
        targets: The targets, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    criterion: Callable[..., Any] | None = None
    targets: Any = None

    @property
    def rows(self) -> int:
        """How many examples it holds: the rows of the first input that has any, else 1."""
        leaves = pytree.tree_leaves((self.args, self.kwargs))
        return next((t.shape[0] for t in leaves if isinstance(t, Tensor) and t.dim()), 1)

    def outputs(self, module: nn.Module, use: str = "calibration") -> Any:
        """What a module gives on the inputs.

        Args:
            module: The module.
            use: What the data is for, to say so where it doesn't fit.

        Raises:
            InputMismatch: The module fails on them.
        """
        try:
            return module(*self.args, **self.kwargs)
        except (GraphoptError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise InputMismatch(
                f"the model fails on the {use} data: {first_line(error)}",
                hint="a batch is what the model takes, or a pair (inputs, targets)",
            ) from error

    def loss(self, outputs: Any, default: Callable[[Any], Any]) -> Any:
        """The loss of the outputs; the default's where none was given.

        Raises:
            ModelError: The user's loss fails on them.
        """
        if self.criterion is None:
            return default(outputs)
        given = () if self.targets is None else (self.targets,)
        return applied(self.criterion, outputs, *given)


def read_batch(batch: Any, loss: Callable[..., Any] | None, arguments: int) -> Batch:
    """Read a batch as the user gave it.

    Args:
        batch: A tensor, a tuple of positional inputs, a mapping of keyword inputs; or, where the
            loss takes targets, a pair of that and targets.  Without a loss a pair is taken for one
            with targets where the model takes another number of inputs; they are not used.
        loss: ``loss(outputs)``, ``loss(outputs, targets)`` or None.
        arguments: How many positional inputs the model takes.
    """
    targets = None
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if loss is not None and takes_targets(loss):
        batch, targets = batch
    elif loss is None and pair and arguments != 2:
        batch, _ = batch
    if isinstance(batch, Mapping):
        return Batch((), dict(batch), loss, targets)
    args = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    return Batch(args, {}, loss, targets)


def calibration_batches(context: PassContext) -> list[Batch]:
    """The first batches of the data; without any the example inputs.

    Raises:
        UsageError: There is data, and it holds no batch.
    """
    if context.data is None:
        return [Batch(context.args, dict(context.kwargs), context.loss)]
    some = itertools.islice(context.data, MOST)
    found = [read_batch(batch, context.data_loss, len(context.args)) for batch in some]
    if not found:
        raise UsageError(
            "data yields no batches", hint="an iterator that was read before is empty: give a list"
        )
    return found


def check_data(data: Any) -> None:
    """Refuses data that can't be gone through.

    Raises:
        UsageError: Says what it is.
    """
    # Asked of the type: `iter` of a DataLoader draws random numbers.
    if data is not None and not any(hasattr(data, n) for n in ("__iter__", "__getitem__")):
        raise UsageError(
            f"data is an iterable of batches, not {type(data).__name__}",
            hint="a list or a DataLoader, for example",
        )


def takes_targets(loss: Callable[..., Any]) -> bool:
    """Whether a loss needs two positional arguments."""
    try:
        function = loss.forward if isinstance(loss, nn.Module) else loss
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(needed) == 2
