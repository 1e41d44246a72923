"""Where the samples of a batch lie in each value of a graph.

The ledger has one entry a sample, so what is booked at a value has to be summed for each of them.
In most values dimension 0 is the batch, but windows of an image are folded into it, recurrent
layers put time first, and some models flatten batch and sequence.  It is found by trying: NaN in
one sample spreads to exactly the places that depend on it.  Where rows are sorted (tokens by the
expert that they go to), the index by which they were taken tells whose they are.

Places that hold a constant (a class token) depend on no sample.  They count as the sample's among
whose they lie, and what relevance they get is booked for it: which is right if no other sample
reads them (`mixed`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import RunError
from graphopt.ir.interpret import Value, call, fill
from graphopt.passes.relevance.families import op_name
from graphopt.passes.relevance.frequencies import is_complex
from graphopt.passes.relevance.ops import is_floating, is_getitem, is_mask


@dataclass(frozen=True)
class Layout:
    """The dimension of a value that holds the samples.

    Attributes:
        dim: The dimension.
            None: the whole value is one sample.
        major: Whether a dimension that holds more than the samples (windows, heads) is ordered by
            sample first.
        taken: The value with this layout that the rows were taken from, and the index of them;
            None: they lie as they are.
    """

    dim: int | None
    major: bool = True
    taken: tuple[fx.Node, fx.Node] | None = None

    def per_sample(self, value: Tensor, samples: Any, values: Mapping[fx.Node, Any]) -> Tensor:
        """Sums of a value for each sample, of shape ``[samples]``.

        Args:
            value: What is summed.
            samples: Size of the batch.
            values: Values of the run.
        """
        value = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.dim is None:
            return value.sum().reshape(1)
        if self.taken is not None:
            rows = value.movedim(self.dim, 0).flatten(1).sum(1) if value.ndim > 1 else value
            owners = _owners(self, samples, values)
            return value.new_zeros((samples,)).index_add(0, owners, rows)
        inner = value.shape[self.dim] // samples
        split = (samples, inner) if self.major else (inner, samples)
        value = value.unflatten(self.dim, split)
        keep = self.dim if self.major else self.dim + 1
        return value.sum([d for d in range(value.ndim) if d != keep])

    def places(
        self, value: Tensor, sample: int, samples: int, values: Mapping[fx.Node, Any]
    ) -> Tensor:
        """Where a sample lies, as truth values that broadcast to a value; not for `WHOLE`."""
        assert self.dim is not None
        if self.taken is not None:
            found = _owners(self, samples, values) == sample
        else:
            found = _places(value.shape[self.dim], samples, sample, self.major)
        return found.to(value.device).reshape(-1, *[1] * (value.ndim - self.dim - 1))


WHOLE = Layout(None)


def _owners(layout: Layout, samples: Any, values: Mapping[fx.Node, Any]) -> Tensor:
    """The sample of each row that was taken."""
    assert layout.taken is not None
    source, index = (values[node] for node in layout.taken)
    size = source.shape[0]
    place = index % size  # may be counted from the end
    return place // (size // samples) if layout.major else place % samples


def layouts(
    values: Sequence[Mapping[fx.Node, Any]], samples: int, given: Mapping[fx.Node, Any]
) -> dict[fx.Node, Layout]:
    """The layouts of values that NaN was spread in.

    Args:
        values: For each sample what a run gave in which this sample was NaN.
        samples: Size of the batch.
        given: What it gave without.

    Returns:
        A layout for each value that has one.
    """
    found: dict[fx.Node, Layout] = {}
    taken: dict[Layout, Tensor] = {}
    for node in values[0]:
        hits = [h for h in (_hits(run[node]) for run in values) if h is not None]
        if len(hits) < len(values):
            continue
        layout = _layout(hits, samples) or _rows_taken(node, hits, taken, found, samples, given)
        if layout is not None:
            found[node] = layout
    return found


def _rows_taken(
    node: fx.Node,
    hits: list[Tensor],
    taken: dict[Layout, Tensor],
    found: Mapping[fx.Node, Layout],
    samples: int,
    given: Mapping[fx.Node, Any],
) -> Layout | None:
    """The layout of rows taken by an index, or of what is computed from them row by row.

    Args:
        node: The value.
        hits: Places of it that depend on each sample.
        taken: The samples of the rows for each layout of this kind so far; a new one is added.
        found: Layouts so far.
        samples: Size of the batch.
        given: The run's values.
    """
    if not hits[0].ndim:
        return None
    rows = [h.flatten(1).any(1) if h.ndim > 1 else h for h in hits]
    call = _taken_by(node)
    layout = found.get(call[0]) if call is not None else None
    if layout is not None and layout.dim == 0 and layout.taken is None:
        new = Layout(0, layout.major, call)
        taken[new] = _owners(new, samples, given).cpu()
    for known, owners in reversed(taken.items()):
        same = owners.shape == rows[0].shape
        if same and all(torch.equal(r, owners == i) for i, r in enumerate(rows)):
            return known
    return None


def _is_places(index: Tensor) -> bool:
    return index.ndim == 1 and not is_mask(index)


def _taken_by(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """What rows were taken from and their index, or None if a call takes no rows."""
    name = op_name(node)
    args: Any = node.args
    if name == "index_select" and args[1] == 0:
        return args[0], args[2]
    indices = args[1] if name == "index" else ()
    if len(indices) == 1 and _is_places(indices[0].meta["val"]):
        return args[0], indices[0]
    return None


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


def mixed(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    sources: Mapping[fx.Node, Tensor],
    found: Mapping[fx.Node, Layout],
    sample: int,
    samples: int,
) -> fx.Node | None:
    """A value in which other samples read places that count as one sample's, or None.

    NaN is spread again, and fills all places of the sample in each value on the way, also those
    that hold constants: then it may not turn up elsewhere.

    Args:
        graph: The forward graph.
        values: Its values.
        sources: Values where relevance ends, NaN in the sample.
        found: Layouts of the values between there and the output.
        sample: The sample.
        samples: Size of the batch.
    """
    leaks: list[fx.Node] = []

    def filled(node: fx.Node, value: Any) -> Any:
        if node not in found or not isinstance(value, Tensor):
            return value
        own = found[node].places(value, sample, samples, values)
        if bool((value.isnan() & ~own).any()):
            leaks.append(node)
        return torch.where(own, float("nan"), value)

    spread(graph, values, sources, filled)
    return leaks[0] if leaks else None


def spread(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    sources: Mapping[fx.Node, Tensor],
    change: Callable[[fx.Node, Any], Any] | None = None,
) -> dict[fx.Node, Any]:
    """What depends on one sample: a run of the carrying calls with that sample NaN.

    Values of calls that can't run on NaN are left out, and so is what depends on them.

    Args:
        graph: The forward graph.
        values: Its values.
        sources: Values where relevance ends, NaN in that sample.
        change: Changes each value that depends on it; None: they stay as they are.
    """

    def called(node: fx.Node, value: Value) -> Any:
        result = _if_it_runs(values, node, value)
        if change is None or result is _LOST or result is values[node]:
            return result
        return change(node, result)

    reached = _dependents(graph, sources)
    changed = {n: v for n, v in values.items() if n not in reached} | dict(sources)
    fill(changed, reached, changed.__getitem__, called)
    run = {n: changed[n] for n in (*sources, *reached)}
    found = {n: v for n, v in run.items() if v is not _LOST and v is not values[n]}
    return {n: v for n, v in found.items() if not is_getitem(n) or isinstance(v, Tensor)}


_LOST = object()
"""Stands for the value of a call that can't run on NaN."""


def _if_it_runs(values: Mapping[fx.Node, Any], node: fx.Node, value: Value) -> Any:
    """A call's value where some of what it reads was changed; which places are read stays."""
    read = {each: value(each) for each in node.all_input_nodes}
    if any(v is _LOST for v in read.values()):
        return _LOST
    if all(v is values[n] for n, v in read.items()):
        return values[node]
    try:
        result = call(node, value)
    except RunError:
        return _LOST
    kept = not isinstance(result, Tensor) or is_floating(result) or is_complex(result)
    return result if kept else values[node]


def _dependents(graph: fx.Graph, sources: Collection[fx.Node]) -> dict[fx.Node, None]:
    """Calls that read sources or what depends on them, in order."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        reads = any(each in found or each in sources for each in node.all_input_nodes)
        if reads and node not in sources and node.op == "call_function":
            found[node] = None
    return found
