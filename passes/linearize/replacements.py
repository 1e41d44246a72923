"""What stands in for a non-linearity, and how it is fitted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from graphopt.passes.linearize.fit import evaluate, fit_samples
from graphopt.passes.linearize.sites import Site

Kind = Literal["identity", "affine", "poly2", "poly3", "poly4"]
# Samples of a channel that are fitted to.
_MOST_SAMPLES = 1 << 16
DEGREES: dict[Kind, int] = {"identity": 0, "affine": 1, "poly2": 2, "poly3": 3, "poly4": 4}


@dataclass(frozen=True, eq=False)
class Replacement:
    """What becomes of one site.

    Attributes:
        site: The site.
        kept: Positions that keep the non-linearity, rising, int64 ``[kept]``.
        kind: What the others get.
        coefficients: By rising power for each channel, ``[degree + 1, channels]``, float64; None
            for the identity.
    """

    site: Site
    kept: Tensor
    kind: Kind
    coefficients: Tensor | None

    @property
    def is_whole(self) -> bool:
        """Whether the site stays as it is."""
        return len(self.kept) == self.site.positions

    def rest(self) -> Tensor:
        """Positions that are replaced, rising."""
        gone = torch.ones(self.site.positions, dtype=torch.bool)
        gone[self.kept] = False
        return gone.nonzero().squeeze(1)

    def mask(self) -> Tensor:
        """True at the positions that are kept."""
        kept = torch.zeros(self.site.positions, dtype=torch.bool)
        kept[self.kept] = True
        return kept

    def of(self, x: Tensor, exact: Tensor) -> Tensor:
        """The site's result.

        Args:
            x: What the site reads.
            exact: What the non-linearity gives for it.
        """
        if self.is_whole:
            return exact
        site = self.site
        replaced = approximated(site, self.kind, self.coefficients, x)
        if not len(self.kept):
            return replaced
        mask = self.mask().to(x.device).view(1, -1, 1)
        mixed = torch.where(mask, site.flat(exact), site.flat(replaced))
        return mixed.view(x.shape)


def approximated(site: Site, kind: Kind, coefficients: Tensor | None, x: Tensor) -> Tensor:
    """A site's replacement at every position."""
    x = site.base(x)
    if coefficients is None:
        return x
    beside = [-1 if axis == site.channel else 1 for axis in range(x.dim())]
    own = coefficients.to(x.dtype).to(x.device)
    return evaluate(own.view(len(own), *beside), x)


def by_channel(site: Site, values: Sequence[Tensor]) -> Tensor:
    """Values of a site as ``[channels, samples]``, of so many samples that a fit needs."""
    axis = site.channel
    parts = [
        v.reshape(1, -1) if axis is None else v.movedim(axis, 0).reshape(v.shape[axis], -1)
        for v in values
    ]
    count = sum(part.shape[1] for part in parts)
    if count > _MOST_SAMPLES:
        generator = torch.Generator().manual_seed(count)  # the same places in every call
        share = _MOST_SAMPLES / count
        parts = [
            part[:, torch.randint(n, (max(1, round(share * n)),), generator=generator)]
            for part in parts
            for n in (part.shape[1],)
        ]
    return torch.cat(parts, 1)


def fitted(
    site: Site, kind: Kind, x: Sequence[Tensor], y: Sequence[Tensor], kept: Tensor | None = None
) -> Tensor | None:
    """Coefficients that bring a replacement nearest to what it stands for.

    Args:
        site: The site.
        kind: The replacement.
        x: What the site reads, of each batch.
        y: What shall come out.
        kept: Positions that don't count since they keep the non-linearity; None: all count.
    """
    if kind == "identity":
        return None
    weights, x = None, [site.base(v) for v in x]
    if kept is not None and len(kept) and len(kept) < site.positions:
        mask = torch.ones(site.positions)
        mask[kept] = 0.0
        each = [mask.view(1, -1, 1).expand_as(site.flat(v)).reshape(v.shape) for v in x]
        weights = by_channel(site, each)
    return fit_samples(by_channel(site, x), by_channel(site, y), DEGREES[kind], weights)
