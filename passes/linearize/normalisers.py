"""What stands in for a softmax, how it is fitted, and how it is written into a graph.

    quad:  p = (x + c)^2 w / (sum (x + c)^2 w + eps)        2Quad (Li et al. 2023, MPCFormer, 3.2)
    relu:  p = relu(x) / (sum relu(x) + eps)                (Mohassel and Zhang 2017, SecureML, 5.2)

Neither is a function of differences of scores alone, as a softmax is: scores are taken less their
row's mean, a linear map, unless the published form is asked for.  Both stay the same when scores
and offset are multiplied by one number; it brings the largest value at calibration to one, so that
neither half precision nor fixed point overflows.  A square doesn't fall to zero at minus infinity:
masks are factors ``w`` of it, one or zero where they are conditions, ``exp(mask)`` where they are
added, as they are of the exponential.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphopt.ir.ops import is_effectful, is_random
from graphopt.ir.skeleton import Container
from graphopt.passes.linearize.lockstep import Known, Values, of_batch
from graphopt.passes.linearize.masks import MASKED
from graphopt.passes.linearize.softmax import Normal, SoftmaxCall, softmax_of
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
        centered: Whether scores are taken less their row's mean over the places that count.
        factor: By which scores are multiplied.
        offset: Added to the multiplied scores, for ``quad``.
        shift: Taken from the sum of the masks that are added, before its exponential.
        error: ``||p - p_source|| / ||p_source||`` over the probabilities at calibration.
    """

    call: SoftmaxCall
    kind: Normal
    centered: bool = True
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
        scaled = scores * self.factor
        found: Tensor = probabilities(_run, self, self.offset, scaled, terms, factors, dim)
        return found


def _run(target: Any, *args: Any) -> Any:
    return target(*args)


def probabilities(
    call: Callable[..., Any],
    found: Normaliser,
    offset: Any,
    scores: Any,
    terms: Sequence[Any],
    factors: Sequence[Any],
    dim: int,
) -> Any:
    """A softmax's replacement, on tensors or as nodes of a graph.

    Args:
        call: Runs an op, or adds a call of it.
        found: The replacement.
        offset: Its offset.
        scores: Multiplied by its factor already.
        terms: Masks that are added.
        factors: Masks that are one or zero.
        dim: Over which probabilities sum to one.
    """
    weights = None
    if found.kind == "quad" or found.centered:
        weights = _weights(call, terms, factors, found.shift)
    if found.centered:
        scores = _centered(call, scores, weights, dim)
    if found.kind == "quad":
        positive = call(aten.square.default, call(aten.add.Tensor, scores, offset))
        factors = () if weights is None else (weights,)
    else:
        for term in terms:
            scaled = call(aten.mul.Tensor, term, found.factor)
            scores = call(aten.add.Tensor, scores, scaled)
        positive = call(aten.relu.default, scores)
    for each in factors:
        positive = call(aten.mul.Tensor, positive, each)
    total = call(aten.sum.dim_IntList, positive, [dim], True)
    return call(aten.div.Tensor, positive, call(aten.add.Tensor, total, EPS))


def _weights(
    call: Callable[..., Any], terms: Sequence[Any], factors: Sequence[Any], shift: float
) -> Any:
    """What masks multiply an exponential by; None where there is none."""
    weights = None
    if terms:
        weights, *rest = terms
        for each in rest:
            weights = call(aten.add.Tensor, weights, each)
        weights = call(aten.sub.Tensor, weights, shift) if shift else weights
        weights = call(aten.exp.default, weights)
    for each in factors:
        weights = each if weights is None else call(aten.mul.Tensor, weights, each)
    return weights


def _centered(call: Callable[..., Any], scores: Any, weights: Any, dim: int) -> Any:
    """Scores less their weighted mean."""
    if weights is None:
        mean = call(aten.mean.dim, scores, [dim], True)
    else:
        weights = call(aten.expand_as.default, weights, scores)
        total = call(aten.sum.dim_IntList, weights, [dim], True)
        shares = call(aten.div.Tensor, weights, call(aten.add.Tensor, total, EPS))
        mean = call(aten.sum.dim_IntList, call(aten.mul.Tensor, scores, shares), [dim], True)
    return call(aten.sub.Tensor, scores, mean)


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
        centered: Whether scores are taken less their row's mean.
        calls: The softmaxes.
    """

    kind: Normal
    centered: bool
    calls: Sequence[SoftmaxCall]

    def unfitted(self) -> list[Normaliser]:
        """Replacements that cost what the fitted ones do."""
        return [Normaliser(each, self.kind, self.centered, 0.5, 1.0) for each in self.calls]

    def normalise(
        self, node: fx.Node, teacher: Known, student: Known
    ) -> tuple[Normaliser | Left, Values]:
        """Fit one softmax's replacement to the source's probabilities.

        Args:
            node: The call of `softmax_of`.
            teacher: Gives the source's values of a node for each batch.
            student: The values of the same with everything in front replaced.

        Returns:
            The replacement, and its values for each batch.
        """
        (call,) = (each for each in self.calls if each.name == node.name)
        known = {n: student(n) for n in node.all_input_nodes}
        count = max(len(values) for values in known.values())
        given: list[Any] = [
            fx.map_arg(node.args, lambda n, i=i: of_batch(known[n], i)) for i in range(count)
        ]
        read = [Read(*each) for each in given]
        target = teacher(node)
        found: Normaliser | Left = Left(call, _unread(self, read) or "")
        if found.reason:
            return found, [softmax_of(*each) for each in read]
        found = _fitted(Normaliser(call, self.kind, self.centered), read, target)
        values = [found(*each) for each in read]
        pairs = [(v.double(), t.double()) for v, t in zip(values, target, strict=True)]
        off = sum(float((v - t).square().sum()) for v, t in pairs)
        size = sum(float(t.square().sum()) for _, t in pairs)
        return replace(found, error=math.sqrt(off / size) if size else 0.0), values


class Read(NamedTuple):
    """What `softmax_of` reads."""

    x: Tensor | None
    scores: Tensor
    terms: Sequence[Tensor]
    factors: Sequence[Tensor]
    dim: int


def _unread(softmaxes: Softmaxes, read: Sequence[Read]) -> str | None:
    """Why the scores can't be used."""
    if read[0].x is None or (softmaxes.kind == "relu" and not softmaxes.centered):
        return None
    least = min((float(each.scores.amin()) for each in read if each.scores.numel()), default=0.0)
    if not least > MASKED:
        return f"its scores go down to {least:.3g}: a mask in front of it isn't understood"
    return None


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


