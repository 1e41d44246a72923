"""The circuit in floating point: what every engine's result is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.private.builder import IN_THE_CLEAR
from graphopt.private.circuit import Circuit, Step


def evaluate(circuit: Circuit, inputs: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run a circuit in double precision.

    Args:
        circuit: What to run.
        inputs: One tensor for each input.

    Returns:
        Every value by name, inputs and constants included.
    """
    values = {name: c.tensor for name, c in circuit.constants.items()}
    values.update(zip(circuit.inputs, (x.detach().double() for x in inputs), strict=True))
    for step in circuit.steps:
        given = [values[name] for name in step.inputs]
        values[step.name] = _OPS[step.op](step, *given).reshape(step.shape)
    return values


def range_of(circuit: Circuit, values: Mapping[str, torch.Tensor]) -> tuple[float, str]:
    """The largest magnitude of any step's result, and that step's node."""
    sizes = [
        (float(values[s.name].abs().max()), s.site.node)
        for s in circuit.steps
        if values[s.name].numel()
    ]
    return max(sizes, default=(0.0, ""))


def _conv(step: Step, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    rank = weight.dim() - 2
    run = (torch.conv1d, torch.conv2d)[rank - 1]
    return run(x, weight, None, **step.attributes)


def _move(step: Step, *given: torch.Tensor) -> torch.Tensor:
    *values, index = given
    table = torch.cat([torch.zeros(1, dtype=values[0].dtype), *[v.reshape(-1) for v in values]])
    return table[index]


def _sum(step: Step, x: torch.Tensor) -> torch.Tensor:
    return x.sum(step.attributes["dims"], step.attributes["keepdim"]) / step.attributes["divisor"]


def _reshape(step: Step, x: torch.Tensor) -> torch.Tensor:
    return x.reshape(step.shape)


_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda step, a, b: a + b,
    "sub": lambda step, a, b: a - b,
    "shift": lambda step, a, b: a + b,
    "scale": lambda step, a, b: a * b,
    "multiply": lambda step, a, b: a * b,
    "square": lambda step, a: a * a,
    "matmul": lambda step, a, b: a @ b,
    "conv": _conv,
    "move": _move,
    "sum": _sum,
    "reshape": _reshape,
    **{op: (lambda step, x, f=f: f(x)) for op, f in IN_THE_CLEAR.items()},
}
