"""Pruning: accuracy and time at a budget of FLOPs, against other ways and the dense network.

    python -m tests.benchmarks.pruning [--sections digits efficientnet speed analysis]
        [--seeds 0 1 2] [--repeats 15] [--json FILE]

`digits`: a small residual network on scikit-learn's digits under noise, at half of its FLOPs,
without fine-tuning and after one epoch, mean and deviation over the seeds. Torch-Pruning takes part
where it is installed (`pip install --no-deps torch-pruning==1.6.1`).
`efficientnet`: how often EfficientNet-Lite0 with its trained weights says on crops of photos what
it said before, at several budgets, without fine-tuning; other crops calibrate it.
`speed`: a ResNet-18 and a BERT of 4 layers at half of their FLOPs against the dense ones.
`analysis`: seconds to find what of a model can be pruned.

The status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tests.benchmarks import pruning_accuracy, pruning_speed

SECTIONS = ("digits", "efficientnet", "speed", "analysis")
_SHARES = (0.9, 0.75, 0.5)

Rows = list[dict[str, Any]]


def table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table; a column stands beside its deviation."""
    columns = [key for key in rows[0] if not key.endswith("_deviation")]
    found = Table(title=title)
    for column in columns:
        justify = "left" if isinstance(rows[0][column], str) else "right"
        found.add_column(column.replace("_", " "), justify=justify)
    for row in rows:
        found.add_row(*(_cell(row, column) for column in columns))
    return found


def _cell(row: Mapping[str, Any], column: str) -> str:
    value, deviation = row.get(column, ""), row.get(f"{column}_deviation")
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3f}" if deviation is None else f"{value:.3f} ± {deviation:.3f}"


def run(section: str, options: argparse.Namespace) -> tuple[Rows, list[str]]:
    """The rows of a section, and the bars that they miss."""
    if section == "digits":
        rows = pruning_accuracy.compare_digits(options.seeds)
        return rows, pruning_accuracy.missed_by_digits(rows)
    if section == "efficientnet":
        return pruning_accuracy.compare_efficientnet(_SHARES), []
    if section == "speed":
        rows = pruning_speed.compare_speed(options.repeats)
        return rows, pruning_speed.missed_by_speed(rows)
    rows = pruning_speed.time_analysis()
    return rows, pruning_speed.missed_by_analysis(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sections", nargs="+", default=list(SECTIONS), choices=SECTIONS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=15, help="timed pairs")
    parser.add_argument("--threads", type=int, default=1, help="but for speed, which tries 1 and 2")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    found: dict[str, Rows] = {}
    missed: list[str] = []
    for section in options.sections:
        print(f"{section} ...", file=sys.stderr)
        torch.set_num_threads(options.threads)
        found[section], bars = run(section, options)
        missed += bars
        Console(width=120).print(table(section, found[section]))
    for bar in missed:
        print(f"missed: {bar}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
