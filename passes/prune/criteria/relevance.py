"""A criterion of relevance: how much of what the outputs say passes through a unit.

Relevance comes from whatever pass serves explanations and has a method ``arrivals(program,
context)``, found through the registry: the result's ``run(args, kwargs, index)`` gives what arrives
at each value, by the name of its node, of the value's shape.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from graphopt import registry
from graphopt.batches import Batch
from graphopt.errors import UnsupportedError
from graphopt.passes.prune.criteria.base import Calibration, Scores
from graphopt.passes.prune.criteria.ends import calls, copies, ends
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.rewrite import graph_pairs
from graphopt.pipeline import PassContext

_Places = dict[tuple[str, int], set[tuple[int, int]]]  # (value, axis) -> (place, unit)


def relevance(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """``sum_rows |sum_positions R|`` over the places of a unit in what is read.

    R is the relevance of the score of each row's class (of the largest one where batches have no
    class indices), propagated layer by layer.  As in pruning by explaining (Yeom et al. 2021) a
    filter's relevance is the sum over its activations; its size is taken row by row.  A value
    that several layers read counts once, with all that they hand back to it.  As relevance is
    conserved from layer to layer, scores of different layers compare.

    Raises:
        UnsupportedError: No installed pass tells relevance, or a dimension has units in nothing
            that carries it.
    """
    places = _places(dimensions, calibration)
    scores: dict[int, float] = defaultdict(float)
    seen: set[int] = set()
    arrivals: Any = None
    for batch in calibration.batches:
        if arrivals is None:
            arrivals = _arrivals(calibration, batch)
        found = arrivals.run(batch.args, batch.kwargs, _classes(batch))
        for (name, axis), pairs in places.items():
            if name in found:
                sums = _by_place(found[name], axis)
                seen.update(unit for _, unit in pairs)
                for place, unit in pairs:
                    scores[unit] += sums[place]
    _check(dimensions, seen)
    return scores


def _arrivals(calibration: Calibration, batch: Batch) -> Any:
    for cls in registry.serving("explanation"):
        if hasattr(cls, "arrivals"):
            context = PassContext(batch.args, batch.kwargs, seed=calibration.seed)
            return cls().arrivals(calibration.program, context)  # type: ignore[attr-defined]
    raise UnsupportedError(
        "criterion=relevance: no installed pass tells the relevance of values",
        hint="`graphopt passes` lists what is installed; criterion=taylor2 needs no other pass",
    )


def _places(dimensions: Dimensions, calibration: Calibration) -> _Places:
    """Where units end, in the graph that runs in eval mode."""
    found: _Places = defaultdict(set)
    before, after = graph_pairs(calibration.source, calibration.program)[-1]
    copied = copies(before, after)
    outermost = set(before.graph.nodes)
    for node, static in calls(before):
        for source, axis, ending in ends(dimensions, node, static):
            if source in outermost:
                labels = dimensions.analysis.values[source].axes[axis]
                found[copied[source].name, axis] |= _pairs(dimensions, labels, ending)
    return found


def _pairs(dimensions: Dimensions, labels: Any, ending: set[int]) -> set[tuple[int, int]]:
    store = dimensions.units
    canonical = store.canonical(labels).tolist()
    return {(p, u) for p, label in enumerate(canonical) for u in store.members(label) & ending}


def _by_place(value: Tensor, axis: int) -> list[float]:
    """Of each place of an axis: sums over a row's positions, their sizes added up over the rows."""
    last = value.double().movedim(axis, -1)
    rows = last.flatten(1, -2).sum(1) if last.dim() > 2 and axis else last
    return rows.reshape(-1, last.shape[-1]).abs().sum(0).tolist()


def _classes(batch: Batch) -> Tensor | None:
    """The classes that a batch's targets are, ``[rows]``, or None."""
    given = batch.targets
    if not isinstance(given, Tensor) or given.dtype not in (torch.int64, torch.int32):
        return None
    return given.long() if given.shape == (batch.rows,) and int(given.min()) >= 0 else None


def _check(dimensions: Dimensions, seen: set[int]) -> None:
    for dim in dimensions.all:
        if not seen.intersection(dim.units):
            raise UnsupportedError(
                f"criterion=relevance: no relevance passes through the units of {dim.name}",
                hint="freeze it, or choose a criterion that looks at weights or gradients",
            )
