"""Rules written out contribution by contribution, and one operation of ours to compare with.

A layer is a matrix of one sample, from its values at unit vectors: ``z_j = sum_i w_ji x_i + b_j``.
Nothing here uses autograd, and everything is in double precision.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.ir.capture import capture
from graphopt.ir.graphs import lookup
from graphopt.ir.program import Program
from graphopt.passes.relevance.composite import Composite, Match
from graphopt.passes.relevance.engine import Run
from graphopt.passes.relevance.planning import make_plan
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import Rule


@dataclass
class Handed:
    """What came of one run.

    Attributes:
        relevance: At each input.
        ledger: Sinks, ``[samples]``.
        residuals: For each operation what is neither handed on nor booked, relative.
        output: The result.
    """

    relevance: list[Tensor]
    ledger: Mapping[str, Tensor]
    residuals: list[float]
    output: Tensor

    def check(self, tolerance: float) -> None:
        """Each operation gives what it gets, and so does the whole."""
        assert max(self.residuals) <= tolerance
        sinks = sum(v for k, v in self.ledger.items() if k != "output")
        found = sum(r.flatten(1).sum(1) for r in self.relevance) + sinks
        size = self.relevance[0].abs().sum() + sum(v.abs().sum() for v in self.ledger.values())
        assert float((found - self.ledger["output"]).abs().max()) <= tolerance * float(size)


def handed_back(
    model: nn.Module,
    inputs: Tensor | Sequence[Tensor],
    rule: Rule | Composite | str,
    quotient: Tensor,
    *,
    explicit: bool = False,
    patterns: Mapping[str, Tensor] | None = None,
) -> Handed:
    """Relevance ``c z`` at a model's result, handed back by us."""
    flat = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    rest = composite_of("cp-lrp")
    composite = composite_of(rule) if not isinstance(rule, Rule) else rest.before(*_where(rule))
    if patterns is not None:
        composite = composite.with_patterns(patterns)
    program = _captured(model, flat)
    graph = program.specialize(training=False).graph
    names = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    emitted = program.emit()
    tensors = {name: lookup(emitted, name) for name in names}
    plan = make_plan(graph, tensors, flat, composite, ("inputs",), lambda _: [0])
    with torch.no_grad():
        run = Run(plan, tensors, flat, explicit=explicit, audit=True)
        run.backward({plan.outputs[0]: quotient})
    assert run.accounts is not None
    residuals = []
    for op, account in run.accounts.items():
        booked = sum(float(v.double().sum()) for v in run.ledger.entries.get(op, {}).values())
        size = account.size or 1.0
        residuals.append(abs(account.arrived - account.left - booked) / size)
    arrived = {n.name: flow.relevance(run.values[n]) for n, flow in run.arrived.items()}
    inputs = graph.find_nodes(op="placeholder")
    relevance = [
        arrived.get(n.name, torch.zeros_like(t)) for n, t in zip(inputs, flat, strict=True)
    ]
    return Handed(relevance, run.ledger.totals, residuals, run.values[plan.outputs[0]].detach())


_PROGRAMS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Program]] = weakref.WeakKeyDictionary()


def _captured(model: nn.Module, flat: Sequence[Tensor]) -> Program:
    """Captured once for each kind of input; weights are shared."""
    programs = _PROGRAMS.setdefault(model, {})
    key = tuple((t.shape, t.dtype) for t in flat)
    if key not in programs:
        programs[key] = capture(model, tuple(flat))
    return programs[key]


def _where(rule: Rule) -> list[tuple[Match, Rule]]:
    return [(Match(family=tuple(f.value for f in rule.families)), rule)] if rule.families else []


# --- the layer --------------------------------------------------------------------------------


