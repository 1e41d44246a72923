"""An operation while relevance passes through it: what a rule sees and what it may do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.flow import Flow, signed, times
from graphopt.passes.relevance.ops import Op, weight_name
from graphopt.passes.relevance.origins import Origin
from graphopt.passes.relevance.roles import Role

EPSILON, BIAS, CONSTANTS, PARAMETERS, SOFTMAX = (
    "epsilon", "bias", "constants", "parameters", "softmax",
)  # fmt: skip


class Site:
    """One operation of one run.

    Args:
        run: The `Run` that it is a part of.
        op: The operation.

    Attributes:
        op: The operation.
        flows: What arrives at its results, by position (0 where there is one).
        prepared: What the rule prepared when the operation ran.
    """

    def __init__(self, run: Any, op: Op) -> None:
        self._run = run
        self.op = op
        self.flows: dict[int, Flow] = {}
        self._leaves: dict[fx.Node, Tensor] = {}
        self._result: Any = None
        self.prepared: Any = None

    def forward(self) -> Any:
        """Run the operation; the result is cut off from what it was computed from."""
        for node in (*self.op.operands, *self.followed):
            value = self._run.values[node]
            if isinstance(value, Tensor):
                self._leaves[node] = value.detach().requires_grad_()
        with torch.enable_grad():
            self._result = self.op.run(lambda n: self._leaves.get(n, self._run.values[n]))
        self.prepared = self.rule.prepare(self)
        return _detached(self._result)

    @property
    def rule(self) -> Any:
        """The `Rule` that was chosen for the operation."""
        return self._run.plan.rules[self.op]

    @property
    def followed(self) -> tuple[fx.Node, ...]:
        """Constants of which the relevance was asked for."""
        wanted = self._run.followed & self._run.parametric
        return tuple(n for n in self.op.constants if n in wanted)

    @property
    def _is_constant(self) -> bool:
        """Whether the operation leads to a followed parameter; its relevance is booked already."""
        return self.op.node in self._run.followed

    @property
    def results(self) -> Sequence[Tensor]:
        """All results."""
        found = self._run.values[self.op.node]
        return found if isinstance(found, tuple | list) else (found,)

    @property
    def result(self) -> Tensor:
        """The first result."""
        return self.results[0]

    @property
    def computed(self) -> Tensor:
        """The first result, while a rule prepares what it needs."""
        return _detached(self._first())

    def _first(self) -> Tensor:
        found = self._result
        return found[0] if isinstance(found, tuple | list) else found

    def value(self, node: fx.Node) -> Tensor:
        """The tensor that an operand holds."""
        return self._run.values[node]

    def whole(self, node: fx.Node) -> Any:
        """The value of anything that the operation reads."""
        return self._run.values[node]

    def argument(self, place: int | None) -> Any:
        """The value of an argument of the operation, or None."""
        found = self.op.argument(place)
        return fx.map_arg(found, lambda n: self._run.values[n])

    def role(self, operand: fx.Node) -> Role:
        """What an operand is to a product."""
        return self._run.roles.of(self.op, operand)

    def takers(self, stopped: Sequence[str]) -> dict[fx.Node, int]:
        """The operands of a product that take relevance, and how many factors each one is."""
        return self._run.roles.takers(self.op, stopped)

    def is_nonnegative(self, operand: fx.Node) -> bool:
        """Whether no value of an operand can be negative, whatever the input."""
        return self._run.roles.is_nonnegative(operand)

    def behind(self) -> Site | None:
        """The batch norm that is a part of this layer, or None."""
        norm = self._run.plan.folds.get(self.op)
        return None if norm is None else Site(self._run, norm)

    def pattern(self) -> Tensor | None:
        """The pattern of the layer's weights, if there are any."""
        return (self._run.plan.patterns or {}).get(weight_name(self.op))

    # --- what arrives -------------------------------------------------------------------------

    @property
    def flow(self) -> Flow:
        """What arrives at the first result.

        Raises:
            KeyError: Nothing does.
        """
        return self.flows[0]

    def relevance(self) -> Tensor:
        """``R`` at the first result."""
        return self.flow.relevance(self.result)

    def quotient(self) -> Tensor:
        """``R / z`` at the first result; what would be divided by zero is booked as absorbed."""
        if self.flow.is_quotient:
            return self.flow.tensor
        return self.divided(self.flow.tensor, self.result)

    def divided(self, relevance: Tensor, denominator: Tensor) -> Tensor:
        """``R / z`` where ``z`` is not zero, else zero; what is lost is booked as absorbed."""
        zero = denominator == 0
        self.book(EPSILON, torch.where(zero, relevance, 0))
        return torch.where(zero, 0, relevance / torch.where(zero, 1, denominator))

    def over(self, relevance: Tensor, total: Tensor, eps: float, mode: str) -> Tensor:
        """``R / (z + eps)`` for some ``z``; what the stabiliser takes is booked as absorbed."""
        if eps == 0:
            return self.divided(relevance, total)
        moved = self.stabilised(eps, mode, total)
        zero = moved == 0  # a row of zeros has no size either
        quotient = torch.where(zero, 0, relevance / torch.where(zero, 1, moved))
        lost = times(quotient, moved - total)
        self.book(EPSILON, torch.where(zero, relevance, lost))
        return quotient

    # --- what leaves --------------------------------------------------------------------------

    def vjp(self, cotangent: Tensor | None = None) -> dict[fx.Node, Tensor]:
        """The product of a cotangent with the operation's Jacobian, for each operand.

        Args:
            cotangent: Of the shape of the first result; None: all that arrives, whatever its form.
        """
        nodes = list(self._leaves)
        results = self._result if isinstance(self._result, tuple | list) else (self._result,)
        given = (
            {i: f.tensor for i, f in self.flows.items()} if cotangent is None else {0: cotangent}
        )
        pairs = [(results[i], c) for i, c in given.items() if results[i].requires_grad]
        if not pairs or not nodes:
            return {}
        grads = torch.autograd.grad(
            [r for r, _ in pairs],
            [self._leaves[n] for n in nodes],
            [self.op.cotangent(c) for _, c in pairs],
            allow_unused=True,
        )
        return {n: g for n, g in zip(nodes, grads, strict=True) if g is not None}

    def send(self, operand: fx.Node, tensor: Tensor, form: Any = "quotient") -> None:
        """Hand relevance on to an operand."""
        self._run.arrive(operand, Flow(tensor, form), self)

    def send_all(self, quotients: Mapping[fx.Node, Tensor], only: Sequence[fx.Node] = ()) -> None:
        """Hand quotients on to all operands, or to some; followed constants get theirs too."""
        for node, tensor in quotients.items():
            if not only or node in only or node in self.followed:
                self.send(node, tensor)

    def send_followed(self, quotient: Tensor) -> None:
        """Hand their quotients on to followed constants alone."""
        if self.followed:
            sent = self.vjp(quotient)
            self.send_all({n: sent[n] for n in self.followed if n in sent})

    def book(self, sink: str, relevance: Tensor, share: float = 1) -> None:
        """Book relevance that stays here, or a multiple of it; of the shape of the first result."""
        self.book_at(self.op.node, sink, relevance, share)

    def book_at(self, node: fx.Node, sink: str, relevance: Tensor, share: float = 1) -> None:
        """Book relevance that stays here, or a multiple; of the shape of a result or operand."""
        if self._is_constant:
            return
        self._run.ledger.book(self.op, sink, relevance, node, share)

    def book_constant(
        self, node: fx.Node | None, relevance: Tensor, at: fx.Node | None = None
    ) -> None:
        """Book relevance of a constant: a parameter's where it comes from one.

        Args:
            node: The constant.
            relevance: Of the shape of the first result, or of ``at``.
            at: An operand.
        """
        named = node is not None and node in self._run.parametric
        self.book_at(at or self.op.node, PARAMETERS if named else CONSTANTS, relevance)

    def book_bias(self, bias: Tensor, quotient: Tensor, channel: int) -> None:
        """Book ``b * c`` where a bias lies along one dimension of the result."""
        if self._is_constant:
            return
        self._run.ledger.book_channels(self.op, BIAS, quotient, bias, channel)

    def constant_part(self) -> Tensor:
        """The result with zeros for all data: what a sum holds besides its data."""
        zero = {n: torch.zeros_like(self._run.values[n]) for n in self.op.operands}
        return self.op.run(lambda n: zero[n] if n in zero else self._run.values[n])

    def stabilised(self, eps: float, mode: str, result: Tensor | None = None) -> Tensor:
        """``z`` moved away from zero.

        Args:
            eps: How far.
            mode: ``rms`` (``eps`` times the root mean square of the row of ``z``), ``sign``
                (absolute, zero counts as positive), ``unsigned`` (``z + eps``) or ``clip``.
            result: Another ``z``.
        """
        value = self.result if result is None else result
        if mode == "rms":
            rows = self._run.rows(self.op)
            sized = self._sized(value)
            # squares of half precision overflow beyond 256
            wide = sized.to(torch.promote_types(sized.dtype, torch.float32))
            size = wide.square().mean(rows, keepdim=True).sqrt()
            # squares overflow from here on: a size too small absorbs less, an infinite one all
            size = size.nan_to_num(nan=math.nan, posinf=torch.finfo(size.dtype).max ** 0.5 / 1024)
            return signed(value, (eps * size).to(value.dtype))
        if mode == "unsigned":
            return value + eps
        if mode == "clip":
            sign = torch.where(value >= 0, 1.0, -1.0).to(value.dtype)
            return sign * value.abs().clamp(min=eps)
        return signed(value, torch.full((), eps, dtype=value.dtype, device=value.device))

    def _sized(self, value: Tensor) -> Tensor:
        """What a row's size is taken of: not of masks that are added."""
        if self.op.family is Family.ADD and len(self.op.operands) == 1:
            return self.value(self.op.operands[0]).expand_as(value)
        return value

    @property
    def origin(self) -> Origin | None:
        """What an activation is at zero, where that is a number."""
        return self._run.plan.origins.get(self.op)


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_detached(v) for v in value)
    return value
