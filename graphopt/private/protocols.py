"""Secure-computation protocols as tables of what each op costs.

The figures are data: `tables.toml`, with the source of each.  Ours are measured by running one op
of several sizes in the engine (``python -m tests.benchmarks.private_protocols`` measures them
again); protocols without an engine here carry the figures of their papers.
"""

from __future__ import annotations

import functools
import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from graphopt.errors import UnsupportedError, UsageError, suggest
from graphopt.private.circuit import LOCAL_OPS, Circuit, Step
from graphopt.private.cost import Cost


@dataclass(frozen=True)
class Unit:
    """What one kind of op costs, as a function of its sizes.

    Attributes:
        kind: An op of a circuit, such as ``relu``.
        rounds: Rounds of one call, however many elements it has.
        result: Bytes for each element of the result.
        operand: Bytes for each element of the operands (of the secret ones).
        fixed: Bytes of a call.
        source: Where the figures come from.
    """

    kind: str
    rounds: int
    result: float = 0.0
    operand: float = 0.0
    fixed: float = 0.0
    source: str = ""

    def cost(self, result: int, operands: int) -> Cost:
        """Cost of a call with these numbers of elements; of none, nothing."""
        if not result:
            return Cost()
        return Cost(self.fixed + self.result * result + self.operand * operands, self.rounds)


@dataclass(frozen=True)
class Protocol:
    """A protocol, or an engine's version of one.

    Attributes:
        name: Its name.
        parties: How many compute.
        trips: One-way trips that a round takes.
        title: What it is, for people.
        excluded: What the figures leave out.
        units: Cost by kind of op.
    """

    name: str
    parties: int
    trips: float
    title: str
    excluded: str = ""
    units: Mapping[str, Unit] = field(default_factory=dict)

    def unit(self, kind: str) -> Unit:
        """The cost of a kind of op.

        Raises:
            UnsupportedError: The table has none.
        """
        if kind not in self.units:
            raise UnsupportedError(
                f"no figures for {kind!r} under {self.name}",
                hint=suggest(kind, self.units) or f"it has {', '.join(sorted(self.units))}",
            )
        return self.units[kind]

    def nonlinearity(self, kind: str, n: int) -> Cost:
        """Cost of one nonlinear op on n elements.

        Args:
            kind: ``relu``, ``negative`` (a comparison), ``square``, ``multiply``, ``exp``,
                ``reciprocal``, ``rsqrt``, ``sigmoid``, ``tanh``, or one of the compound ones:
                ``relu6``, ``clamp``, ``leaky_relu``, ``abs``, ``max`` (of two), ``silu``, ``gelu``.
            n: Elements.
        """
        if n == 0:
            return Cost()
        parts = _COMPOUND.get(kind, ((kind, 1),))
        total = Cost()
        for part, times in parts:
            total += self._elementwise(part, n * times)
        return total

    def polynomial(self, degree: int, n: int) -> Cost:
        """Cost of a polynomial with public coefficients on n elements.

        Powers come by repeated squaring and products, as `graphopt.private.builder.Builder.power`
        makes them, each power once: degree 2 is a square, 3 a square and a product, 4 two squares
        where the cubic term is absent and one product more where it isn't.

        Args:
            degree: 0 and 1 cost nothing.
            n: Elements.
        """
        total = Cost()
        for power in range(2, degree + 1):
            total += self._elementwise("square" if power % 2 == 0 else "multiply", n)
        return total

    def linear(self, operands: int, result: int, kind: str = "matmul") -> Cost:
        """Cost of a linear map with secret weights.

        Args:
            operands: Elements of the input and the weight together.
            result: Elements of the result.
            kind: ``matmul`` or ``conv``.
        """
        return self.unit(kind).cost(result, operands)

    def step(self, circuit: Circuit, step: Step) -> Cost:
        """Cost of a circuit's step.

        Raises:
            UnsupportedError: The table has no figures for this op.
        """
        if step.op in LOCAL_OPS:
            return Cost()
        secret = [name for name in step.inputs if not circuit.is_public(name)]
        if step.op in ("matmul", "conv") and len(secret) < 2:
            return self.unit(f"{step.op}_public").cost(step.elements, 0) if (
                f"{step.op}_public" in self.units
            ) else Cost()
        operands = sum(circuit.elements(name) for name in secret)
        shaped = _SHAPED.get((self.name, step.op))
        if shaped is not None:
            return shaped(self, circuit, step)
        return self.unit(step.op).cost(step.elements, operands)

    def _elementwise(self, kind: str, n: int) -> Cost:
        return self.unit(kind).cost(n, 2 * n if kind == "multiply" else n)


# What a compound nonlinearity is made of: (kind, times its elements).
_COMPOUND: dict[str, Sequence[tuple[str, int]]] = {
    "relu6": (("relu", 2),),
    "clamp": (("relu", 2),),
    "hardtanh": (("relu", 2),),
    "leaky_relu": (("relu", 1),),
    "abs": (("relu", 1),),
    "max": (("relu", 1),),
    "compare": (("negative", 1),),
    "silu": (("sigmoid", 1), ("multiply", 1)),
    "gelu": (("square", 1), ("multiply", 1), ("tanh", 1), ("multiply", 1)),
    "hardsigmoid": (("relu", 2),),
    "hardswish": (("relu", 2), ("multiply", 1)),
}

Shaped = Callable[[Protocol, Circuit, Step], Cost]
_SHAPED: dict[tuple[str, str], Shaped] = {}


def protocol(name: str | Protocol) -> Protocol:
    """A protocol by name: ``crypten``, ``cheetah``, ``semi2k``, ``aby3``, ``gc``, ``ckks``.

    Raises:
        UsageError: There is none of this name.
    """
    if isinstance(name, Protocol):
        return name
    known = _tables()
    if name not in known:
        hint = suggest(name, known) or f"one of {', '.join(known)}"
        raise UsageError(f"no protocol {name!r}", hint=hint)
    return known[name]


def protocols() -> tuple[str, ...]:
    """Names of the protocols with a table."""
    return tuple(_tables())


@functools.cache
def _tables() -> dict[str, Protocol]:
    text = resources.files("graphopt.private").joinpath("tables.toml").read_text(encoding="utf-8")
    return {name: _read(name, table) for name, table in tomllib.loads(text).items()}


def _read(name: str, table: dict[str, Any]) -> Protocol:
    units = {
        kind: Unit(kind=kind, **{"source": table["source"], **figures})
        for kind, figures in table.pop("units").items()
    }
    table.pop("source")
    return Protocol(name=name, units=units, **table)
