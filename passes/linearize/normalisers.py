"""What stands in for a softmax, how it is fitted, and how it is written into a graph.

    quad:  p = (x + c)^2 w / (sum (x + c)^2 w + eps)        2Quad (Li et al. 2023, MPCFormer, 3.2)
    relu:  p = relu(x) / (sum relu(x) + eps)                (Mohassel and Zhang 2017, SecureML, 5.2)

Both forms stay the same when scores and offset are multiplied by one number; that number brings the
largest value at calibration to one, so that neither half precision nor fixed point overflows. A
quadratic doesn't fall to zero at minus infinity: masks are factors ``w`` of it, one or zero where
they are conditions, ``exp(mask)`` where they are added, as they are of the exponential.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.ir.ops import is_effectful, is_random
from graphopt.ir.skeleton import Container
from graphopt.passes.linearize.lockstep import Known, Values, at
from graphopt.passes.linearize.masks import MASKED
from graphopt.passes.linearize.softmax import Normal, SoftmaxCall, masked, softmax_of
from graphopt.passes.linearize.writing import Writing

aten = torch.ops.aten

EPS = 1e-6
"""Added to sums. Rows whose sum is zero, such as those that are masked wholly, give zeros."""

# Probabilities that an offset is fitted to.
_MOST_ELEMENTS = 1 << 18
# Offsets that are tried, relative to the largest score, and steps of the search between them.
_OFFSETS = torch.logspace(-2, 2, 41, dtype=torch.float64).tolist()
_STEPS = 24


@dataclass(frozen=True, eq=False)
class Normaliser:
    """What becomes of one softmax. It can be called as `softmax_of` is.

    Attributes:
        call: The softmax.
        kind: ``relu`` or ``quad``.
        factor: By which scores are multiplied.
        offset: Added to the multiplied scores, for ``quad``.
        shift: Taken from the sum of the masks that are added, for ``quad``.
        error: ``||p - p_source|| / ||p_source||`` over the probabilities at calibration.
    """

    call: SoftmaxCall
    kind: Normal
    factor: float = 1.0
    offset: float = 0.0
    shift: float = 0.0
    error: float = 0.0

    def __call__(
        self,
        x: Tensor | None,
        scores: Tensor,
        terms: Sequence[Tensor],
        factors: Sequence[Tensor],
        dim: int,
    ) -> Tensor:
        """The probabilities."""
        if self.kind == "relu":
            read = x if x is not None else sum(terms, scores)
            positive = torch.relu(read * self.factor)
        else:
            positive = (scores * self.factor + self.offset).square()
            if terms:
                positive = positive * torch.exp(sum(terms[1:], terms[0]) - self.shift)
        for each in factors if self.kind == "quad" or x is None else ():
            positive = positive * each
        return positive / (positive.sum(dim, keepdim=True) + EPS)


@dataclass(frozen=True)
class Left:
    """A softmax that was set apart and has to stay.

    Attributes:
        call: The softmax.
        reason: Why.
    """

    call: SoftmaxCall
    reason: str


@dataclass(frozen=True)
class Softmaxes:
    """Softmaxes that are replaced.

    Attributes:
        kind: What they become.
        calls: The softmaxes.
    """

    kind: Normal
    calls: Sequence[SoftmaxCall]

    def unfitted(self) -> list[Normaliser]:
        """Replacements that cost what the fitted ones do."""
        return [Normaliser(each, self.kind, 0.5, 1.0) for each in self.calls]


def normalise(
    call: SoftmaxCall, kind: Normal, node: fx.Node, teacher: Known, student: Known
) -> tuple[Normaliser | Left, Values]:
    """Fit one softmax's replacement to the source's probabilities.

    Args:
        call: The softmax.
        kind: What it becomes.
        node: The call of `softmax_of`.
        teacher: Gives the source's values of a node for each batch.
        student: The values of the same with everything in front replaced.

    Returns:
        The replacement, and its values for each batch.
    """
    known = {n: student(n) for n in node.all_input_nodes}
    count = max(len(values) for values in known.values())
    read = [fx.map_arg(node.args, at(known, i)) for i in range(count)]
    target = teacher(node)
    reason = _unread(kind, read)
    if reason is not None:
        return Left(call, reason), [softmax_of(*args) for args in read]
    found = _relu(call, read) if kind == "relu" else _quad(call, read, target)
    values = [found(*args) for args in read]
    pairs = [(v.double(), t.double()) for v, t in zip(values, target, strict=True)]
    off = sum(float((v - t).square().sum()) for v, t in pairs)
    size = sum(float(t.square().sum()) for _, t in pairs)
    return replace(found, error=math.sqrt(off / size) if size else 0.0), values


def _unread(kind: Normal, read: Sequence[tuple]) -> str | None:
    """Why the scores can't be used."""
    if kind == "relu" or read[0][0] is None:
        return None
    least = min((float(scores.amin()) for _, scores, *_ in read if scores.numel()), default=0.0)
    if not least > MASKED:
        return f"its scores go down to {least:.3g}: a mask in front of it isn't understood"
    return None


