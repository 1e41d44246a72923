"""Perturbation curves: what is left of the output as ever more of the input is removed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.passes.relevance.judging.estimate import Estimate, descending, estimate
from graphopt.passes.relevance.judging.removal import (
    Experiment,
    Model,
    Removal,
    Targets,
    experiment,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, eq=False)
class PerturbationCurves:
    """The target's output as units are removed, the most or the least relevant first.

    Attributes:
        shares: ``k / K`` for ``k = 0 .. K``: which share of the units that may be removed is.
        morf: ``(samples, K + 1)``, float64: y(k), most relevant first.
        lerf: The same, least relevant first.
        output: ``logit`` or ``probability``.
    """

    shares: tuple[float, ...]
    morf: Tensor
    lerf: Tensor
    output: str

    @property
    def areas(self) -> Tensor:
        """AUC(LeRF) - AUC(MoRF) of each sample, the AUC being the mean of y(k): ``(samples,)``."""
        return self.lerf.mean(1) - self.morf.mean(1)

    @property
    def abpc(self) -> Estimate:
        """The area between the perturbation curves; the higher, the more faithful."""
        return estimate(self.areas)

    @property
    def auc_morf(self) -> Estimate:
        """Mean of the curve, most relevant first; the lower, the better."""
        return estimate(self.morf.mean(1))

    @property
    def auc_lerf(self) -> Estimate:
        """Mean of the curve, least relevant first; the higher, the better."""
        return estimate(self.lerf.mean(1))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: the curves' means over the samples, and what they come to."""
        return {
            "output": self.output,
            "shares": list(self.shares),
            "morf": self.morf.mean(0).tolist(),
            "lerf": self.lerf.mean(0).tolist(),
            "auc_morf": self.auc_morf.to_dict(),
            "auc_lerf": self.auc_lerf.to_dict(),
            "abpc": self.abpc.to_dict(),
        }

    def plot(self) -> Figure:
        """A matplotlib figure of both curves.

        Raises:
            UnsupportedError: matplotlib isn't installed.
        """
        from graphopt.passes.relevance.judging.chart import draw

        label = f"{self.output} of the target"
        return draw(self.shares, self.morf, self.lerf, label, f"ABPC {self.abpc}")


def perturbation_curves(
    model: Model,
    inputs: Any,
    relevance: Tensor,
    *,
    targets: Targets = "argmax",
    removal: Removal | None = None,
    steps: int | None = None,
    seed: int = 0,
) -> PerturbationCurves:
    """Remove units in the order of their relevance, most (MoRF) and least (LeRF) relevant first.

    A relevance is faithful if MoRF makes the output fall at once and LeRF keeps it up: the area
    between both curves, ABPC, is large; it is 0 on average for an order by chance. Curves are those
    of Samek et al. 2017 ("Evaluating the visualization of what a deep neural network has learned",
    eq. 12); the difference of both orders is the symmetric relevance gain (SRG) of Blücher et al.
    2024 ("Decoupling pixel flipping and occlusion strategy for consistent XAI benchmarks"), called
    ABPC by Achtibat et al. 2024 (AttnLRP).

    Args:
        model: ``model(*inputs) -> (batch, classes)`` or ``(batch,)``; a module is run in eval mode
            and left as it was.
        inputs: A tensor or a sequence of inputs.
        relevance: Of the perturbed input's shape (without its channels or embedding axis if
            you like: these are summed over), or ``(samples, units)``.
        targets: The class whose output is watched: ``argmax`` of the model on the unperturbed
            input, a class, or one for each sample.
        removal: What is removed as one and what stands in its place; default: positions, by zero.
        steps: K: after step k, k/K of the units are removed. None: one unit a step, as many as the
            sample with the most of them has.
        seed: Of the order among units of equal relevance.

    Returns:
        Both curves of all samples.

    Raises:
        UsageError: A malformed removal, no step or more of them than units, a target out of range.
        InputMismatch: A relevance of another shape, or an output that isn't one row a sample.
        NonFiniteError: NaN or infinity in the relevance or the outputs.
    """
    with experiment(model, inputs, targets, removal, relevance) as trial:
        counts = _counts(trial.allowed.sum(1), steps)
        ranks = _ranks(trial.relevance, trial.allowed, seed)
        backwards = trial.allowed.sum(1, keepdim=True) - 1 - ranks
        morf, lerf = (_curve(trial, order, counts) for order in (ranks, backwards))
    last = counts.shape[1] - 1
    shares = tuple(step / last for step in range(last + 1))
    return PerturbationCurves(shares, morf.cpu(), lerf.cpu(), trial.output)


def _counts(available: Tensor, steps: int | None) -> Tensor:
    """How many units are removed after each step: ``(samples, K + 1)``."""
    most = int(available.max())
    steps = most if steps is None else steps
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= most:
        raise UsageError(f"steps={steps!r}: there are {most} units to remove, one to all a step")
    shares = torch.arange(steps + 1, device=available.device, dtype=torch.float64) / steps
    return (available[:, None] * shares + 0.5).floor().long()


def _ranks(values: Tensor, allowed: Tensor, seed: int) -> Tensor:
    """Place of each unit, the most relevant at 0; what may not be removed stands last."""
    order = descending(values.masked_fill(~allowed, -torch.inf), seed)
    return order.argsort(1)


def _curve(trial: Experiment, ranks: Tensor, counts: Tensor) -> Tensor:
    samples, steps = counts.shape

    def removed_in(rows: Tensor) -> tuple[Tensor, Tensor]:
        sample = rows // steps
        return sample, ranks[sample] < counts[sample, rows % steps, None]

    return trial.scores(samples * steps, removed_in).reshape(samples, steps)
