"""Choosing approximate rewrites: fitted to the site, measured together, fewer if it is too much."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphopt.comparison import Observation
from graphopt.passes.share.fit import Steps, fit_steps
from graphopt.passes.share.steps import StepDerivative, candidates
from graphopt.planning.evaluate import forward_values
from graphopt.planning.situation import Situation

# Enough for thresholds that don't depend on which elements were taken.
_MOST_SAMPLES = 1 << 18


@dataclass(frozen=True)
class FittedSite:
    """A site and the steps fitted to what goes through it.

    Attributes:
        node: Name of the backward op.
        steps: The fitted step function.
        error: Its relative distance from the derivative over the samples.
    """

    node: str
    steps: Steps
    error: float


def fitted_sites(
    situation: Situation, module: nn.Module, inputs: Sequence[Tensor], seed: int
) -> list[FittedSite]:
    """All sites, the best first."""
    nodes = candidates(situation.view)
    arguments = {node: node.args[1] for node in nodes}
    values = forward_values(situation, module, inputs, arguments.values(), seed=seed)  # type: ignore[arg-type]
    sites = [_fitted(node, values[argument]) for node, argument in arguments.items()]  # type: ignore[index]
    return sorted(sites, key=lambda site: site.error)


def _fitted(node: fx.Node, u: Tensor) -> FittedSite:
    flat = u.flatten()
    flat = flat[:: max(1, flat.numel() // _MOST_SAMPLES)].double()
    slopes = derivative(node, flat)
    x, y = flat.cpu().numpy(), slopes.cpu().numpy()
    steps = fit_steps(x, y)
    return FittedSite(node.name, steps, steps.error(x, y))


def derivative(node: fx.Node, u: Tensor) -> Tensor:
    """What an activation's backward op multiplies gradients by, at u."""
    call: Any = node.target
    return call(torch.ones_like(u), u, *node.args[2:], **node.kwargs)


def gradient_error(exact: Observation, got: Observation) -> tuple[float, float]:
    """Relative distance and cosine of all gradients together."""
    a = np.concatenate([_flat(exact.gradients[name]) for name in sorted(exact.gradients)])
    b = np.concatenate([_flat(got.gradients[name]) for name in sorted(exact.gradients)])
    norm = float(np.linalg.norm(a)) or 1.0
    cosine = float(a @ b) / (norm * (float(np.linalg.norm(b)) or 1.0))
    return float(np.linalg.norm(a - b)) / norm, cosine


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().flatten().double().cpu().numpy()


def as_rewrite(sites: Sequence[FittedSite]) -> StepDerivative:
    """The rule for these sites."""
    return StepDerivative(tuple((s.node, s.steps.thresholds, s.steps.levels) for s in sites))


def most_sites(
    sites: Sequence[FittedSite], allowed: float, measured: Callable[[Sequence[FittedSite]], float]
) -> list[FittedSite]:
    """The longest row of best sites whose measured gradient error is allowed.

    Args:
        sites: The best first.
        allowed: The error granted.
        measured: The gradient error of some sites together.
    """
    if not sites or measured(sites) <= allowed:
        return list(sites)
    low, high = 0, len(sites)  # low is allowed, high is not
    while high - low > 1:
        middle = (low + high) // 2
        if measured(sites[:middle]) <= allowed:
            low = middle
        else:
            high = middle
    return list(sites[:low])