def matrix(layer: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as ``[outputs, inputs]`` of one sample, and its bias expanded to the outputs."""
    with torch.no_grad():
        zero = layer(torch.zeros_like(x[:1]))
        units = torch.eye(x[0].numel(), dtype=x.dtype).unflatten(1, x.shape[1:])
        rows = [layer(u[None]) - zero for u in units]
    return torch.stack([r.flatten() for r in rows], 1), zero.flatten()


def moved(z: Tensor, eps: float, mode: str, shape: torch.Size, dims: tuple[int, ...]) -> Tensor:
    """``z`` with its stabiliser; ``z`` is flat, of the shape given, its rows over ``dims``."""
    sign = torch.where(z >= 0, 1.0, -1.0).to(z.dtype)
    if mode == "rms":
        full = z.reshape(shape)
        size = full.square().mean(dims, keepdim=True).sqrt().expand(shape).reshape(z.shape)
        return z + sign * eps * size
    if mode == "unsigned":
        return z + eps
    if mode == "clip":
        return sign * z.abs().clamp(min=eps)
    return z + sign * eps


@dataclass
class Naive:
    """One layer, its input and the relevance at its result, for rules written out.

    Attributes:
        layer: The layer.
        x: Its input, ``[samples, ...]``.
        quotient: ``R / z`` at its result.
        rows: The dimensions of a row of its result.
    """

    layer: Callable[[Tensor], Tensor]
    x: Tensor
    quotient: Tensor
    rows: tuple[int, ...] = (-1,)

    def __post_init__(self) -> None:
        with torch.no_grad():
            z = self.layer(self.x)
        self.shape = z.shape
        self.z = z.flatten(1)
        self.relevance = (self.quotient * z).flatten(1)
        self.w, self.b = matrix(self.layer, self.x)
        self.zs = self.w * self.x.flatten(1)[:, None]  # [samples, outputs, inputs]

    def share(
        self, zs: Tensor, b: Tensor, relevance: Tensor, eps: float = 0.0, mode: str = "rms"
    ) -> tuple[Tensor, Tensor]:
        """By contributions: what inputs take, and the bias."""
        total = zs.sum(-1) + b
        total = moved(total, eps, mode, self.shape, self.rows) if eps else total
        quotient = torch.where(total == 0, 0, relevance / torch.where(total == 0, 1, total))
        inputs = (zs * quotient[..., None]).sum(1).view_as(self.x)
        return inputs, (b * quotient).sum(1)

    def rule(self, name: str, **options: Any) -> tuple[Tensor, Tensor]:
        """Relevance at the input and of the bias."""
        return getattr(self, name.replace("-", "_"))(**options)

    def epsilon(self, eps: float = 0.0, stabiliser: str = "rms") -> tuple[Tensor, Tensor]:
        return self.share(self.zs, self.b, self.relevance, eps, stabiliser)

    def z_plus(self, eps: float = 0.0, stabiliser: str = "rms") -> tuple[Tensor, Tensor]:
        zs, b = self.zs.clamp(min=0), self.b.clamp(min=0)
        return self.share(zs, b, self.relevance, eps, stabiliser)

    def gamma(
        self, gamma: float = 0.25, eps: float = 0.0, stabiliser: str = "rms"
    ) -> tuple[Tensor, Tensor]:
        above = (self.z > 0)[..., None]
        favoured = torch.where(above, self.zs.clamp(min=0), self.zs.clamp(max=0))
        b = torch.where(above[..., 0], self.b.clamp(min=0), self.b.clamp(max=0))
        return self.share(
            self.zs + gamma * favoured, self.b + gamma * b, self.relevance, eps, stabiliser
        )

    def alpha_beta(
        self,
        alpha: float = 2.0,
        beta: float = 1.0,
        missing: str = "other",
        eps: float = 0.0,
        stabiliser: str = "rms",
    ) -> tuple[Tensor, Tensor]:
        up, down = self.zs.clamp(min=0), self.zs.clamp(max=0)
        b_up, b_down = self.b.clamp(min=0), self.b.clamp(max=0)
        plus, minus = alpha * self.relevance, -beta * self.relevance
        if missing == "other":
            no_up, no_down = up.sum(-1) + b_up == 0, down.sum(-1) + b_down == 0
            plus = torch.where(no_down, self.relevance, plus)
            minus = torch.where(no_up, self.relevance, torch.where(no_down, 0, minus))
        first = self.share(up, b_up, plus, eps, stabiliser)
        second = self.share(down, b_down, minus, eps, stabiliser)
        return first[0] + second[0], first[1] + second[1]

    def w_square(self, bias: bool = False) -> tuple[Tensor, Tensor]:
        zs = self.w.square().expand_as(self.zs)
        b = self.b.square() if bias else torch.zeros_like(self.b)
        return self.share(zs, b, self.relevance)

    def flat(self) -> tuple[Tensor, Tensor]:
        connected = (self.w != 0).to(self.w.dtype).expand_as(self.zs)
        return self.share(connected, torch.zeros_like(self.b), self.relevance)

    def z_box(self, low: Any = -3.0, high: Any = 3.0) -> tuple[Tensor, Tensor]:
        lows, highs = (self._bound(b) for b in (low, high))
        zs = self.zs - lows * self.w.clamp(min=0) - highs * self.w.clamp(max=0)
        return self.share(zs, torch.zeros_like(self.b), self.relevance)

    def _bound(self, bound: Any) -> Tensor:
        if isinstance(bound, float):
            return torch.full_like(self.x[0], bound).flatten()
        spread = torch.tensor(bound, dtype=self.x.dtype).reshape(-1, *[1] * (self.x.ndim - 2))
        return spread.expand_as(self.x[0]).flatten()


class Calls(nn.Module):
    """A function of an input and of weights."""

    def __init__(self, function: Callable[..., Tensor], **weights: tuple[int, ...]) -> None:
        super().__init__()
        self.function = function
        for name, shape in weights.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)
