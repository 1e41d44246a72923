"""What a network gives on a batch, and how far that is from what another gives."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from graphopt.batches import Batch


def floating_outputs(module: nn.Module, batch: Batch) -> list[Tensor]:
    """The floating tensors among a module's outputs.

    Raises:
        InputMismatch: The module doesn't take the batch.
    """
    leaves = pytree.tree_leaves(batch.outputs(module))
    return [t for t in leaves if isinstance(t, Tensor) and t.is_floating_point()]


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
