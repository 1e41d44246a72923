"""What an operand of a product is to it: a value, a gate on values, or their normaliser."""

from __future__ import annotations

import enum
from collections.abc import Callable, Collection, Mapping
from typing import TypeVar

from torch import fx

from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op
from graphopt.passes.relevance.selection import selections

_T = TypeVar("_T")


class Role(enum.StrEnum):
    """What an operand is to a product; the later, the less it is a value."""

    VALUE = "value"
    ACTIVATED = "activated"  # made by an activation, and the other one is not: SwiGLU's gate
    SELECTION = "selection"  # made from what it is multiplied with: A, B, C of a selective scan
    GATE = "gate"  # made by a sigmoid: it says how much of the other one counts
    ATTENTION = "attention"  # made by a softmax: likewise
    NORMALISER = "normaliser"  # a reciprocal: it scales the other one to a fixed size


_RANK = {role: rank for rank, role in enumerate(Role)}

_SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax"})

_LOGARITHMS = frozenset({"log_softmax", "_log_softmax"})

_WEIGHING = (frozenset({Role.GATE}), frozenset({Role.ATTENTION}))
_BOUNDS = frozenset({"clamp", "clip", "clamp_min", "clamp_max"})

_NONLINEAR = frozenset(
    {"relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "hardtanh", "hardswish"}
    | {"tanh", "softplus", "mish", "softsign"}
)

_NONNEGATIVE = frozenset(
    {"relu", "relu6", "sigmoid", "hardsigmoid", "softmax", "_softmax", "_safe_softmax", "exp"}
    | {"exp2", "abs", "square", "softplus", "sqrt", "rsqrt"}
)
_KEEPS_SIGN = frozenset(
    {"avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"}
    | {"adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
    | {"upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "sum", "mean", "cumsum"}
    | {"getitem", "view", "reshape", "flatten", "permute", "transpose", "cat", "stack", "slice"}
    | {"contiguous", "clone", "dropout", "squeeze", "unsqueeze", "select", "expand", "to", "add"}
)


class Roles:
    """Roles and numbers of factors of the values of one graph.

    Args:
        ops: The operations, by their result.
    """

    def __init__(self, ops: Mapping[fx.Node, Op]) -> None:
        self._ops = ops
        self._origins: dict[fx.Node, frozenset[Role]] = {}
        self._factors: dict[frozenset[str], dict[fx.Node, int]] = {}
        self._nonnegative: dict[fx.Node, bool] = {}
        self._selections = selections(ops)

    def of(self, op: Op, operand: fx.Node) -> Role:
        """The role of an operand of a product."""
        if op.name in ("div", "divide", "true_divide") and operand is op.node.args[1]:
            return Role.NORMALISER
        found = self._role(operand)
        if found is Role.VALUE and (op, operand) in self._selections:
            return Role.SELECTION
        others = [o for o in op.operands if o is not operand]
        if found is Role.ACTIVATED and any(self._role(o) is not Role.VALUE for o in others):
            return Role.VALUE  # o * tanh(c) of an LSTM
        return found

    def takers(self, op: Op, stopped: Collection[str]) -> dict[fx.Node, int]:
        """The operands of a product that take relevance, and how many factors each one is.

        Args:
            op: The product.
            stopped: Roles that take nothing, where an operand of another one is there.
        """
        bias = op.argument(op.spec.bias)
        roles = {o: self.of(op, o) for o in op.operands if o is not bias}
        found = [o for o, role in roles.items() if role not in stopped]
        if not found:
            least = min(_RANK[role] for role in roles.values())
            found = [o for o, role in roles.items() if _RANK[role] == least]
        return {o: self.factors(o, stopped) for o in found}

    def factors(self, node: fx.Node, stopped: Collection[str] = (Role.NORMALISER,)) -> int:
        """How many values a value is the product of, whichever way they are associated."""
        key = frozenset(str(role) for role in stopped)
        return self._walk(node, self._factors.setdefault(key, {}), lambda n: self._count(n, key))

    def is_nonnegative(self, node: fx.Node) -> bool:
        """Whether a value can't be negative, as an activation's results."""
        return self._walk(node, self._nonnegative, self._signed)

    def _role(self, node: fx.Node) -> Role:
        found = self._walk(node, self._origins, self._classify)
        return next(iter(found)) if len(found) == 1 else Role.VALUE

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
        if op.is_region:
            return frozenset({Role.ACTIVATED})
        if op.name in families.GATES:
            return frozenset({Role.ATTENTION if op.name in _SOFTMAX else Role.GATE})
        if _is_reciprocal(op):
            return frozenset({Role.NORMALISER})
        if op.name in _NONLINEAR:
            return frozenset({Role.ACTIVATED})
        if op.family in (Family.ROUTE, Family.SCALE):
            return self._united(op)
        if op.name == "exp" and self._is_logarithm(op.operands[0]):
            return frozenset({Role.ATTENTION})
        # what is made of weights alone weighs too: the largest, their share of a sum, a product
        combines = op.family in (Family.ADD, Family.REDUCE, Family.MAX, Family.PRODUCT)
        if (combines or op.name in _BOUNDS) and self._united(op) in _WEIGHING:
            return self._united(op)
        return frozenset({Role.VALUE})

    def _united(self, op: Op) -> frozenset[Role]:
        """What the operands are made by."""
        return frozenset().union(*(self._origins[o] for o in op.operands))

    def _is_logarithm(self, node: fx.Node) -> bool:
        """Whether a value is the logarithm of a softmax."""
        op = self._ops.get(node)
        return op is not None and op.name in _LOGARITHMS

    def _count(self, node: fx.Node, stopped: frozenset[str]) -> int:
        op = self._ops.get(node)
        if op is None:
            return 1
        known = self._factors[stopped]
        if op.family is Family.PRODUCT:
            values = [o for o in op.operands if self.of(op, o) not in stopped]
            return max(1, sum(known[o] for o in values))
        if op.family in (Family.ROUTE, Family.SCALE) and len(op.operands) == 1:
            return known[op.operands[0]]
        return 1

    def _signed(self, node: fx.Node) -> bool:
        op = self._ops.get(node)
        if op is None or op.is_region:
            return False
        if op.name in _NONNEGATIVE:
            return True
        if op.constants or not all(self._nonnegative[o] for o in op.operands):
            return False
        if op.name == "add":
            return len(op.operands) == 2 and "alpha" not in op.node.kwargs
        return op.family is Family.MAX or op.name in _KEEPS_SIGN


def _is_reciprocal(op: Op) -> bool:
    if op.name in families.NORMALISERS:
        return True
    exponent = op.node.args[1] if op.name == "pow" and len(op.node.args) > 1 else 0
    return isinstance(exponent, int | float) and exponent < 0