def _relu(call: SoftmaxCall, read: Sequence[tuple]) -> Normaliser:
    largest = 0.0
    for x, scores, terms, factors, _ in read:
        whole = x if x is not None else masked(scores, terms, factors)
        largest = max(largest, float(whole.amax()) if whole.numel() else 0.0)
    return Normaliser(call, "relu", 1.0 / largest if largest > 0 else 1.0)


@dataclass(frozen=True)
class _Rows:
    """Rows of scores, weights of masks, and the probabilities that they shall give, float64."""

    scores: Tensor
    weights: Tensor
    target: Tensor

    def loss(self, offset: float) -> float:
        """Squared distance of the probabilities with an offset."""
        positive = (self.scores + offset).square() * self.weights
        found = positive / positive.sum(1, keepdim=True).clamp_min(1e-300)
        return float((found - self.target).square().sum())


def _quad(call: SoftmaxCall, read: Sequence[tuple], target: Values) -> Normaliser:
    shift = max(
        (_largest_finite(sum(terms[1:], terms[0])) for _, _, terms, _, _ in read if terms),
        default=0.0,
    )
    rows = _rows(read, target, shift)
    if not rows.scores.numel():
        return Normaliser(call, "quad", shift=shift)
    seen = rows.scores[rows.weights > 0]
    spread = float(seen.abs().max()) if seen.numel() else 0.0
    if not spread:
        return Normaliser(call, "quad", 1.0, 1.0, shift)
    offset = _least(rows, spread)
    factor = 1.0 / float((seen + offset).abs().max())
    return Normaliser(call, "quad", factor, offset * factor, shift)


