"""Torch-Pruning, where it is installed, at the same budget of FLOPs.

    pip install --no-deps torch-pruning==1.6.1

It takes a share of channels, not of FLOPs, so the share is found by bisection.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_HALVINGS = 10
Loss = Callable[[nn.Module], Tensor]


def torch_pruning() -> Any:
    """The library, or None where it is not installed."""
    try:
        return importlib.import_module("torch_pruning")
    except ImportError:
        return None


@torch.no_grad()
def counted(module: nn.Module, inputs: Sequence[Any], **kwargs: Any) -> int:
    """FLOPs of one forward that PyTorch's counter finds."""
    with FlopCounterMode(display=False) as counter:
        module(*inputs, **kwargs)
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Settings:
    """How Torch-Pruning is asked.

    Attributes:
        ignored: Names of modules whose outputs keep their sizes.
        scattered: One ranking for all layers (``global_pruning``) instead of one for each.
        losses: Losses of calibration batches, whose mean gradient ranks channels
            (``TaylorImportance``); without any they are ranked by magnitude.
        rounds: In how many steps, each with gradients of its own.
    """

    ignored: Sequence[str] = ()
    scattered: bool = False
    losses: Sequence[Loss] = ()
    rounds: int = 1


def pruned(
    model: nn.Module, inputs: tuple[Tensor, ...], share: float, settings: Settings
) -> nn.Module:
    """The model pruned to as close below a share of its FLOPs as bisection comes.

    Args:
        model: The model, in eval mode; it is left as it is.
        inputs: Example inputs.
        share: Of the FLOPs that may stay.
        settings: How.
    """
    limit = share * counted(model, inputs)
    low, high = 0.0, 1.0
    best = None
    for _ in range(_HALVINGS):
        ratio = (low + high) / 2
        small = _at(ratio, model, inputs, settings)
        if counted(small, inputs) <= limit:
            best, high = small, ratio
        else:
            low = ratio
    assert best is not None
    return best


def _at(
    ratio: float, model: nn.Module, inputs: tuple[Tensor, ...], settings: Settings
) -> nn.Module:
    library, losses = torch_pruning(), settings.losses
    small = copy.deepcopy(model)
    kinds = library.importance
    importance = kinds.TaylorImportance() if losses else kinds.MagnitudeImportance()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pruner = library.pruner.BasePruner(
            small,
            inputs,
            importance=importance,
            global_pruning=settings.scattered,
            pruning_ratio=ratio,
            iterative_steps=settings.rounds,
            ignored_layers=[small.get_submodule(name) for name in settings.ignored],
        )
        for _ in range(settings.rounds):
            small.zero_grad(set_to_none=True)
            for loss in losses:
                (loss(small) / len(losses)).backward()
            pruner.step()
    small.zero_grad(set_to_none=True)
    return small
