"""Secure-computation protocols as tables of what each op costs.

The figures are data: `tables.toml`, with the source of each.  Ours are measured by running one op
of several sizes in the engine (``python -m tests.benchmarks.private_protocols`` measures them
again); protocols without an engine here carry the figures of their papers.
"""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import Any

from graphopt.errors import UnsupportedError, UsageError, suggest
from graphopt.private.circuit import LOCAL_OPS, Circuit, Step
from graphopt.private.cost import Cost
from graphopt.private.points import Points
from graphopt.private.products import Packing, TriplePool, is_depthwise, product


@dataclass(frozen=True)
class Unit:
    """What one kind of op costs, as a function of its sizes.

    Attributes:
        kind: An op of a circuit, such as ``relu``.
        rounds: Rounds of one call, however many elements it has.
        result: Bytes for each element of the result.
        operand: Bytes for each element of the operands (of the secret ones).
        fixed: Bytes of a call.
        points: Bytes by the elements of the result, in addition; None: nothing.
        levels: Multiplicative depth that a call uses up under homomorphic encryption.
        source: Where the figures come from.
    """

    kind: str
    rounds: int
    result: float = 0.0
    operand: float = 0.0
    fixed: float = 0.0
    points: Points | None = None
    levels: int = 0
    source: str = ""

    def cost(self, result: int, operands: int) -> Cost:
        """Cost of a call with these numbers of elements; of none, nothing."""
        if not result:
            return Cost()
        stepped = self.points.at(result) if self.points else 0.0
        linear = self.fixed + self.result * result + self.operand * operands
        return Cost(linear + stepped, self.rounds)


@dataclass(frozen=True)
class Protocol:
    """A protocol, or an engine's version of one.

    Attributes:
        name: Its name.
        parties: How many compute.
        trips: One-way trips that a round takes.
        title: What it is, for people.
        excluded: What the figures leave out.
        patches: Whether convolutions run as products over patches of the input.
        packing: How matrix products are packed into ciphertexts, or None.
        pool: Batches in which multiplication triples are made, or None.
        units: Cost by kind of op.
    """

    name: str
    parties: int
    trips: float
    title: str
    excluded: str = ""
    patches: bool = False
    packing: Packing | None = None
    pool: TriplePool | None = None
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

    def levels(self, circuit: Circuit) -> int:
        """Multiplicative depth of a circuit, which sets the size of CKKS parameters."""
        depth: dict[str, int] = {}
        for step in circuit.steps:
            before = max((depth.get(name, 0) for name in step.inputs), default=0)
            depth[step.name] = before + self.step_levels(circuit, step)
        return max((depth.get(name, 0) for name in circuit.outputs), default=0)

    def step_levels(self, circuit: Circuit, step: Step) -> int:
        """Levels that one step of a circuit uses up; none where the table has no figures."""
        unit = self.units.get(self._sizes(circuit, step)[0])
        return unit.levels if unit else 0

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
        if step.op in LOCAL_OPS and not self._scales(step):
            return Cost()
        kind, result, operands, calls = self._sizes(circuit, step)
        if kind not in self.units and kind == "scale":
            return Cost()  # parties scale their own shares
        cost = self.unit(kind).cost(result, operands)
        if self.packing is not None and kind in ("matmul", "conv"):
            cost += Cost(self.packing.bytes(product(circuit, step)))
        return Cost(cost.bytes, cost.rounds * calls)

    def steps(self, circuit: Circuit) -> dict[str, Cost]:
        """Cost of every step of a circuit by name, as it runs when everything is set up.

        Where triples are made in batches, the call that finds too few pays for a batch.
        """
        costs = {step.name: self.step(circuit, step) for step in circuit.steps}
        if self.pool is None:
            return costs
        left = 0
        for turn in range(2):  # what the first turn leaves over serves the second
            for step in circuit.steps:
                kind, result, _, _ = self._sizes(circuit, step)
                if kind in ("multiply", "square") and result:
                    left, extra = self.pool.take(left, result)
                    if turn:
                        rest = "online" if self.pool.takes_triples(result) else "scale"
                        base = self.unit(rest).cost(result, 0).bytes
                        costs[step.name] = Cost(base + extra, costs[step.name].rounds)
        return costs

    def _sizes(self, circuit: Circuit, step: Step) -> tuple[str, int, int, int]:
        """Kind, elements of the result and of the secret operands, calls one after the other."""
        secret = [name for name in step.inputs if not circuit.is_public(name)]
        operands = sum(circuit.elements(name) for name in secret)
        if self._scales(step):
            return "scale", step.elements, operands, 1
        if step.op not in ("matmul", "conv"):
            spread = self.patches and step.op == "multiply"  # broadcast before it is shared
            return step.op, step.elements, 2 * step.elements if spread else operands, 1
        if len(secret) < 2:
            return "scale", step.elements, operands, 1
        if not self.patches:
            return step.op, step.elements, operands, 1
        p = product(circuit, step)
        if is_depthwise(circuit, step):
            return "multiply", p.result * p.k, 2 * p.result * p.k, 1
        return step.op, p.result, p.operands, p.count

    @staticmethod
    def _scales(step: Step) -> bool:
        return step.op == "scale" or (step.op == "sum" and step.attributes["divisor"] != 1)

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
    points = {key: Points.read(pairs) for key, pairs in table.pop("points", {}).items()}
    units = {}
    for kind, figures in table.pop("units").items():
        if "points" in figures:
            figures["points"] = points[figures["points"]]
        units[kind] = Unit(kind=kind, **{"source": table["source"], **figures})
    table.pop("source")
    packing = Packing(**table.pop("packing")) if "packing" in table else None
    pool = TriplePool(**table.pop("pool")) if "pool" in table else None
    return Protocol(name=name, units=units, packing=packing, pool=pool, **table)
