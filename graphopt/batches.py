"""Batches of `data`: what the model takes, or pairs of that and targets."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


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

    def loss(self, outputs: Any, default: Callable[[Any], Any]) -> Any:
        """The loss of the outputs; the default's where none was given."""
        if self.criterion is None:
            return default(outputs)
        given = () if self.targets is None else (self.targets,)
        return self.criterion(outputs, *given)


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
