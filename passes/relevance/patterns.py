"""Patterns from data, for PatternNet and PatternAttribution (Kindermans et al. 2018).

The input of a neuron ``y = w^T x`` is signal and distractor.  The pattern ``a`` is the direction of
the signal: the regression of ``x`` on ``y``, over all data (``linear``) or over the data for which
the neuron answers (``positive``, for layers in front of a ReLU)::

    a  = (E[x y] - E[x] E[y]) / (E[y^2] - E[y]^2)
    a+ = (E+[x y] - E+[x] E[y]) / (w^T E+[x y] - w^T E+[x] E[y])

Both have ``w^T a = 1``.  Sums over places of a convolution are gradients with respect to its
weights, whatever its stride, groups or dilation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from graphopt.batches import read_batch
from graphopt.errors import UsageError
from graphopt.ir.capture import capture
from graphopt.ir.graphs import lookup
from graphopt.ir.program import Program
from graphopt.passes.relevance.composite import Composite
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op, is_getitem, weight_name
from graphopt.passes.relevance.planning import Plan, make_plan, values_of
from graphopt.passes.relevance.prepare import prepared
from graphopt.passes.relevance.rules.affine import Affine, channel, scaled
from graphopt.passes.relevance.site import Site
from graphopt.passes.relevance.target import explained_outputs

Kind = Literal["positive", "linear"]


def fit(model: nn.Module, data: Iterable[Any], kind: Kind = "positive") -> dict[str, Tensor]:
    """Patterns of a model's linear layers and convolutions.

    Args:
        model: The model; it is left as it is, and runs in eval mode.
        data: Batches, as for `graphopt.optimize`; targets are not used.
        kind: Over all data (``linear``), or where a neuron answers (``positive``).

    Returns:
        Weight -> pattern of its shape, for `Composite.with_patterns`.  Where a neuron never answers
        its pattern is ``w / |w|^2``.

    Raises:
        UsageError: The data holds no batch.
    """
    batches = [*data]
    if not batches:
        raise _no_batches()
    arguments = 1 if isinstance(batches[0], Tensor) else len(batches[0])
    first = read_batch(batches[0], None, arguments)
    return of_program(capture(model, first.args, first.kwargs), batches, len(first.args), kind)


def of_program(
    program: Program, data: Iterable[Any], arguments: int, kind: Kind = "positive"
) -> dict[str, Tensor]:
    """Patterns of a captured program (see `fit`); `arguments` is how many inputs it takes."""
    if kind not in ("positive", "linear"):
        raise UsageError(f"kind={kind!r}", hint="'positive' or 'linear'")
    plan: Plan | None = None
    sums: dict[str, Sums] = {}
    tensors: dict[str, Any] = {}
    for given in data:
        batch = read_batch(given, None, arguments)
        flat = program.signature.flatten_inputs(batch.args, batch.kwargs)
        program.signature.check(flat)
        if plan is None:
            plan, tensors = _plan(program, flat)
        _Forward(plan, sums, kind).run(tensors, flat)
    if plan is None:
        raise _no_batches()
    return {name: found.pattern() for name, found in sums.items()}


def _no_batches() -> UsageError:
    return UsageError(
        "data yields no batches", hint="an iterator that was read before is empty: give a list"
    )


def _plan(program: Program, flat: Sequence[Tensor]) -> tuple[Plan, dict[str, Any]]:
    from graphopt.passes.relevance.presets import PRESETS

    graph = prepared(program.specialize(training=False))
    names = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    model = program.emit()
    tensors = {name: lookup(model, name) for name in names}
    composite: Composite = PRESETS["pattern-attribution"]()

    def choose(results: Sequence[Any]) -> list[int]:
        return explained_outputs("argmax", results, program.signature)

    return make_plan(graph, tensors, flat, composite, ("inputs",), choose), tensors


@dataclass
class Sums:
    """What is added up for one weight, in double precision.

    Attributes:
        kind: See `fit`.
        weight: The weight.
        scaled: Multiplies something of the weight's shape with a vector, channel by channel.
        terms: Sums so far: over all places (``n``, ``y``, ``yy``), over those that count (``m``),
            and with the weight's shape ``x`` and ``xy`` over those.
    """

    kind: Kind
    weight: Tensor
    scaled: Callable[[Tensor, Tensor], Tensor]
    terms: dict[str, Tensor]

    def add(self, **terms: Tensor) -> None:
        """Add what one batch gives."""
        for name, value in terms.items():
            value = value.double()
            self.terms[name] = self.terms[name] + value if name in self.terms else value

    def pattern(self) -> Tensor:
        """The pattern, of the weight's shape and dtype."""
        t, weight = self.terms, self.weight.double()
        count = t["m"].clamp(min=1)
        mean = t["y"] / t["n"]
        covariance = self.scaled(t["xy"], 1 / count) - self.scaled(t["x"], mean / count)
        if self.kind == "linear":
            size = t["yy"] / t["n"] - mean.square()
        else:
            size = self._contracted(weight * covariance)
        dead = size.abs() <= 1e-12 * t["yy"] / t["n"]
        found = self.scaled(covariance, torch.where(dead, 0, 1 / torch.where(dead, 1, size)))
        norm = self._contracted(weight.square())
        plain = torch.where(dead & (norm > 0), 1 / torch.where(norm > 0, norm, 1), 0)
        return (found + self.scaled(weight, plain)).to(self.weight)

    def _contracted(self, product: Tensor) -> Tensor:
        """The sum for each channel of the result."""
        ones = torch.ones_like(self.terms["m"]).requires_grad_()
        with torch.enable_grad():
            total = self.scaled(product, ones).sum()
        return torch.autograd.grad(total, ones)[0]


class _Forward:
    """One run of the forward graph in which layers are looked at; what a `Site` asks of a run."""

    def __init__(self, plan: Plan, sums: dict[str, Sums], kind: Kind) -> None:
        self.plan = plan
        self.values: Mapping[fx.Node, Any] = {}
        self.roles = plan.roles
        self._sums = sums
        self._kind: Kind = kind

    @torch.no_grad()
    def run(self, tensors: Mapping[str, Any], inputs: Sequence[Tensor]) -> None:
        """Values of all nodes, then the sums of all layers."""
        self.values = values_of(self.plan.graph, tensors, inputs)
        for op in self.plan.ops.values():
            if op.family in (Family.LINEAR, Family.CONV) and not is_getitem(op.node):
                self._look_at(op)

    def _look_at(self, op: Op) -> None:
        site = Site(self, op)
        affine = Affine(site)
        name = weight_name(op)
        if name not in self._sums:
            weight = affine.weight.detach()
            self._sums[name] = Sums(self._kind, weight, lambda t, v: scaled(site, t, v), {})
        leaf = affine.weight.detach().requires_grad_()
        with torch.enable_grad():
            y = affine.run(affine.x, lambda _: leaf)
        counts = (
            (affine.z > 0) if self._kind == "positive" else torch.ones_like(y, dtype=torch.bool)
        )
        mask = counts.to(y.dtype)
        (of_x,) = torch.autograd.grad(y, leaf, mask, retain_graph=True)
        (of_xy,) = torch.autograd.grad(y, leaf, mask * y.detach())
        y = y.detach()
        dims = [d for d in range(y.ndim) if d != y.ndim + channel(site)]

        def summed(values: Tensor) -> Tensor:
            return values.sum(dims) if dims else values

        self._sums[name].add(
            n=summed(torch.ones_like(y)),
            y=summed(y),
            yy=summed(y.square()),
            m=summed(mask),
            x=of_x,
            xy=of_xy,
        )
