"""Measures what each op costs under each protocol: the figures of `graphopt/private/tables.toml`.

    python -m tests.benchmarks.private_protocols --protocol crypten

Every op runs alone on several sizes in the engine; bytes are fitted as ``fixed + result * elements
of the result + operand * elements of the operands`` by least squares, and printed beside the
table's with the largest deviation of any size; where the table is a list of measured points, every
size is printed beside it.  Cheetah's products depend on packing and on pools
of triples, so that its rows for ``multiply`` and ``matmul`` are printed as they are measured.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from graphopt.private import protocol
from graphopt.private.builder import Builder
from graphopt.private.circuit import Circuit, Site, Step
from graphopt.private.engines import Run, crypten, spu
from graphopt.private.protocols import Unit

SIZES = (1, 7, 14, 33, 50, 64, 65, 100, 128, 200, 1000, 8192)
PRODUCTS = ((1, 64, 10), (4, 64, 10), (100, 9, 8), (196, 72, 16), (49, 288, 32), (1000, 27, 32))
UNARY = ("relu", "negative", "square", "exp", "reciprocal", "rsqrt", "sigmoid", "tanh")


@dataclass(frozen=True)
class Sample:
    """One call: elements of its result and of its operands, and what it took."""

    result: int
    operands: int
    bytes: float
    rounds: int


def one_step_each(kinds: tuple[str, ...]) -> tuple[Circuit, list[torch.Tensor]]:
    """A circuit of independent steps, one for each op and size, and its inputs."""
    builder, inputs, outputs = Builder(), [], []

    def secret(name: str, *shape: int) -> torch.Tensor:
        inputs.append(torch.rand(*shape) + 0.5)
        return builder.input(name, shape)  # type: ignore[return-value]

    for kind in kinds:
        sizes = PRODUCTS if kind == "matmul" else [(n,) for n in SIZES]
        for size in sizes:
            builder.site = Site(f"{kind}_{'x'.join(map(str, size))}")
            name = builder.site.node
            if kind == "matmul":
                m, k, n = size
                given, shape = [secret(f"{name}.a", m, k), secret(f"{name}.b", k, n)], (m, n)
            elif kind == "multiply":
                given, shape = [secret(f"{name}.a", *size), secret(f"{name}.b", *size)], size
            elif kind == "scale":
                factor = builder.constant(torch.tensor([0.3], dtype=torch.double), False)
                given, shape = [secret(f"{name}.a", *size), factor], size
            else:
                given, shape = [secret(f"{name}.a", *size)], size
            outputs.append(builder.emit(kind, given, shape).name)
    return builder.circuit(outputs), inputs


def samples(circuit: Circuit, run: Run) -> Iterator[tuple[Step, Sample]]:
    """What each step took."""
    for step in circuit.steps:
        operands = sum(circuit.elements(n) for n in step.inputs if not circuit.is_public(n))
        figures = run.steps[step.name]
        yield step, Sample(step.elements, operands, figures.bytes, figures.rounds)


def fit(found: list[Sample], table: Unit) -> tuple[Unit, float]:
    """Bytes as a linear function of the sizes that the table's unit depends on."""
    columns = {"result": [s.result for s in found], "operand": [s.operands for s in found]}
    used = [name for name in columns if getattr(table, name)] or ["result"]
    used += ["fixed"] if table.fixed else []
    columns["fixed"] = [1] * len(found)
    matrix = np.array([columns[name] for name in used], dtype=float).T
    bytes_ = np.array([s.bytes for s in found])
    weight = 1 / np.maximum(bytes_, 1)  # relative errors: small calls count as much as large ones
    answer = np.linalg.lstsq(matrix * weight[:, None], bytes_ * weight, rcond=None)[0]
    worst = float(np.abs(matrix @ answer - bytes_).max(initial=0) / max(bytes_.max(), 1))
    unit = Unit(table.kind, min(s.rounds for s in found), **dict(zip(used, answer, strict=True)))
    return unit, worst


def engine(name: str) -> Callable[[Circuit, list[torch.Tensor]], Run]:
    """The engine that runs a protocol."""
    if name == "crypten":
        return functools.partial(crypten.run, timeout=1800)
    return functools.partial(spu.run, protocol=name, timeout=1800)


def _print_points(rows: list[Sample], there: Unit) -> None:
    """Units whose table is a list of measured points: each size beside the table's."""
    for row in rows:
        expected = there.cost(row.result, row.operands)
        print(
            f"{there.kind:12}{row.rounds:8d}{row.bytes:12.0f} bytes of {row.result} elements; "
            f"table {expected.rounds}, {expected.bytes:.0f} ({row.bytes / expected.bytes - 1:+.1%})"
        )


def main() -> None:
    """Measure one protocol and print its units beside the table's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--protocol", choices=("crypten", *spu.PROTOCOLS), default="crypten")
    parser.add_argument("--ops", default="", help="comma-separated; default: all of the table")
    given = parser.parse_args()
    table = protocol(given.protocol).units
    known = tuple(k for k in (*UNARY, "multiply", "scale", "matmul") if k in table)
    kinds = tuple(given.ops.split(",")) if given.ops else known
    circuit, inputs = one_step_each(kinds)
    found: dict[str, list[Sample]] = {kind: [] for kind in kinds}
    for step, sample in samples(circuit, engine(given.protocol)(circuit, inputs)):
        found[step.op].append(sample)
    print(f"{'op':12}{'rounds':>8}{'result':>10}{'operand':>10}{'fixed':>10}{'off':>8}   table")
    for kind, rows in found.items():
        if table[kind].points is not None and kind != "matmul":
            _print_points(rows, table[kind])
            continue
        unit, worst = fit(rows, table[kind])
        figures = (unit.rounds, unit.result, unit.operand, unit.fixed)
        there = table[kind]
        print(
            f"{kind:12}{figures[0]:8d}{figures[1]:10.2f}{figures[2]:10.2f}{figures[3]:10.1f}"
            f"{100 * worst:7.1f}%   {there.rounds}, {there.result}, {there.operand}, {there.fixed}"
        )
        if worst > 0.02:
            print(*(f"    {row}" for row in rows), sep="\n")


if __name__ == "__main__":
    main()
