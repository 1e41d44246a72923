"""What an operand of a product is to it: a value, a gate on values, or their normaliser."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import fx

from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op

_T = TypeVar("_T")


class Role(enum.StrEnum):
    """What an operand is to a product."""

    VALUE = "value"
    GATE = "gate"  # made by a softmax or a sigmoid: it says how much of the other one counts
    NORMALISER = "normaliser"  # a reciprocal: it scales the other one to a fixed size


class Roles:
    """Roles and numbers of factors of the values of one graph.

    Args:
        ops: The operations, by their result.
    """

    def __init__(self, ops: Mapping[fx.Node, Op]) -> None:
        self._ops = ops
        self._origins: dict[fx.Node, frozenset[Role]] = {}
        self._factors: dict[fx.Node, int] = {}

    def of(self, op: Op, operand: fx.Node) -> Role:
        """The role of an operand of a product."""
        if op.name in ("div", "divide", "true_divide") and operand is op.node.args[1]:
            return Role.NORMALISER
        found = self._origin(operand)
        return next(iter(found)) if len(found) == 1 else Role.VALUE

    def factors(self, node: fx.Node) -> int:
        """How many values a value is the product of, whichever way they are associated."""
        return self._walk(node, self._factors, self._count)

    def _origin(self, node: fx.Node) -> frozenset[Role]:
        return self._walk(node, self._origins, self._classify)

    def _walk(
        self,
        node: fx.Node,
        known: dict[fx.Node, _T],
        compute: Callable[[fx.Node], _T],
    ) -> _T:
        """``compute`` for a value after all that it depends on, without recursion."""
        stack = [node]
        while stack:
            top = stack[-1]
            if top in known:
                stack.pop()
                continue
            op = self._ops.get(top)
            missing = [o for o in op.operands if o not in known] if op is not None else []
            if missing:
                stack += missing
            else:
                known[stack.pop()] = compute(top)
        return known[node]

    def _classify(self, node: fx.Node) -> frozenset[Role]:
        op = self._ops.get(node)
        if op is None:
            return frozenset({Role.VALUE})
        if not op.is_region and op.name in families.GATES:
            return frozenset({Role.GATE})
        if not op.is_region and _is_reciprocal(op):
            return frozenset({Role.NORMALISER})
        if op.family in (Family.ROUTE, Family.SCALE):
            return frozenset().union(*(self._origins[o] for o in op.operands))
        return frozenset({Role.VALUE})

    def _count(self, node: fx.Node) -> int:
        op = self._ops.get(node)
        if op is None:
            return 1
        if op.family is Family.PRODUCT:
            values = [o for o in op.operands if self.of(op, o) is Role.VALUE]
            return max(1, sum(self._factors[o] for o in values))
        if op.family in (Family.ROUTE, Family.SCALE) and len(op.operands) == 1:
            return self._factors[op.operands[0]]
        return 1


def _is_reciprocal(op: Op) -> bool:
    if op.name in families.NORMALISERS:
        return True
    exponent = op.node.args[1] if op.name == "pow" and len(op.node.args) > 1 else 0
    return isinstance(exponent, int | float) and exponent < 0
