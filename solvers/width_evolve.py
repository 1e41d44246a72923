"""Widths improved by measuring: level switches, chosen from on few samples first.

The search of EvoPress (Sieberling et al. 2024) on width problems: a candidate is the incumbent with
one dimension wider and others narrower at the same cost; many are measured on few samples, the best
of them on more, the best one on all, and it becomes the incumbent if it measures better there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.solvers.width_problem import WidthError, WidthProblem
from graphopt.solvers.width_table import Choice, WidthTable

# How many candidates of a generation are measured on a sixteenth of the samples, a quarter, all.
_STAGES = ((16, 1 / 16), (4, 1 / 4), (1, 1.0))
_SWITCHES = 3  # at most so many dimensions are widened at a time
_STEPS = (1 / 64, 1 / 8)  # by how much, as shares of the full width
_TRIES = 8

Widths = tuple[int, ...]
Measure = Callable[[Widths, Sequence[int]], float]
"""From widths and the indices of samples to what is to be small."""


@dataclass(frozen=True)
class Evolution:
    """What was found.

    Attributes:
        incumbents: Widths that were the best for a time, the first the start, the last the best.
        values: What each measured on all samples; falling.
        evaluations: How often all samples were gone through, parts of them added up.
    """

    incumbents: tuple[Widths, ...]
    values: tuple[float, ...]
    evaluations: float


def evolve(
    problem: WidthProblem,
    start: Sequence[int],
    measure: Measure,
    samples: int,
    *,
    evaluations: int,
    seed: int = 0,
    progress: Callable[[float, float], None] | None = None,
) -> Evolution:
    """Widths within the limits that measure better than the start.

    Args:
        problem: What is allowed; gains don't matter.
        start: Allowed widths within the limits.
        measure: Called with widths and indices of samples.
        samples: How many samples there are.
        evaluations: When to stop: no generation starts that would go beyond it.
        seed: Of all random draws; the same seed gives the same widths.
        progress: Called with the evaluations so far and the best value.

    Raises:
        WidthError: The start isn't allowed, or there is nothing to measure on.
    """
    table = WidthTable(problem)
    best = _choice(table, start)
    if samples < 1 or not table.fits(best):
        raise WidthError(f"{samples} samples, or a start beyond the limits: {tuple(start)}")
    stages = [(count, size) for count, share in _STAGES
              if (size := round(samples * share)) >= 1]  # fmt: skip
    generation = sum(count * size for count, size in stages) / samples
    rng = np.random.default_rng(seed)
    incumbents, used = [table.widths(best)], 1.0
    values = [measure(incumbents[0], range(samples))]
    while used + generation <= evaluations:
        candidates = _offspring(table, best, stages[0][0], rng)
        if not candidates:
            break
        value = values[-1]
        for count, size in stages:
            some = sorted(rng.choice(samples, size, replace=False).tolist())
            measured = sorted(
                (measure(table.widths(child), some), i)
                for i, child in enumerate(candidates[:count])
            )
            used += len(measured) * size / samples
            candidates = [candidates[i] for _, i in measured]
            value = measured[0][0]
        if value < values[-1]:
            best = candidates[0]
            incumbents.append(table.widths(best))
            values.append(value)
        if progress:
            progress(used, values[-1])
    return Evolution(tuple(incumbents), tuple(values), used)


def _choice(table: WidthTable, widths: Sequence[int]) -> Choice:
    allowed = [dimension.widths for dimension in table.problem.dimensions]
    for options, width in zip(allowed, widths, strict=True):
        if width not in options:
            raise WidthError(f"{width} is not among the allowed widths")
    return np.array(
        [options.index(w) for options, w in zip(allowed, widths, strict=True)], np.int64
    )


def _offspring(
    table: WidthTable, parent: Choice, count: int, rng: np.random.Generator
) -> list[Choice]:
    """Distinct candidates, as many as are found in some tries each."""
    found: dict[tuple[int, ...], Choice] = {}
    for _ in range(_TRIES * count):
        if len(found) == count:
            break
        child = _switched(table, parent, rng)
        if child is not None and not np.array_equal(child, parent):
            found.setdefault(tuple(child.tolist()), child)
    return list(found.values())


def _switched(table: WidthTable, parent: Choice, rng: np.random.Generator) -> Choice | None:
    """Some dimensions wider, others narrower until the limits are met, then what is left spent."""
    child = parent.copy()
    room = np.flatnonzero(parent < table.last)
    if not len(room):
        return None
    widened = rng.permutation(room)[: rng.integers(1, _SWITCHES + 1)]
    for d in widened:
        share = math.exp(float(rng.uniform(math.log(_STEPS[0]), math.log(_STEPS[1]))))
        child[d] = min(table.last[d], parent[d] + max(1, round(share * float(table.last[d] + 1))))
    others = rng.permutation(np.setdiff1d(table.rows, widened))
    for d in others:
        while child[d] > 0 and not table.fits(child):
            child[d] -= 1
    if not table.fits(child):
        return None
    for d in rng.permutation(table.rows):
        while child[d] < table.last[d]:
            child[d] += 1
            if not table.fits(child):
                child[d] -= 1
                break
    return child
