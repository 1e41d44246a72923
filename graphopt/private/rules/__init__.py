"""How ATen ops read as arithmetic on secret values.

A rule takes the builder and the op's arguments, tensors as `Shared` or `Plain` values, and returns
what the op returns.  Ops on known values alone need no rule: they run in the clear.  A package that
puts ops of its own into graphs says with `rule` what they are.
"""

from __future__ import annotations

from graphopt.private.rules import elementwise, linear, normalization, pooling, reductions
from graphopt.private.rules.registry import RULES, Rule, aten, find_rule, rule

__all__ = [
    "RULES", "Rule", "aten", "elementwise", "find_rule", "linear", "normalization", "pooling",
    "reductions", "rule",
]  # fmt: skip
