"""The loss of a step where the user gives none, and the inputs of a step in data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import NothingToTrainError


def default_loss(outputs: Any) -> torch.Tensor:
    """The scalar that a step differentiates where the user gives no loss.

    It is the model's own scalar loss if its output has one (key or attribute ``loss``, or the only
    floating tensor if that is a scalar), else the sum of all floating outputs.

    Args:
        outputs: Whatever the model returned.

    Returns:
        A tensor of shape ``()``.

    Raises:
        NothingToTrainError: No output is a floating tensor.
    """
    own = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if isinstance(own, torch.Tensor) and own.numel() == 1 and own.is_floating_point():
        return own.reshape(())
    leaves = [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor)]
    floating = [t for t in leaves if t.is_floating_point()]
    if not floating:
        raise NothingToTrainError(
            "the model's output has no floating tensor to derive a loss from",
            hint="pass loss=, a function of the outputs",
        )
    differentiable = [t for t in floating if t.requires_grad] or floating
    total = differentiable[0].sum()
    for tensor in differentiable[1:]:
        total = total + tensor.sum()
    return total


def loss_function(loss: Callable[..., Any] | None) -> Callable[[Any], torch.Tensor]:
    """``loss`` if given, else `default_loss`."""
    return default_loss if loss is None else loss