def _largest_finite(term: Tensor) -> float:
    finite = term[term.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return largest if largest > MASKED else 0.0


def _rows(read: Sequence[tuple], target: Values, shift: float) -> _Rows:
    """Rows of all batches, not more than a fit needs, evenly from each."""
    total = sum(t.numel() for t in target)
    parts = []
    for (_, scores, terms, factors, dim), wanted in zip(read, target, strict=True):
        weights = torch.ones_like(wanted)
        if terms:
            weights = weights * torch.exp(sum(terms[1:], terms[0]) - shift)
        for each in factors:
            weights = weights * each
        found = [
            v.expand_as(wanted).movedim(dim, -1).reshape(-1, wanted.shape[dim])
            for v in (scores, weights, wanted)
        ]
        step = max(1, math.ceil(total / _MOST_ELEMENTS))
        parts.append([v[::step].double() for v in found])
    width = max(part[0].shape[1] for part in parts)
    padded = [
        torch.cat([torch.nn.functional.pad(part[i], (0, width - part[i].shape[1])) for part in parts])
        for i in range(3)
    ]
    return _Rows(*padded)


def _least(rows: _Rows, spread: float) -> float:
    """The offset of least loss: the best of a grid, then golden sections beside it."""
    grid = [spread * each for each in _OFFSETS]
    losses = [rows.loss(each) for each in grid]
    best = losses.index(min(losses))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    share = (math.sqrt(5) - 1) / 2
    for _ in range(_STEPS):
        inner, outer = high - share * (high - low), low + share * (high - low)
        if rows.loss(inner) < rows.loss(outer):
            high = outer
        else:
            low = inner
    middle = (low + high) / 2
    return min(grid[best], middle, key=rows.loss)


def write_normaliser(
    module: fx.GraphModule, node: fx.Node, found: Normaliser | Left, added: Container
) -> None:
    """Put a replacement, or the softmax itself, in the place of a call of `softmax_of`."""
    read = node.all_input_nodes
    with module.graph.inserting_before(node):
        if isinstance(found, Left):
            x, dim = node.args[0], node.args[4]
            result = module.graph.call_function(aten.softmax.int, (x, dim))
            result.meta.update({k: v for k, v in node.meta.items() if k != "val"})
        else:
            result = _Written(module, node, found, added).run()
    node.replace_all_uses_with(result)
    module.graph.erase_node(node)
    _drop(module.graph, read)


class _Written(Writing):
    """One replacement's nodes."""

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, found: Normaliser, added: Container
    ) -> None:
        super().__init__(module, node, added, found.call.source, f"{found.kind} for softmax")
        self.found = found

    def run(self) -> fx.Node:
        """Add them; returns the probabilities."""
        x, scores, terms, factors, dim = self.node.args
        found = self.found
        if found.kind == "relu" and x is not None:
            positive = self.call(aten.relu.default, self._scaled(x))
            factors = ()
        elif found.kind == "relu":
            read = self._scaled(scores) if not terms else self._scaled(self._sum([scores, *terms]))
            positive = self.call(aten.relu.default, read)
        else:
            positive = self._square(scores, terms)
        for each in factors:
            positive = self.call(aten.mul.Tensor, positive, each)
        total = self.call(aten.sum.dim_IntList, positive, [dim], True)
        total = self.call(aten.add.Tensor, total, EPS)
        return self.call(aten.div.Tensor, positive, total)

    def _square(self, scores: fx.Node, terms: Sequence[fx.Node]) -> fx.Node:
        dtype = self.node.meta["val"].dtype
        offset = self.parameter("offset", torch.tensor(self.found.offset, dtype=dtype))
        moved = self.call(aten.add.Tensor, self._scaled(scores), offset)
        positive = self.call(aten.square.default, moved)
        if not terms:
            return positive
        term = self._sum(terms)
        if self.found.shift:
            term = self.call(aten.sub.Tensor, term, self.found.shift)
        return self.call(aten.mul.Tensor, positive, self.call(aten.exp.default, term))

    def _sum(self, terms: Sequence[fx.Node]) -> fx.Node:
        found, *rest = terms
        for each in rest:
            found = self.call(aten.add.Tensor, found, each)
        return found

    def _scaled(self, x: fx.Node) -> fx.Node:
        """Scores times the factor; by the query's scale where they are its products alone."""
        factor, name = self.found.factor, self.found.call.scaled
        if factor == 1.0:
            return x
        scores = self.node.args[1]
        if name is not None and x is scores:
            (scaled,) = (n for n in self.graph.nodes if n.name == name)
            scaled.update_arg(1, scaled.args[1] * factor)
            return x
        return self.call(aten.mul.Tensor, x, factor)


def _drop(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nobody reads, and then what they read."""
    waiting = dict.fromkeys(nodes)
    while waiting:
        node, _ = waiting.popitem()
        kept = node.op not in ("call_function", "get_attr") or is_effectful(node) or is_random(node)
        if not node.users and not kept:
            waiting.update(dict.fromkeys(node.all_input_nodes))
            graph.erase_node(node)
