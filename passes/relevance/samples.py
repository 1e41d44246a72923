"""Where the samples of a batch lie in each value of a graph.

The ledger has one entry a sample, so what is booked at a value has to be summed for each of them.
In most values dimension 0 is the batch, but windows of an image are folded into it, recurrent
layers put time first, and some models flatten batch and sequence.  It is found by trying: NaN in
one sample spreads to exactly the places that depend on it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import RunError
from graphopt.ir.interpret import Value, call, fill
from graphopt.passes.relevance.ops import is_getitem


@dataclass(frozen=True)
class Layout:
    """The dimension of a value that holds the samples.

    Attributes:
        dim: The dimension.
            None: the whole value is one sample.
        major: Whether a dimension that holds more than the samples (windows, heads) is ordered by
            sample first.
    """

    dim: int | None
    major: bool = True

    def per_sample(self, value: Tensor, samples: Any) -> Tensor:
        """Sums of a value for each sample, of shape ``[samples]``."""
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.dim is None:
            return value.sum().reshape(1)
        inner = value.shape[self.dim] // samples
        split = (samples, inner) if self.major else (inner, samples)
        value = value.unflatten(self.dim, split)
        keep = self.dim if self.major else self.dim + 1
        return value.sum([d for d in range(value.ndim) if d != keep])


WHOLE = Layout(None)


def layouts(values: Sequence[Mapping[fx.Node, Any]], samples: int) -> dict[fx.Node, Layout]:
    """The layouts of values that NaN was spread in.

    Args:
        values: For each sample what a run gave in which this sample was NaN.
        samples: Size of the batch.

    Returns:
        A layout for each value that has one.
    """
    found = {}
    for node in values[0]:
        hits = [_hits(run[node]) for run in values]
        if all(h is not None for h in hits):
            layout = _layout([h for h in hits if h is not None], samples)
            if layout is not None:
                found[node] = layout
    return found


def _hits(value: Any) -> Tensor | None:
    if isinstance(value, tuple | list):
        value = next((v for v in value if isinstance(v, Tensor) and v.is_floating_point()), None)
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.isnan().cpu() if floating else None


def _layout(hits: list[Tensor], samples: int) -> Layout | None:
    """The layout by which the places that are hit are those of each sample."""
    shape = hits[0].shape
    for dim in range(len(shape)):
        if shape[dim] % samples:
            continue
        flat = [h.movedim(dim, 0).flatten(1).any(1) for h in hits] if len(shape) > 1 else hits
        for major in (True, False):
            if all(
                torch.equal(f, _places(shape[dim], samples, i, major)) for i, f in enumerate(flat)
            ):
                return Layout(dim, major)
    return None


def _places(size: int, samples: int, sample: int, major: bool) -> Tensor:
    index = torch.arange(size)
    owner = index // (size // samples) if major else index % samples
    return owner == sample


def poisoned(value: Tensor, sample: int, samples: int) -> Tensor:
    """A copy of a source whose one sample is NaN; dimension 0 holds the samples."""
    result = value.detach().clone()
    if result.ndim and result.shape[0] % samples == 0:
        result.unflatten(0, (samples, -1))[sample] = float("nan")
    return result


def spread(
    graph: fx.Graph, values: Mapping[fx.Node, Any], sources: Mapping[fx.Node, Tensor]
) -> dict[fx.Node, Any]:
    """What depends on one sample: a run of the carrying calls with that sample NaN.

    Values of calls that can't run on NaN are left out, and so is what depends on them.

    Args:
        graph: The forward graph.
        values: Its values.
        sources: Values where relevance ends, NaN in that sample.
    """
    reached = _dependents(graph, sources)
    changed = {n: v for n, v in values.items() if n not in reached} | dict(sources)
    fill(changed, reached, changed.__getitem__, _if_it_runs)
    found = {n: changed[n] for n in (*sources, *reached) if changed[n] is not _LOST}
    return {n: v for n, v in found.items() if not is_getitem(n) or isinstance(v, Tensor)}


_LOST = object()
"""Stands for the value of a call that can't run on NaN."""


def _if_it_runs(node: fx.Node, value: Value) -> Any:
    if any(value(each) is _LOST for each in node.all_input_nodes):
        return _LOST
    try:
        return call(node, value)
    except RunError:
        return _LOST


def _dependents(graph: fx.Graph, sources: Collection[fx.Node]) -> dict[fx.Node, None]:
    """Calls that read sources or what depends on them, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        reads = any(each in found or each in sources for each in node.all_input_nodes)
        if reads and node not in sources and node.op == "call_function":
            found[node] = None
    return found
