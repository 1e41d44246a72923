"""Leave one unit out, or many: what the output loses, against what the relevance promises."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import UsageError
from graphopt.passes.relevance.judging.estimate import Estimate, estimate, pearson, spearman
from graphopt.passes.relevance.judging.removal import (
    Experiment,
    Model,
    Removal,
    Targets,
    experiment,
)


def leave_one_out(
    model: Model, inputs: Any, *, targets: Targets = "argmax", removal: Removal | None = None
) -> Tensor:
    """What the output loses when one unit is removed: y(x) - y(x without unit i).

    Zeiler and Fergus 2014 (occlusion), Li et al. 2016 (erasure). It is exact about single units,
    and blind for what several units say alike.

    Args:
        model: As `perturbation_curves` takes it, like everything else here.
        inputs: A tensor or a sequence of inputs.
        targets: The class whose output is watched.
        removal: What is removed as one and what stands in its place.

    Returns:
        ``(samples, units)``, float64, zero for units that may not be removed: a relevance that
        the functions here take.

    Raises:
        UsageError: A malformed removal, or a target out of range.
        InputMismatch: An output that isn't one row a sample.
        NonFiniteError: The model gives NaN or infinity.
    """
    with experiment(model, inputs, targets, removal) as trial:
        return _left_out(trial)


def leave_one_out_correlation(
    model: Model,
    inputs: Any,
    relevance: Tensor,
    *,
    targets: Targets = "argmax",
    removal: Removal | None = None,
) -> Estimate:
    """Spearman's rank correlation of a relevance with `leave_one_out`, over the units of a sample.

    Args:
        model: As `perturbation_curves` takes it, like everything else here.
        inputs: A tensor or a sequence of inputs.
        relevance: Of the perturbed input's shape, or ``(samples, units)``.
        targets: The class whose output is watched.
        removal: What is removed as one and what stands in its place.

    Raises:
        InputMismatch: A relevance of another shape.
        NonFiniteError: NaN or infinity in the relevance or the outputs.
    """
    with experiment(model, inputs, targets, removal, relevance) as trial:
        return estimate(spearman(trial.relevance, _left_out(trial), trial.allowed))


def sensitivity_n(
    model: Model,
    inputs: Any,
    relevance: Tensor,
    n: int,
    *,
    subsets: int = 50,
    targets: Targets = "argmax",
    removal: Removal | None = None,
    seed: int = 0,
) -> Estimate:
    """Correlation of the relevance of n random units with what the output loses without them.

    Ancona et al. 2018 ("Towards better understanding of gradient-based attribution methods", eq. 4
    ff.): Pearson's correlation over the subsets, of each sample.

    Args:
        model: As `perturbation_curves` takes it, like everything else here.
        inputs: A tensor or a sequence of inputs.
        relevance: Of the perturbed input's shape, or ``(samples, units)``.
        n: How many units are removed at once.
        subsets: How many random subsets of each sample.
        targets: The class whose output is watched.
        removal: What is removed as one and what stands in its place.
        seed: Of the subsets.

    Raises:
        UsageError: n out of range, or fewer than two subsets.
        InputMismatch: A relevance of another shape.
        NonFiniteError: NaN or infinity in the relevance or the outputs.
    """
    with experiment(model, inputs, targets, removal, relevance) as trial:
        fewest = int(trial.allowed.sum(1).min())
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= fewest:
            raise UsageError(f"n={n!r} is out of range: {fewest} units may be removed")
        sizes = torch.full((trial.units.batch, _many(subsets)), n)
        promised, lost = _promised_and_lost(trial, sizes, seed)
    return estimate(pearson(promised, lost))


def infidelity(
    model: Model,
    inputs: Any,
    relevance: Tensor,
    *,
    subsets: int = 50,
    targets: Targets = "argmax",
    removal: Removal | None = None,
    seed: int = 0,
) -> Estimate:
    """Expected squared error of the relevance's promise about random subsets; lower is better.

    Yeh et al. 2019 ("On the (in)fidelity and sensitivity of explanations", definition 2.1, with
    square removal): the subset's size is uniform from 1 to all units, and the sum of the
    relevance stands for the product of gradient and perturbation. In units of the mean squared
    change of the output, after the best factor for each sample, which the authors apply too: 1 for
    a relevance that says nothing, 0 for one that foretells every change.

    Args:
        model: As `perturbation_curves` takes it, like everything else here.
        inputs: A tensor or a sequence of inputs.
        relevance: Of the perturbed input's shape, or ``(samples, units)``.
        subsets: How many random subsets of each sample.
        targets: The class whose output is watched.
        removal: What is removed as one and what stands in its place.
        seed: Of the subsets.

    Raises:
        UsageError: Fewer than two subsets.
        InputMismatch: A relevance of another shape.
        NonFiniteError: NaN or infinity in the relevance or the outputs.
    """
    with experiment(model, inputs, targets, removal, relevance) as trial:
        generator = torch.Generator().manual_seed(seed)
        shares = torch.rand(trial.units.batch, _many(subsets), generator=generator)
        sizes = 1 + (shares * trial.allowed.sum(1).cpu()[:, None]).long()
        promised, lost = _promised_and_lost(trial, sizes, seed + 1)
    power, energy = promised.square().sum(1), lost.square().sum(1)
    both = (promised * lost).sum(1)
    factor = torch.where(power > 0, both / power, 0.0)
    errors = (factor[:, None] * promised - lost).square().sum(1)
    return estimate(torch.where(energy > 0, errors / energy, 0.0))


def _left_out(trial: Experiment) -> Tensor:
    pairs = trial.allowed.nonzero()

    def removed_in(rows: Tensor) -> tuple[Tensor, Tensor]:
        removed = torch.zeros(len(rows), trial.units.count, dtype=torch.bool, device=rows.device)
        removed[torch.arange(len(rows), device=rows.device), pairs[rows, 1]] = True
        return pairs[rows, 0], removed

    without = trial.scores(len(pairs), removed_in)
    found = without.new_zeros(trial.allowed.shape)
    found[pairs[:, 0], pairs[:, 1]] = trial.untouched_scores()[pairs[:, 0]] - without
    return found


def _many(subsets: int) -> int:
    if isinstance(subsets, bool) or not isinstance(subsets, int) or subsets < 2:
        raise UsageError(f"subsets={subsets!r}: two or more are needed")
    return subsets


def _promised_and_lost(trial: Experiment, sizes: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Relevance of random subsets of these sizes and the output's loss: ``(samples, subsets)``."""
    values = trial.relevance
    samples, subsets = sizes.shape
    generator = torch.Generator().manual_seed(seed)
    sizes = sizes.to(values.device)
    promised = torch.empty(samples, subsets, dtype=torch.float64, device=values.device)
    removed = torch.empty(samples, subsets, trial.units.count, dtype=torch.bool)
    removed = removed.to(values.device)
    for sample in range(samples):
        keys = torch.rand(subsets, trial.units.count, generator=generator).to(values.device)
        ranks = keys.masked_fill(~trial.allowed[sample], 2.0).argsort(1).argsort(1)
        removed[sample] = ranks < sizes[sample, :, None]
        promised[sample] = removed[sample].to(torch.float64) @ values[sample]
    scores = trial.scores(
        samples * subsets, lambda rows: (rows // subsets, removed[rows // subsets, rows % subsets])
    )
    return promised, trial.untouched_scores()[:, None] - scores.reshape(samples, subsets)
