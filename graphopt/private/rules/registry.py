"""Where rules are registered and looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

Rule = Callable[..., Any]
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a rule for ops (overloads or packets of ATen) or functions that graphs call."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return register


def find_rule(target: Any) -> Rule | None:
    """The rule of an overload, else that of all its packet's overloads."""
    found = RULES.get(target)
    return found or RULES.get(getattr(target, "overloadpacket", None))
