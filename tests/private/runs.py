"""Several networks in one run of an engine: starting one takes longer than running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.private import lower
from graphopt.private.circuit import Circuit
from graphopt.private.cost import Cost
from graphopt.private.engines import Run
from graphopt.private.protocols import Protocol
from tests.private.nets import build


@dataclass(frozen=True)
class Done:
    """One network of a run: what came out, what should have, and costs by step."""

    circuit: Circuit
    output: Tensor
    expected: Tensor
    predicted: Mapping[str, Cost]
    measured: Mapping[str, Cost]

    @property
    def error(self) -> float:
        return float((self.output.reshape(self.expected.shape) - self.expected).abs().max())


def together(parts: Mapping[str, Circuit]) -> Circuit:
    """One circuit that holds several, their names prefixed."""
    inputs, constants, steps, outputs = {}, {}, [], []
    for prefix, part in parts.items():
        inputs.update({f"{prefix}/{n}": s for n, s in part.inputs.items()})
        constants.update({f"{prefix}/{n}": c for n, c in part.constants.items()})
        outputs += [f"{prefix}/{n}" for n in part.outputs]
        steps += [
            dataclasses.replace(
                s, name=f"{prefix}/{s.name}", inputs=tuple(f"{prefix}/{n}" for n in s.inputs)
            )
            for s in part.steps
        ]
    return Circuit(inputs, constants, tuple(steps), tuple(outputs))


def run_together(
    names: list[str], engine: Callable[[Circuit, list[Tensor]], Run], under: Protocol
) -> dict[str, Done]:
    """Run networks in one go and take the figures apart again."""
    built = {name: build(name) for name in names}
    parts = {name: lower(model, (x,)) for name, (model, x) in built.items()}
    whole = together(parts)
    run = engine(whole, [x for _, x in built.values()])
    costs = under.steps(whole)
    done = {}
    for (name, (model, x)), output in zip(built.items(), run.outputs, strict=True):
        with torch.no_grad():
            expected = model(x).double()
        mine = [f"{name}/{step.name}" for step in parts[name].steps]
        done[name] = Done(
            parts[name],
            output,
            expected,
            {n.split("/", 1)[1]: costs[n] for n in mine},
            {n.split("/", 1)[1]: run.steps[n].cost for n in mine},
        )
    return done


def compared_bytes(done: Done) -> float:
    """Measured bytes of the steps that compare."""
    return sum(
        done.measured[step.name].bytes
        for step in done.circuit.steps
        if step.op in ("relu", "negative")
    )


def totals(costs: Mapping[str, Cost]) -> Cost:
    """Sum of costs."""
    return sum(costs.values(), Cost())
