"""Criteria that look at what units add to the outputs of what reads them.

A unit ends where its places are summed over: in the columns of the layer that reads it. What it
adds to that layer's output y, there, is ``e = w x``, and to first order the loss changes by
``dL/dy . e`` without it, which is ``x . dL/dx``, taken along this reader alone. So all that is
needed are the values that are read and their gradients, whatever the reader is: a linear layer, a
convolution, an expert, the product of two activations.

With the covariance of these gradients for the Hessian (the empirical Fisher information) half of
the mean of the square estimates what the loss goes up by. The two criteria differ in what is one
observation: all positions of one row of the batch together (`fisher`), or each alone (`heapr`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graphopt.batches import Batch
from graphopt.passes.prune.criteria.base import Calibration, Scores
from graphopt.passes.prune.criteria.ends import calls, copies, ends
from graphopt.passes.prune.criteria.gradients import taylor2
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.outputs import gradients_of, loss_of
from graphopt.passes.prune.rewrite import graph_pairs, with_tensors
from graphopt.passes.prune.units import Labels


def fisher(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """``E (sum x dL/dx)^2 / 2``, E over the rows of the batches, the sum over a row's positions.

    Fisher pruning (Theis et al. 2018; Liu et al. 2021 for units that several layers read, whose
    contributions add up before they are squared). It is `taylor2` with every row a batch of its
    own, in one backward. Where the first axis of what is read isn't the batch, all rows share.
    """
    return _measured(dimensions, calibration, _by_row)


def heapr(dimensions: Dimensions, calibration: Calibration) -> Scores:
    """``E (dL/dy . e)^2 / 2``, e what the unit adds to the output y of its reader at one position.

    The second-order score in output space of HEAPr (Li et al. 2025), for any unit, not those of
    experts alone; the mean is over rows, the sum over their positions: experts that see fewer
    tokens lose less. Gradient and contribution are those of the same position; no matrix of
    second moments is held. Of several readers each counts by itself.
    """
    return _measured(dimensions, calibration, _by_position)


# From x dL/dx, its axis of units last, and the number of rows: (observations, places).
_Observe = Callable[[Tensor, int], Tensor]


def _by_row(product: Tensor, rows: int) -> Tensor:
    width = product.shape[-1]
    if product.dim() > 1 and product.shape[0] % rows == 0:
        return product.reshape(rows, -1, width).sum(1)
    return product.reshape(-1, width).sum(0).expand(rows, width) / rows


def _by_position(product: Tensor, _: int) -> Tensor:
    return product.reshape(-1, product.shape[-1])


def _measured(dimensions: Dimensions, calibration: Calibration, observe: _Observe) -> Scores:
    """Half of the mean square of contributions; `taylor2` for units whose end was not seen."""
    tapped = _Tapped(dimensions, calibration)
    together = observe is _by_row  # contributions to several readers
    scores: dict[int, float] = {}
    rows_seen = 0
    for batch in calibration.batches:
        rows = batch.rows or 1
        rows_seen += rows
        total = torch.zeros(rows, len(tapped.units), dtype=torch.float64)
        squares = torch.zeros(len(tapped.units), dtype=torch.float64)
        for end, product in tapped.products(batch, calibration.seed):
            found = observe(product, rows).cpu()[:, end.places]
            if together:
                total.index_add_(1, end.units, found)
            else:
                squares.index_add_(0, end.units, found.square().sum(0))
        # Of a mean over rows each row has its share of the gradient only.
        for unit, value in zip(
            tapped.units, (squares + total.square().sum(0)).tolist(), strict=True
        ):
            scores[unit] = scores.get(unit, 0.0) + 0.5 * rows * rows * value
    return _with_the_rest(dimensions, calibration, {u: s / rows_seen for u, s in scores.items()})


def _with_the_rest(dimensions: Dimensions, calibration: Calibration, scores: Scores) -> Scores:
    """Units that end nowhere (in a gather, in a recurrence) are ranked by their weights."""
    missing = {u for dim in dimensions.all for u in dim.units} - set(scores)
    if not missing:
        return scores
    rest = taylor2(dimensions, calibration)
    return {**scores, **{unit: 0.5 * rest.get(unit, 0.0) for unit in missing}}


@dataclass(frozen=True)
class _Ends:
    """Units that end in one axis of a value.

    Attributes:
        axis: The axis of the value, from the end.
        places: Places of it, one for each unit that ends there, (n,).
        units: Where in a list of all units these are, (n,).
    """

    axis: int
    places: Tensor
    units: Tensor


class _Tapped:
    """A program that remembers what its readers read.

    Attributes:
        units: The units whose ends are seen.
    """

    def __init__(self, dimensions: Dimensions, calibration: Calibration) -> None:
        self.dimensions = dimensions
        self.units: list[int] = []
        self._numbers: dict[int, int] = {}
        self._read: list[tuple[Sequence[_Ends], Tensor]] = []
        analysis = dimensions.analysis
        program = with_tensors(calibration.program, analysis, lambda slot: slot.tensor)
        for before, after in graph_pairs(calibration.source, program):
            self._tap(before, after)
        self._module = program.emit().eval()

    def products(self, batch: Batch, seed: int) -> Iterator[tuple[_Ends, Tensor]]:
        """``x dL/dx`` of everything that is read, the axis of the units that end there last."""
        self._read.clear()
        with torch.enable_grad():
            loss = loss_of(self._module, batch, seed)
            values = [value for _, value in self._read]
            found = gradients_of(loss, values) if values else ()
        for (here, value), gradient in zip(self._read, found, strict=True):
            if gradient is not None:
                product = value.detach().double() * gradient.double()
                yield from ((end, product.movedim(end.axis, -1)) for end in here)
        self._read.clear()

    def _tap(self, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Put identities into a copy of a graph, before its readers."""
        copied = copies(before, after)
        values = self.dimensions.analysis.values
        for node, static in calls(before):
            by_source: dict[fx.Node, list[_Ends]] = {}
            for source, axis, ending in ends(self.dimensions, node, static):
                axes = values[source].axes
                found = self._numbered(axis - len(axes), axes[axis], ending)
                by_source.setdefault(source, []).append(found)
            reader = copied[node]
            for source, found in by_source.items():
                with reader.graph.inserting_before(reader):
                    tap = reader.graph.call_function(self._remember(found), (copied[source],))
                tap.meta = dict(copied[source].meta)
                reader.replace_input_with(copied[source], tap)

    def _remember(self, found: Sequence[_Ends]) -> Callable[[Tensor], Tensor]:
        def tap(value: Tensor) -> Tensor:
            own = value.view_as(value)  # a place of its own in autograd's graph
            if not own.requires_grad:
                own = own.detach().requires_grad_()
            self._read.append((found, own))
            return own

        return tap

    def _numbered(self, axis: int, labels: Labels, ending: Collection[int]) -> _Ends:
        places, numbers = [], []
        store = self.dimensions.units
        for place, label in enumerate(store.canonical(labels).tolist()):
            for unit in store.members(label) & set(ending):
                if unit not in self._numbers:
                    self._numbers[unit] = len(self.units)
                    self.units.append(unit)
                places.append(place)
                numbers.append(self._numbers[unit])
        return _Ends(axis, torch.tensor(places), torch.tensor(numbers))
