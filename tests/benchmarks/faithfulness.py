"""How faithful attributions are to the model, and whether they find what is known to matter.

    python -m tests.benchmarks.faithfulness [--sections glyphs tokens minilm efficientnet]
        [--methods random "gradient x input" ...] [-o FILE.json]

ABPC is the area between the perturbation curves of the target's logit, least minus most relevant
first, with its standard error over the samples; all methods see the same samples, units and
baselines. Where the truth is known: the share of the highest positions that lie in it (ten pixels,
two tokens), and the share of positive relevance. LOO is the rank correlation with leave-one-out.
"Untrained" is the rank correlation with the method's own relevance of the same network with random
parameters: one that looks at the network has it near zero.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
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
    PerturbationCurves,
    estimate,
    leave_one_out,
    localisation,
    perturbation_curves,
    randomisation_check,
    spearman,
)
from graphopt.passes.relevance.judging.units import units_of
from tests.benchmarks.attributions import METHODS, Attribution
from tests.benchmarks.faithful_tasks import TASKS, Task
from tests.benchmarks.peer_attributions import PEERS


@dataclass(frozen=True, eq=False)
class Row:
    """What was found about a method.

    Attributes:
        curves: Its perturbation curves.
        located: Against the known truth, or None.
        left_out: Rank correlation with leave-one-out.
        untrained: Rank correlation with the relevance of random parameters.
        seconds: That the attribution took for all samples.
    """

    curves: PerturbationCurves
    located: Localisation | None
    left_out: Estimate
    untrained: Estimate
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "curves": self.curves.to_dict(),
            "localisation": self.located and self.located.to_dict(),
            "leave_one_out": self.left_out.to_dict(),
            "untrained": self.untrained.to_dict(),
            "seconds": self.seconds,
        }


def by_unit(task: Task, values: Tensor) -> Tensor:
    """A relevance as ``(samples, units)``."""
    return units_of(task.inputs[0], task.removal.units).gather(values)


def located(task: Task, relevance: Tensor) -> Localisation | None:
    """Compare with the truth position by position; a unit's value is that of all its positions."""
    if task.truth is None:
        return None
    if relevance.shape == task.truth.shape:
        places = relevance
    elif relevance.shape == task.inputs[0].shape:
        places = relevance.sum(1)
    else:
        places = units_of(task.inputs[0], task.removal.units).spread(relevance)[:, 0]
    return localisation(places, task.truth, k=task.hits, allowed=task.removal.allowed)


def judged(task: Task, method: Attribution, erased: Tensor) -> Row:
    """Everything about one method on one task; ``erased`` are the leave-one-out scores."""
    start = time.perf_counter()
    relevance = method(task)
    seconds = time.perf_counter() - start
    curves = perturbation_curves(
        task.model, task.inputs, relevance, targets=task.targets, removal=task.removal,
        steps=task.steps,
    )  # fmt: skip

    def again(model: nn.Module, inputs: tuple[Any, ...], targets: Tensor) -> Tensor:
        return by_unit(task, method(dataclasses.replace(task, model=model)))

    untrained = randomisation_check(
        task.model, task.inputs, again, targets=task.targets, layers=[""]
    ).final
    allowed = task.removal.allowed
    allowed = None if allowed is None else allowed > 0
    correlation = estimate(spearman(by_unit(task, relevance), erased, allowed))
    return Row(curves, located(task, relevance), correlation, untrained, seconds)


def table(task: Task, rows: dict[str, Row]) -> Table:
    """The methods, the most faithful first."""
    accuracy = "" if task.accuracy is None else f", accuracy {task.accuracy:.1%}"
    title = f"{task.name}: {len(task.targets)} samples{accuracy}"
    found = Table(title=title)
    found.add_column("method")
    headers = ("ABPC", "MoRF", "LeRF", "hits", "mass", "LOO", "untrained", "seconds")
    for header in headers:
        found.add_column(header, justify="right")
    for name, row in sorted(rows.items(), key=lambda item: -item[1].curves.abpc.mean):
        abpc = row.curves.abpc
        hits = "-" if row.located is None else f"{row.located.hit_rate.mean:.1%}"
        mass = "-" if row.located is None else f"{row.located.mass_accuracy.mean:.1%}"
        found.add_row(
            name, f"{abpc.mean:.3f} ± {abpc.standard_error:.3f}",
            f"{row.curves.auc_morf.mean:.3f}", f"{row.curves.auc_lerf.mean:.3f}", hits, mass,
            f"{row.left_out.mean:.2f}", f"{row.untrained.mean:.2f}", f"{row.seconds:.1f}",
        )  # fmt: skip
    if any(row.located for row in rows.values()):
        chance = next(row.located.chance for row in rows.values() if row.located)
        found.caption = f"by chance: {chance:.1%} of hits and of mass"
    return found


def against_peers(rows: dict[str, Row]) -> tuple[str, str, Estimate] | None:
    """Our best composite, the best peer, and how much larger our ABPC is, sample by sample.

    The difference has its standard error over the samples, which both have in common.
    """

    def best(names: set[str]) -> str | None:
        return max(names & set(rows), key=lambda n: rows[n].curves.abpc.mean, default=None)

    ours, peer = best({name for name in rows if name.startswith("ours: ")}), best(set(PEERS))
    if ours is None or peer is None:
        return None
    return ours, peer, estimate(rows[ours].curves.areas - rows[peer].curves.areas)


def measure(task: Task, methods: Sequence[str]) -> dict[str, Row]:
    """All methods on one task; those that don't support its model are named and left out."""
    erased = leave_one_out(task.model, task.inputs, targets=task.targets, removal=task.removal)
    rows: dict[str, Row] = {}
    for name in methods:
        try:
            rows[name] = judged(task, METHODS[name], erased)
        except UnsupportedError as error:
            print(f"{task.name}: {name} left out: {first_line(error)}", file=sys.stderr)
            continue
        print(f"{task.name}: {name}: {rows[name].curves.abpc}", file=sys.stderr, flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table for each section; 1 if random isn't at zero, or we are behind a peer."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--samples", type=int, help="the first of each section (default: all)")
    parser.add_argument("--steps", type=int, help="of the curves (default: the section's own)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("-o", "--output", type=Path, help="write all figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console = Console(width=120)
    figures: dict[str, Any] = {}
    fair = True
    for section in options.sections:
        start = time.perf_counter()
        task = TASKS[section]().shortened(options.samples, options.steps)
        print(f"{section}: ready in {time.perf_counter() - start:.0f} s", file=sys.stderr)
        rows = measure(task, options.methods)
        console.print(table(task, rows))
        if found := against_peers(rows):
            ours, peer, difference = found
            console.print(f"{ours} against {peer}: {difference}")
            fair = fair and difference.mean >= -difference.standard_error
        figures[section] = {name: row.to_dict() for name, row in rows.items()}
        if "random" in rows:
            chance = rows["random"].curves.abpc
            fair = fair and abs(chance.mean) <= 2 * chance.standard_error
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return int(not fair)


if __name__ == "__main__":
    sys.exit(main())
