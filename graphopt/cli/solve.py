"""`graphopt solve`: a rematerialization problem from a file."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from graphopt.cli.app import common
from graphopt.cli.console import message, progress, show, show_json
from graphopt.errors import (
    EXIT_INTERRUPTED,
    EXIT_OK,
    BudgetInfeasible,
    FileFormatError,
    first_line,
)

_KEYS = ("sequence", "duration", "peak", "lower_bound", "gap", "status", "seconds", "order")
_EXTRAS = ("budget", "scope", "starts", "min_peak", "min_peak_bound")


@click.command()
@click.argument("file")
@click.option("--budget", "-b", required=True, metavar="AMOUNT", help="Bytes, 2GiB, or 80%.")
@click.option(
    "--order",
    type=click.Choice(["input", "free"]),
    default="input",
    show_default=True,
    help="Whether first executions follow the file's order.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
)
@click.option("--step-limit", type=click.IntRange(min=1), help="Bounds the work, not the time.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", "-o", metavar="FILE", help="Write the JSON there.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
@common
def solve(
    file: str,
    budget: str,
    order: str,
    time_limit: float,
    step_limit: int | None,
    seed: int,
    output: str | None,
    as_json: bool,
    quiet: bool,
) -> int:
    """Find the shortest execution sequence of the task graph FILE under a peak-memory budget.

    A percentage is a share of the peak of the input order, nothing recomputed.  With `--order
    input` figures and bounds refer to the order of the file; with `free` the bound holds for every
    order.
    """
    from graphopt import solvers
    from graphopt.files import ensure_writable, write_text

    if output is not None:
        ensure_writable(output)
    amount = _amount(budget)
    graph = _read(file)
    plain = solvers.check(graph, range(len(graph.tasks)))
    allowed = amount.bytes_of(plain.peak)
    with progress(quiet) as told, _noting_interrupts() as interrupted:
        solution = solvers.solve(
            graph,
            allowed,
            order=order,
            time_limit=time_limit,
            step_limit=step_limit,
            seed=seed,
            on_progress=lambda p: told(_progress_text(p), min(1.0, p.elapsed / time_limit)),
        )
    data = _data(solution, graph)
    if solution.status == "infeasible":
        if as_json:
            show_json(data)
        _refuse(solution, interrupted)
    if output is not None:
        write_text(output, json.dumps(data) + "\n")
        message(f"wrote {output}")
    if as_json:
        show_json(data)
    elif output is None:
        show(_table(solution, plain.duration))
    if interrupted:
        message("interrupted: this is the best plan so far")
    return EXIT_INTERRUPTED if interrupted else EXIT_OK


@contextlib.contextmanager
def _noting_interrupts() -> Iterator[list[int]]:
    """Yields a list that fills on Ctrl-C: the solver catches the interrupt and keeps its best."""
    seen: list[int] = []

    def handler(number: int, frame: Any) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def _amount(text: str) -> Any:
    from graphopt.budget import read_field

    return read_field("memory", text.removeprefix("memory="))


def _read(file: str) -> Any:
    from graphopt import solvers

    path = Path(file)
    if not path.is_file():
        raise FileFormatError(f"no file {file}")
    try:
        return solvers.TaskGraph.from_json(path)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FileFormatError(
            f"{file} is no task graph: {first_line(error)}",
            hint='{"nodes": [{"id", "duration", "bytes"}], "edges": [[from, to]], "order": [id]}',
        ) from error


def _progress_text(state: Any) -> str:
    if state.duration is None or not math.isfinite(state.gap):
        return f"{state.phase}: no plan within the budget yet"
    return f"{state.phase}: duration {state.duration:,}, gap {100 * state.gap:.2f} %"


def _data(solution: Any, graph: Any) -> dict[str, Any]:
    """The JSON form, the promised keys first."""
    full = solution.to_dict(graph)
    return {key: full[key] for key in (*_KEYS, *_EXTRAS) if key in full}


def _refuse(solution: Any, interrupted: list[int]) -> None:
    if interrupted:
        raise KeyboardInterrupt
    raise BudgetInfeasible(
        f"no plan keeps {solution.budget:,} bytes",
        field="budget",
        requested=solution.budget,
        smallest=solution.min_peak,
        proven=solution.proven_infeasible,
        bound=solution.min_peak_bound,
    )


def _table(solution: Any, plain: int) -> Any:
    from rich.table import Table

    from graphopt.plain import human_bytes

    overhead = (solution.duration - plain) / plain if plain else 0.0
    bound = (solution.lower_bound - plain) / plain if plain else 0.0
    table = Table("", "plan")
    table.add_row("status", f"{solution.status} ({solution.scope})")
    table.add_row("peak", f"{human_bytes(solution.peak)} of {human_bytes(solution.budget)}")
    table.add_row("duration", f"{solution.duration:,}")
    table.add_row("overhead", f"{100 * overhead:.3f} %")
    table.add_row("proven at least", f"{max(0.0, 100 * bound):.3f} %")
    table.add_row("executions", f"{len(solution.sequence):,}")
    table.add_row("seconds", f"{solution.seconds:.1f}")
    return table
