"""Does the relevance lie where the cause is known to be?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import InputMismatch, NonFiniteError, UsageError
from graphopt.passes.relevance.judging.estimate import Estimate, descending, estimate


@dataclass(frozen=True)
class Localisation:
    """How much of the relevance lies in the known mask.

    Attributes:
        k: How many of the highest positions were looked at.
        hit_rate: Share of the k highest positions that lie in the mask.
        top_k_accuracy: Share of samples of which at least one of the k highest lies in the mask.
        rank_accuracy: `hit_rate` with k the size of the sample's own mask.
        mass_accuracy: Share of the positive relevance that lies in the mask.
        chance: Mean share of positions that the masks cover: what `hit_rate`, `rank_accuracy` and
            `mass_accuracy` are by chance.
    """

    k: int
    hit_rate: Estimate
    top_k_accuracy: Estimate
    rank_accuracy: Estimate
    mass_accuracy: Estimate
    chance: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        found = {name: getattr(self, name).to_dict() for name in _ESTIMATES}
        return {"k": self.k, "chance": self.chance, **found}


_ESTIMATES = ("hit_rate", "top_k_accuracy", "rank_accuracy", "mass_accuracy")


def localisation(
    relevance: Tensor,
    truth: Tensor,
    *,
    k: int = 1,
    allowed: Tensor | None = None,
    seed: int = 0,
) -> Localisation:
    """Compare a relevance with a mask of what is known to matter.

    Rank and mass accuracy are those of Arras et al. 2022 ("CLEVR-XAI", eq. 1 and 2), the mass being
    that of positive relevance; with k=1, `top_k_accuracy` is the pointing game (Zhang et al. 2018).

    Args:
        relevance: ``(batch, ...)``, one value for each position: sum over channels first.
        truth: Of the same shape, bool: True where the cause is.
        k: How many of the highest positions are looked at.
        allowed: Of the same shape, bool: which positions count (not padding); None: all.
        seed: Of the order among positions of equal relevance.

    Raises:
        InputMismatch: Shapes that differ.
        UsageError: k out of range, or a sample without any position in the mask.
        NonFiniteError: NaN or infinity in the relevance.
    """
    values, inside, counted = _read(relevance, truth, allowed)
    fewest = int(counted.sum(1).min())
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= fewest:
        raise UsageError(f"k={k!r} is out of range: there are {fewest} positions")
    order = descending(values.masked_fill(~counted, -torch.inf), seed)
    hits = inside.gather(1, order).cumsum(1)
    size = inside.sum(1)
    positive = values.clamp(min=0) * counted
    mass = positive.sum(1)
    share = torch.where(mass > 0, (positive * inside).sum(1) / mass, 0.0)
    return Localisation(
        k,
        estimate(hits[:, k - 1] / k),
        estimate(hits[:, k - 1] > 0),
        estimate(hits.gather(1, size[:, None] - 1)[:, 0] / size),
        estimate(share),
        float((size / counted.sum(1)).mean()),
    )


def _read(
    relevance: Tensor, truth: Tensor, allowed: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, mask and what counts, each ``(batch, positions)``."""
    allowed = torch.ones_like(truth, dtype=torch.bool) if allowed is None else allowed
    for name, other in (("truth", truth), ("allowed", allowed)):
        if other.shape != relevance.shape or relevance.dim() < 2:
            raise InputMismatch(
                f"a relevance of shape {tuple(relevance.shape)}, but {name} of shape "
                f"{tuple(other.shape)}",
                hint="both (batch, positions...); sum a relevance over its channels first",
            )
    if not torch.isfinite(relevance).all():
        raise NonFiniteError("the relevance holds NaN or infinity")
    values = relevance.detach().to(torch.float64).flatten(1)
    counted = allowed.to(values.device).flatten(1) != 0
    inside = (truth.to(values.device).flatten(1) != 0) & counted
    empty = (~inside.any(1)).nonzero().flatten().tolist()
    if empty:
        raise UsageError(f"the masks of samples {empty[:8]} are empty")
    return values, inside, counted
