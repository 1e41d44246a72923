"""How faithful attributions are to the model, and whether they find what is known to matter.

    python -m tests.benchmarks.faithfulness [--sections glyphs tokens minilm efficientnet]
        [--methods random "gradient x input" ...] [--samples N] [--steps K]
        [--without leave-one-out untrained] [--with FILE.json ...] [-o FILE.json]

ABPC is the area between the perturbation curves of the target's logit, least minus most relevant
first, with its standard error over the samples; all methods see the same samples, units and
baselines. "To the peer" is how much more it is than that of the best peer, or where there is none
than that of our best composite, sample by sample. Where the truth is known: the share of the
highest positions that lie in it (ten pixels, two tokens), and the share of positive relevance. LOO
is the rank correlation with leave-one-out. "Untrained" is the rank correlation with the method's
own relevance of the same network with random parameters: one that looks at the network has it near
zero.

Bars: our composite of the largest ABPC has at least the best peer's, and finds as much of the known
truth as the peer that finds most of it, each within a standard error of the difference; an order by
chance has an ABPC of zero within two.

A section may be measured a few methods at a time: what `--with` names was measured on the same
samples by other calls, and isn't measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from graphopt.errors import UnsupportedError, first_line
from graphopt.passes.relevance.judging import (
    Estimate,
    Localisation,
    estimate,
    leave_one_out,
    localisation,
    perturbation_curves,
    randomisation_check,
    spearman,
)
from graphopt.passes.relevance.judging.units import units_of
from tests.benchmarks.attributions import METHODS, Attribution
from tests.benchmarks.faithful_bars import against_peers, missed, reference
from tests.benchmarks.faithful_rows import Row, read, write
from tests.benchmarks.faithful_tasks import TASKS, Task
from tests.benchmarks.remembered import Remembered

LEFT_OUT, UNTRAINED = "leave-one-out", "untrained"


@dataclass(frozen=True, eq=False)
class Yardsticks:
    """What relevances of a task are compared with besides the truth.

    Attributes:
        erased: The leave-one-out scores, ``(samples, units)``, or None.
        untrained: The task of the same network with random parameters, or None.
    """

    erased: Tensor | None
    untrained: Task | None


def yardsticks(task: Task, without: Sequence[str] = ()) -> Yardsticks:
    """Run leave-one-out, and randomise the network, once for all methods."""
    erased = untrained = None
    if LEFT_OUT not in without:
        erased = leave_one_out(
            Remembered(task.model), task.inputs, targets=task.targets, removal=task.removal
        )
    if UNTRAINED not in without:
        untrained = dataclasses.replace(task, model=randomised(task))
    return Yardsticks(erased, untrained)


def randomised(task: Task) -> nn.Module:
    """The network with random parameters, as `randomisation_check` draws them."""
    shown: list[nn.Module] = []

    def nothing(model: nn.Module, inputs: tuple[Any, ...], targets: Tensor) -> Tensor:
        shown.append(model)
        return torch.zeros(len(targets), 1)

    randomisation_check(task.model, task.inputs, nothing, targets=task.targets, layers=[""])
    return shown[-1]


def by_unit(task: Task, values: Tensor) -> Tensor:
    """A relevance as ``(samples, units)``."""
    return units_of(task.inputs[0], task.removal.units).gather(values)


def places_of(task: Task, relevance: Tensor) -> Tensor:
    """A relevance position by position; a unit's value is that of all its positions."""
    assert task.truth is not None
    if relevance.shape == task.truth.shape:
        return relevance
    if relevance.shape == task.inputs[0].shape:
        return relevance.sum(1)
    return units_of(task.inputs[0], task.removal.units).spread(relevance)[:, 0]


def located(task: Task, relevance: Tensor) -> tuple[Localisation, Tensor] | tuple[None, None]:
    """Compare with the truth: over all samples, and the hit rate of each."""
    if task.truth is None:
        return None, None
    places, allowed = places_of(task, relevance), task.removal.allowed
    found = localisation(places, task.truth, k=task.hits, allowed=allowed)
    hits = [
        localisation(
            places[row, None], task.truth[row, None], k=task.hits,
            allowed=None if allowed is None else allowed[row, None],
        ).hit_rate.mean
        for row in range(len(places))
    ]  # fmt: skip
    return found, torch.tensor(hits, dtype=torch.float64)


def judged(task: Task, method: Attribution, beside: Yardsticks) -> Row:
    """Everything about one method on one task."""
    start = time.perf_counter()
    relevance = method(task)
    seconds = time.perf_counter() - start
    curves = perturbation_curves(
        Remembered(task.model), task.inputs, relevance, targets=task.targets,
        removal=task.removal, steps=task.steps,
    )  # fmt: skip
    values = by_unit(task, relevance)
    erased = untrained = None
    if beside.erased is not None:
        allowed = task.removal.allowed
        allowed = None if allowed is None else allowed > 0
        erased = spearman(values, beside.erased, allowed)
    if beside.untrained is not None:
        untrained = spearman(values, by_unit(task, method(beside.untrained)))
    return Row(curves, seconds, *located(task, relevance), erased, untrained)


