"""Widths improved by measuring the masked network on data (`solvers.width_evolve`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.errors import NonFiniteError
from graphopt.passes.prune.distortion import Distortion
from graphopt.pipeline import PassContext
from graphopt.report import Refinement
from graphopt.solvers.width_evolve import Widths, evolve
from graphopt.solvers.width_problem import WidthProblem


def refined(
    problem: WidthProblem,
    start: Sequence[int],
    removed: Callable[[Widths], frozenset[int]],
    measured: Distortion,
    evaluations: int,
    context: PassContext,
) -> list[tuple[Widths, Refinement]]:
    """Widths that measured better and better, the start first, and what was gained by each.

    The user's loss is measured where there is one, else how far the outputs move.

    Args:
        problem: The widths that are allowed, and the limits.
        start: Where to begin.
        removed: The units that go at some widths.
        measured: The network and its batches.
        evaluations: How often the batches may be gone through.
        context: Seed, progress, whether there is a loss.
    """
    by_loss = context.data_loss is not None
    measure = measured.loss if by_loss else measured.of

    def value(widths: Widths, some: Sequence[int]) -> float:
        return measure(removed(widths), some)

    def progress(used: float, best: float) -> None:
        context.progress(f"refining widths: {best:.4g}", min(1.0, used / evaluations))

    samples = len(measured.batches)
    found = evolve(
        problem, start, value, samples, evaluations=evaluations, seed=context.seed,
        progress=progress,
    )  # fmt: skip
    kind = "loss" if by_loss else "distortion"
    if not math.isfinite(found.values[0]):
        raise NonFiniteError(f"the {kind} of the pruned network is {found.values[0]}")
    first = found.values[0]
    return [
        (widths, Refinement(kind, first, now, found.evaluations))
        for widths, now in zip(found.incumbents, found.values, strict=True)
    ]
