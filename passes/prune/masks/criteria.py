"""Criteria: what a single weight is worth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from graphopt.errors import NonFiniteError
from graphopt.passes.prune.masks.matrices import Matrix
from graphopt.passes.prune.masks.trial import Trial

Criterion = Literal["magnitude", "taylor", "taylor2", "random"]


def score(
    criterion: Criterion,
    matrices: Sequence[Matrix],
    trial: Trial | None,
    kept: Mapping[str, Tensor],
    seed: int,
) -> dict[str, Tensor]:
    """What each weight is worth, float32 on the CPU, of the parameters' shapes.

    Args:
        criterion: ``magnitude``: ``|w|`` (Han et al. 2015). ``taylor``: ``E |w g|``, ``taylor2``:
            ``E (w g)^2``, g the gradient of an example's loss: what the loss changes by to first
            order, and its square, which is twice the second-order term with the diagonal of the
            empirical Fisher information. ``random``: uniform.
        matrices: The weights.
        trial: For criteria that look at gradients.
        kept: What earlier masks keep; what they don't is worth -1.
        seed: Of random scores.

    Raises:
        NonFiniteError: A weight or a gradient is not finite.
    """
    if criterion == "random":
        generator = torch.Generator().manual_seed(seed)
        found = {m.name: torch.rand(m.parameter.shape, generator=generator) for m in matrices}
    elif criterion == "magnitude":
        found = {m.name: m.parameter.detach().float().abs().cpu() for m in matrices}
    else:
        assert trial is not None
        found = _taylor(trial, kept, 1 if criterion == "taylor" else 2)
    for name, values in found.items():
        if not bool(values.isfinite().all()):
            raise NonFiniteError(
                f"the criterion {criterion} is NaN or infinite for {name}",
                hint="are the weights, the loss and its gradients finite?",
            )
        if name in kept:
            values[~kept[name]] = -1.0
    return found


def _taylor(trial: Trial, kept: Mapping[str, Tensor], power: int) -> dict[str, Tensor]:
    weights = {name: w.detach().float() for name, w in trial.weights.items()}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    count = 0
    for gradients in trial.gradients(kept):
        for name, gradient in gradients.items():
            total[name] += (weights[name] * gradient.float()).abs() ** power
        count += 1
    return {name: (values / count).cpu() for name, values in total.items()}
