"""iCBS: which weights go is decided together, by a quadratic model of the loss.

Setting weights to zero changes the loss by ``g.d + d.H d / 2`` to second order, d the change of the
weights, g the mean gradient of examples and H the empirical Fisher information of their gradients,
``sum g_n g_n' / N``, plus a ridge that keeps changes small.  With z = 1 for each weight that goes
this is the cost of a selection (`graphopt.solvers.selection`), which block coordinate descent
lowers from the masks that it is given; then the model is drawn up anew at the masked weights, and
the masks that give the least loss on the data are taken.  After Rosenberg et al., "Scalable
iterative pruning of large language and vision models using block coordinate descent" (2024), on the
problem of Yu et al., "The Combinatorial Brain Surgeon" (ICML 2022).  The weights that stay are not
updated.

Weights exchange places within their own matrix (or group of a pattern): how many each keeps is the
allocation's business.  Of large models the weights nearest to being exchanged take part.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphopt.passes.prune.masks.matrices import Matrix
from graphopt.passes.prune.masks.trial import Kept, Trial
from graphopt.pipeline import Progress
from graphopt.solvers.selection import Quadratic, Selection, select

_NUMBERS = 1 << 26
"""Most entries of all gradients of the weights that take part."""
_RIDGE = 1.0
"""The ridge, as a multiple of the mean of the diagonal."""


@dataclass(frozen=True)
class Surgery:
    """What came out.

    Attributes:
        kept: The masks.
        selections: The solver's answer of each round.
        losses: The mean loss on the data of the masks given, and after each round.
        candidates: How many weights took part in the last round.
    """

    kept: dict[str, Tensor]
    selections: tuple[Selection, ...]
    losses: tuple[float, ...]
    candidates: int


def operate(
    matrices: Sequence[Matrix],
    start: Kept,
    groups: Mapping[str, Tensor],
    alive: Kept,
    trial: Trial,
    rounds: int,
    time_limit: float,
    progress: Progress,
) -> Surgery:
    """Exchange weights that are kept for ones that are not.

    Args:
        matrices: The weights.
        start: Masks to start with.
        groups: The group of each weight, from 0 in each matrix; weights exchange within groups.
        alive: What earlier masks keep: nothing else comes back.
        trial: Gives gradients.
        rounds: How often the model is drawn up.
        time_limit: Seconds for the solver, in all rounds together.
        progress: Told what goes on.
    """
    now = {m.name: start[m.name].clone() for m in matrices}
    best, losses = now, [trial.loss(now)]
    selections, candidates = [], 0
    for number in range(rounds):
        progress("quadratic model of the loss", number / rounds)
        model = _Model(matrices, now, groups, alive, trial)
        found = select(model.problem, model.taken, time_limit=time_limit / rounds)
        selections.append(found)
        candidates = len(model.taken)
        now = model.applied(now, found.taken)
        losses.append(trial.loss(now))
        if losses[-1] <= min(losses):
            best = now
        if found.cost >= found.start:
            break
    return Surgery(best, tuple(selections), tuple(losses), candidates)


class _Model:
    """The quadratic model around some masks, over the weights that take part."""

    def __init__(
        self,
        matrices: Sequence[Matrix],
        now: Kept,
        groups: Mapping[str, Tensor],
        alive: Kept,
        trial: Trial,
    ) -> None:
        self.names = [m.name for m in matrices]
        self.weights = torch.cat([m.parameter.detach().float().reshape(-1).cpu() for m in matrices])
        gone = ~self._flat(now)
        free = self._flat({n: alive.get(n, torch.ones_like(now[n])) for n in self.names})
        mean, square, count = self._moments(trial, now)
        ridge = _RIDGE * float(square.mean())
        # What a change of each weight alone costs, from where it is now.
        away = torch.where(gone, -1.0, 1.0) * self.weights.square() / 2
        linear = ridge * away - mean * self.weights
        alone = torch.where(gone, -linear, linear) + square * self.weights.square() / 2
        self.places = self._candidates(alone, gone, free, _NUMBERS // max(count, 1))
        self.taken = gone[self.places].numpy()
        rows = self._rows(trial, now, count)
        numbers = self._groups(matrices, groups)[self.places].numpy()
        _, index = np.unique(numbers, return_inverse=True)
        self.problem = Quadratic(
            linear=linear[self.places].double().numpy(),
            factors=rows,
            offset=-rows[:, self.taken].sum(1, dtype=np.float64),  # what is gone changes no more
            groups=index,
            counts=np.bincount(index[self.taken], minlength=int(index.max(initial=-1)) + 1),
        )

    def applied(self, now: Kept, taken: np.ndarray) -> dict[str, Tensor]:
        """Masks with the selection in the places that took part."""
        kept = self._flat(now).clone()
        kept[self.places] = torch.from_numpy(~taken)
        parts = kept.split([now[name].numel() for name in self.names])
        return {
            name: part.reshape(now[name].shape)
            for name, part in zip(self.names, parts, strict=True)
        }

    def _flat(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[name].reshape(-1).cpu() for name in self.names])

    def _groups(self, matrices: Sequence[Matrix], groups: Mapping[str, Tensor]) -> Tensor:
        """Numbers of groups that no two matrices share."""
        parts, first = [], 0
        for m in matrices:
            part = groups[m.name].reshape(-1)
            parts.append(part + first)
            first += int(part.max()) + 1
        return torch.cat(parts)

    def _moments(self, trial: Trial, now: Kept) -> tuple[Tensor, Tensor, int]:
        """Mean and mean square of the examples' gradients, and how many there are."""
        mean, square, count = torch.zeros_like(self.weights), torch.zeros_like(self.weights), 0
        for gradients in trial.gradients(now):
            flat = self._flat(gradients).float()
            mean += flat
            square += flat.square()
            count += 1
        return mean / count, square / count, count

    def _candidates(self, alone: Tensor, gone: Tensor, free: Tensor, most: int) -> Tensor:
        """Of both kinds those that cost least to change."""
        chosen = []
        for side in (gone & free, ~gone & free):
            places = side.nonzero().squeeze(1)
            if len(places) > most // 2:
                places = places[alone[places].argsort(stable=True)[: most // 2]]
            chosen.append(places)
        return torch.cat(chosen).sort().values

    def _rows(self, trial: Trial, now: Kept, count: int) -> np.ndarray:
        """``g_n w / sqrt(N)`` of the weights that take part, float32, [examples, weights]."""
        scaled = self.weights[self.places] / math.sqrt(count)
        rows = np.empty((count, len(self.places)), np.float32)
        for number, gradients in enumerate(trial.gradients(now)):
            rows[number] = (self._flat(gradients).float()[self.places] * scaled).numpy()
        return rows
