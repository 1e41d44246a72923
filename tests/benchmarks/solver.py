"""The solver on task graphs: overhead, proven bound, gap, and the starts it is held against.

    python -m tests.benchmarks.solver [FILE ...] [--budgets 0.9,0.8] [--seconds 60] [--json FILE]

Without files, task graphs are generated: random layered ones, and training graphs of a chain, a
ResNet, a U-Net and a decoder. TDI is the total duration increase over running every task once;
a budget is a fraction of the peak of the input order.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from graphopt.solvers import Progress, TaskGraph, check, solve
from tests.solvers import graphs

STARTS = ("eviction", "segments", "square root", "min-cut")


def generated() -> Iterator[tuple[str, TaskGraph]]:
    """The task graphs measured when no files are given."""
    for n, seed in ((100, 9), (250, 7), (500, 1), (1000, 2)):
        yield f"layered {n}", graphs.layered(n, seed=seed)
    yield "chain 100", graphs.chain(100)
    yield "ResNet-50", graphs.resnet()
    yield "U-Net", graphs.unet(5)
    yield "decoder, 12 blocks", graphs.transformer(12)
    yield "decoder, 48 blocks", graphs.transformer(48)


def measure(name: str, graph: TaskGraph, fraction: float, seconds: float) -> dict[str, Any]:
    """Solves one task graph under one budget."""
    plain = check(graph, range(len(graph.tasks)))
    budget = math.ceil(round(fraction * plain.peak, 6))
    first: list[float] = []

    def note(progress: Progress) -> None:
        if progress.duration is not None and not first:
            first.append(progress.elapsed)

    found = solve(graph, budget, time_limit=seconds, on_progress=note)
    figures = check(graph, found.sequence)
    if not figures.ok or (figures.peak, figures.duration) != (found.peak, found.duration):
        raise RuntimeError(f"{name}: the checker disagrees with the solver: {figures}")
    starts = {
        start: increase(graph, found.starts[start][1])
        for start in STARTS
        if start in found.starts and found.starts[start][0] <= budget
    }
    return {
        "name": name,
        "tasks": len(graph.tasks),
        "budget": fraction,
        "tdi": increase(graph, found.duration) if found.status != "infeasible" else None,
        "bound": increase(graph, found.lower_bound),
        "gap": found.gap,
        "status": found.status,
        "first": first[0] if first else None,
        "seconds": found.seconds,
        "starts": starts,
        "scope": found.scope,
    }


def increase(graph: TaskGraph, duration: int) -> float:
    """Duration over that of running every task once, in percent."""
    return 100 * (duration / max(1, graph.duration) - 1)


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Prints the rows as a table."""
    table = Table("graph", "tasks", "budget", "TDI %", "bound %", "status", "first s", "s")
    for start in STARTS:
        table.add_column(f"{start} %")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["tasks"]),
            f"{row['budget']:g}",
            _text(row["tdi"], 3),
            _text(row["bound"], 3),
            row["status"],
            _text(row["first"], 2),
            _text(row["seconds"], 1),
            *(_text(row["starts"].get(start), 2) for start in STARTS),
        )
    console.print(table)


def _text(number: float | None, digits: int) -> str:
    return "-" if number is None else f"{number:.{digits}f}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--budgets", default="0.9,0.8", help="fractions of the plain peak")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each budget")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    fractions = [float(text) for text in options.budgets.split(",")]
    loaded = [(path.stem, TaskGraph.from_json(path)) for path in options.files]
    rows = []
    for name, graph in loaded or generated():
        for fraction in fractions:
            rows.append(measure(name, graph, fraction, options.seconds))
            print(f"{name} at {fraction:g}: done", file=sys.stderr)
    show(rows, Console(width=160))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