def _fitted(start: Normaliser, read: Sequence[Read], target: Values) -> Normaliser:
    shift = max((_largest_finite(each.terms) for each in read if each.terms), default=0.0)
    start = replace(start, shift=shift)
    if start.kind == "relu":
        return replace(start, factor=_inverse(_largest_positive(start, read)))
    rows = _rows(start, read, target)
    seen = rows.scores[rows.weights > 0]
    spread = float(seen.abs().max()) if seen.numel() else 0.0
    if not spread:
        return replace(start, offset=1.0)
    offset = _least(rows, spread)
    factor = _inverse(float((seen + offset).abs().max()))
    return replace(start, factor=factor, offset=offset * factor)


def _inverse(largest: float) -> float:
    return 1.0 / largest if 0 < largest < math.inf else 1.0


def _largest_finite(terms: Sequence[Tensor]) -> float:
    """The largest of the sums of what is added, for places that count."""
    term = sum(terms[1:], terms[0])
    finite = term[term.isfinite()]
    largest = float(finite.max()) if finite.numel() else 0.0
    return largest if largest > MASKED else 0.0


def _largest_positive(start: Normaliser, read: Sequence[Read]) -> float:
    largest = 0.0
    for each in read:
        scores, weights = _scores_of(start, each)
        whole = sum(each.terms, scores)
        counts = whole if weights is None else whole[(weights > 0).expand_as(whole)]
        largest = max(largest, float(counts.max()) if counts.numel() else 0.0)
    return largest


def _scores_of(start: Normaliser, read: Read) -> tuple[Tensor, Tensor | None]:
    """Scores as the replacement takes them, unscaled, float64, and weights of masks."""
    double = [t.double() for t in read.terms], [t.double() for t in read.factors]
    scores, weights = read.scores.double(), _weights(_run, *double, start.shift)
    if start.centered:
        scores = _centered(_run, scores, weights, read.dim)
    return scores, weights


def _rows(start: Normaliser, read: Sequence[Read], target: Values) -> _Rows:
    """Rows of all batches, not more than a fit needs, evenly from each."""
    step = max(1, math.ceil(sum(t.numel() for t in target) / _MOST_ELEMENTS))
    parts = []
    for each, wanted in zip(read, target, strict=True):
        scores, weights = _scores_of(start, each)
        weights = torch.ones_like(scores) if weights is None else weights
        found = [
            v.expand_as(wanted).movedim(each.dim, -1).reshape(-1, wanted.shape[each.dim])
            for v in (scores, weights, wanted.double())
        ]
        parts.append([v[::step] for v in found])
    width = max(part[0].shape[1] for part in parts)
    padded = [[F.pad(v, (0, width - v.shape[1])) for v in part] for part in parts]
    return _Rows(*[torch.cat(column) for column in zip(*padded, strict=True)])


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
        args: Any = self.node.args
        _, scores, terms, factors, dim = args
        found, offset = self.found, None
        if found.kind == "quad":
            dtype = self.node.meta["val"].dtype
            offset = self.parameter("offset", torch.tensor(found.offset, dtype=dtype))
        scaled = self._scaled(scores)
        made: fx.Node = probabilities(self.call, found, offset, scaled, terms, factors, dim)
        return made

    def _scaled(self, scores: fx.Node) -> fx.Node:
        """Scores times the factor; in an attention the query's scale takes it."""
        factor, name = self.found.factor, self.found.call.scaled
        if factor == 1.0:
            return scores
        if name is None:
            return self.call(aten.mul.Tensor, scores, factor)
        (scaled,) = (n for n in self.graph.nodes if n.name == name)
        scaled.update_arg(1, scaled.args[1] * factor)
        return scores


def _drop(graph: fx.Graph, nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nobody reads, and then what they read."""
    waiting = dict.fromkeys(nodes)
    while waiting:
        node, _ = waiting.popitem()
        kept = node.op not in ("call_function", "get_attr") or is_effectful(node) or is_random(node)
        if not node.users and not kept:
            waiting.update(dict.fromkeys(node.all_input_nodes))
            graph.erase_node(node)
