"""Values of a circuit that can't be negative whatever the inputs are."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.private.builder import Builder, Plain, Value
from graphopt.private.circuit import Step

# Never negative; never negative if their first operand isn't; if none of their operands is.
_ALWAYS = frozenset({"square", "relu", "exp", "sigmoid", "rsqrt", "negative"})
_ALL = frozenset({"add", "shift", "scale", "multiply", "matmul", "conv", "sum", "reshape"})


def is_nonnegative(b: Builder, value: Value) -> bool:
    """Whether a value is proven to be zero or more, from the ops that made it.

    Nothing is read off a secret constant: the circuit that a proof leads to is public.
    """
    if isinstance(value, Plain):
        return not value.secret and bool((value.tensor >= 0).all())
    steps = {step.name: step for step in b.steps}
    return _proven(b, value.name, steps, {})


def _proven(b: Builder, name: str, steps: Mapping[str, Step], known: dict[str, bool]) -> bool:
    if name not in known:
        known[name] = _looked_at(b, name, steps, known)
    return known[name]


def _looked_at(b: Builder, name: str, steps: Mapping[str, Step], known: dict[str, bool]) -> bool:
    step = steps.get(name)
    if step is None:
        constant = b.constants.get(name)
        if constant is None:
            return name in b.classes  # one-hot
        return not constant.secret and bool((constant.tensor >= 0).all())
    if step.op in _ALWAYS:
        return True
    if step.op == "multiply" and step.inputs[0] == step.inputs[1]:
        return True
    if step.op in _ALL:
        return all(_proven(b, each, steps, known) for each in step.inputs)
    if step.op == "move":  # the last one is its index
        return all(_proven(b, each, steps, known) for each in step.inputs[:-1])
    return False
