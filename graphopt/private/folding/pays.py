"""Whether merging linear operators pays: in multiply-adds, or in what a protocol sends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.cost import Cost
from graphopt.private.folding.linear import Linear
from graphopt.private.protocols import Protocol, protocol
from graphopt.private.rules import find_rule

aten = torch.ops.aten

MOST_GROWTH = 4
"""How many times the multiply-adds may become under a protocol."""


@dataclass(frozen=True, eq=False)
class Op:
    """A linear operator at its place.

    Attributes:
        linear: The operator.
        given: Sizes of its input.
        result: Sizes of its output.
    """

    linear: Linear
    given: list[int]
    result: list[int]

    @property
    def products(self) -> int:
        """Multiply-adds."""
        return self.linear.products(self.given, self.result)


Pays = Callable[[Sequence[Op], Op], bool]
"""Whether one operator is worth more than several, one after the other or added up."""


def in_products(before: Sequence[Op], after: Op) -> bool:
    """One operator less, and no multiply-adds more."""
    return after.products <= sum(op.products for op in before)


def under(name: str | Protocol) -> Pays:
    """By a protocol: no more rounds, bytes or levels than before.

    Multiply-adds, which the parties compute without talking, may grow, but not beyond fourfold.  Of
    operators for which the protocol has no figures, `in_products` decides.
    """
    chosen = protocol(name)

    def pays(before: Sequence[Op], after: Op) -> bool:
        if after.products > MOST_GROWTH * sum(op.products for op in before):
            return False
        try:
            old, new = _cost(before, chosen), _cost([after], chosen)
        except UnsupportedError:
            return in_products(before, after)
        return all(n <= o for n, o in zip(new, old, strict=True))

    return pays


def _cost(ops: Sequence[Op], chosen: Protocol) -> tuple[float, ...]:
    """Rounds, bytes and levels of operators with secret weights."""
    builder = Builder()
    inputs = [builder.input(f"x{i}", op.given) for i, op in enumerate(ops)]
    results = [_run(builder, op.linear, x) for op, x in zip(ops, inputs, strict=True)]
    circuit = builder.circuit([builder.shared(r).name for r in results])
    total = sum(chosen.steps(circuit).values(), Cost())
    return total.rounds, total.bytes, len(ops) * chosen.levels(circuit)


def _run(builder: Builder, linear: Linear, x: Value) -> Value:
    weight = Plain(torch.ones(linear.weight.shape), secret=True)
    if linear.dims == 0:
        return _rule(aten.linear.default)(builder, x, weight)
    if linear.dims > 2:
        raise UnsupportedError("no figures for convolutions in three dimensions")
    return _rule(aten.convolution.default)(
        builder, x, weight, None, linear.stride, linear.padding, linear.dilation,
        linear.transposed, linear.output_padding, linear.groups,
    )  # fmt: skip


def _rule(target: Any) -> Any:
    found = find_rule(target)
    assert found is not None
    return found
