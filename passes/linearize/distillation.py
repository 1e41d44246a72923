"""How far outputs are from the source's: class scores, or numbers of any other kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from graphopt.training.objective import distillation_loss

# Of outputs that are zero, whose scale says nothing.
_LEAST_SCALE = 1e-12


def floating(results: Iterable[object]) -> list[Tensor]:
    """The floating tensors among a graph's results."""
    return [v for v in results if isinstance(v, Tensor) and v.is_floating_point()]


def logits_of(outputs: Sequence[Tensor]) -> Tensor | None:
    """Class scores ``[batch, classes]``, where outputs are these and nothing else."""
    found = len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] > 1
    return outputs[0] if found else None


def distance(student: Sequence[Tensor], teacher: Sequence[Tensor], temperature: float) -> Tensor:
    """How far outputs are from the source's, without labels.

    Args:
        student: Floating outputs.
        teacher: The source's.
        temperature: T of the distillation.

    Returns:
        For class scores ``T^2 KL`` of the softened classes (Hinton et al. 2015); else the sum over
        outputs of half the squared error, relative to the source's mean square. A scalar,
        float64: the distances of single elements are lost in float32.
    """
    if logits_of(teacher) is not None:
        (mine,), (aims,) = student, teacher
        return distillation_loss(mine.double(), aims.double(), temperature)
    pairs = [(a.double(), b.double()) for a, b in zip(student, teacher, strict=True)]
    errors = [
        (a - b).square().mean() / (2 * b.square().mean().clamp_min(_LEAST_SCALE)) for a, b in pairs
    ]
    return torch.stack(errors).sum() if errors else torch.zeros((), dtype=torch.float64)