def table(task: Task, rows: dict[str, Row]) -> Table:
    """The methods, the most faithful first."""
    accuracy = "" if task.accuracy is None else f", accuracy {task.accuracy:.1%}"
    title = f"{task.name}: {len(task.targets)} samples{accuracy}"
    found = Table(title=title)
    found.add_column("method")
    beside = rows.get(reference(rows) or "")
    headers = (
        "ABPC", "to the peer", "MoRF", "LeRF", "hits", "mass", "LOO", "untrained", "seconds",
    )  # fmt: skip
    for header in headers:
        found.add_column(header, justify="right")
    for name, row in sorted(rows.items(), key=lambda item: -item[1].curves.abpc.mean):
        found.add_row(name, *_cells(row, beside))
    if any(row.located for row in rows.values()):
        chance = next(row.located.chance for row in rows.values() if row.located)
        found.caption = f"by chance: {chance:.1%} of hits and of mass"
    return found


def _cells(row: Row, beside: Row | None) -> list[str]:
    more = None if beside is None else estimate(row.curves.areas - beside.curves.areas)
    left_out = None if row.left_out is None else estimate(row.left_out)
    untrained = None if row.untrained is None else estimate(row.untrained)
    return [
        _with_error(row.curves.abpc),
        "-" if more is None or row is beside else _with_error(more, "+"),
        f"{row.curves.auc_morf.mean:.3f}",
        f"{row.curves.auc_lerf.mean:.3f}",
        "-" if row.located is None else f"{row.located.hit_rate.mean:.1%}",
        "-" if row.located is None else f"{row.located.mass_accuracy.mean:.1%}",
        "-" if left_out is None else _with_error(left_out),
        "-" if untrained is None else f"{untrained.mean:.2f}",
        f"{row.seconds:.1f}",
    ]


def _with_error(value: Estimate, sign: str = "") -> str:
    return f"{value.mean:{sign}.3f} ± {value.standard_error:.3f}"


def measure(
    task: Task,
    methods: Sequence[str],
    without: Sequence[str] = (),
    done: Callable[[str, Row], None] = lambda name, row: None,
) -> dict[str, Row]:
    """All methods on one task; those that don't support its model are named and left out.

    Args:
        task: What they are judged on.
        methods: Their names.
        without: Columns that are left out.
        done: Called after each method.
    """
    if not methods:
        return {}
    beside = yardsticks(task, without)
    rows: dict[str, Row] = {}
    for name in methods:
        try:
            rows[name] = judged(task, METHODS[name], beside)
        except UnsupportedError as error:
            print(f"{task.name}: {name} left out: {first_line(error)}", file=sys.stderr)
            continue
        print(f"{task.name}: {name}: {rows[name].curves.abpc}", file=sys.stderr, flush=True)
        done(name, rows[name])
    return rows


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, help="the first of each section (default: all)")
    parser.add_argument("--steps", type=int, help="of the curves (default: the section's own)")
    parser.add_argument(
        "--without", nargs="+", default=[], choices=(LEFT_OUT, UNTRAINED), metavar="COLUMN",
        help="leave-one-out, untrained: columns to leave out, on which no bar depends",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--with", nargs="+", default=[], type=Path, dest="known", metavar="FILE.json",
        help="what was measured before, on the same samples",
    )  # fmt: skip
    parser.add_argument("-o", "--output", type=Path, help="write all figures as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each section and which bars are missed; 1 if any is."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=130)
    behind: list[str] = []
    found: dict[str, tuple[Task, dict[str, Row]]] = {}

    def keep(section: str, name: str, row: Row) -> None:
        found[section][1][name] = row
        if options.output:
            write(options.output, found)

    for section in options.sections:
        start = time.perf_counter()
        task = TASKS[section]().shortened(options.samples, options.steps)
        rows = {name: row for path in options.known for name, row in read(path, task).items()}
        found[section] = task, rows
        print(f"{section}: ready in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        left = [name for name in options.methods if name not in rows]
        measure(task, left, options.without, functools.partial(keep, section))
        if options.output:
            write(options.output, found)
        console.print(table(task, rows))
        for what, compared in against_peers(rows).items():
            console.print(f"{what} of {compared}")
        behind += [f"{section}: {text}" for text in missed(rows)]
    console.print("\n".join(f"missed: {text}" for text in behind) or "all bars are met")
    return int(bool(behind))


if __name__ == "__main__":
    sys.exit(main())
