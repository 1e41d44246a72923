"""What a network gives on a batch: outputs, how far they are from others, loss, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.batches import Batch
from graphopt.comparison import probe_loss
from graphopt.errors import UnsupportedError


def floating_outputs(module: nn.Module, batch: Batch, seed: int) -> list[Tensor]:
    """The floating tensors among a module's outputs; random draws are those of the seed.

    Raises:
        InputMismatch: The module doesn't take the batch.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        leaves = pytree.tree_leaves(batch.outputs(module))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


def loss_of(module: nn.Module, batch: Batch, seed: int) -> Tensor:
    """The loss of a module on a batch; its random draws are those of the seed, and nobody else's.

    Raises:
        InputMismatch: The module doesn't take the batch.
        ModelError: The user's loss fails.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return batch.loss(batch.outputs(module), probe_loss)


def gradients_of(loss: Tensor, tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Gradients of a loss by tensors; None for those that it doesn't depend on.

    Raises:
        UnsupportedError: It depends on nothing that has a gradient.
    """
    if not loss.requires_grad:
        raise UnsupportedError(
            "a criterion of gradients: no parameter got one",
            hint="give a loss that depends on the parameters, or a criterion of weights alone",
        )
    return torch.autograd.grad(loss, tensors, allow_unused=True)


def distance(exact: Sequence[Tensor], got: Sequence[Tensor]) -> float:
    """Squared distance of outputs from exact ones, relative to the spread of these, summed up.

    0 where they are equal; 1 for one output that is as far from the exact one as its mean.
    """
    total = 0.0
    for a, b in zip(exact, got, strict=True):
        wide = a.double()
        spread = (wide - wide.mean()).square().sum().clamp_min(1e-30)
        total += float((wide - b.double()).square().sum() / spread)
    return total
