"""Bytes saved for the backward pass: eager against `share`, on full training and LoRA.

    python -m tests.benchmarks.sharing [--models vit384 bert384 ...] [--repeats 9]

The models are those of `tests.benchmarks.models`.

Bytes are the allocator's, live after forward and loss above the start of a warmed-up step. With
`--repeats`, the time of a step is the median of paired runs, as a ratio to eager's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import graphopt
from graphopt.measure import measure_step
from tests.benchmarks.models import TRANSFORMERS

Inputs = dict[str, Any]

# What `share` has to save, as a share of eager's bytes (exact rewrites alone).
BARS = {
    "vit384": 0.33, "vit384+all": 0.33, "bert384": 0.31, "llama256": 0.378, "llama256+qv": 0.18
}  # fmt: skip


def step_time(module: nn.Module, inputs: Inputs) -> float:
    """Seconds of one training step."""
    began = time.perf_counter()
    module(**inputs).loss.backward()
    return time.perf_counter() - began


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Bytes, FLOPs, gradient error and time of one model."""
    model, _, inputs = TRANSFORMERS[name]()
    shared = graphopt.optimize(model, passes="canonicalize,share", example_kwargs=inputs)
    before, after = measure_step(model, (), inputs), measure_step(shared, (), inputs)
    ratios = []
    for _ in range(repeats):
        eager = step_time(model, inputs)
        ratios.append(step_time(shared, inputs) / eager)
    return {
        "model": name,
        "before": before.saved,
        "after": after.saved,
        "less": 1 - after.saved / before.saved,
        "bar": BARS.get(name),
        "peak": after.peak / before.peak,
        "error": gradient_error(shared, model, inputs),
        "time": statistics.median(ratios) if ratios else None,
    }


def gradient_error(module: nn.Module, source: nn.Module, inputs: Inputs) -> float:
    """Distance of all gradients together, relative to the source's, with the same seed."""
    both = []
    for each in (module, source):
        each.zero_grad()
        torch.manual_seed(0)
        each(**inputs).loss.backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        both.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
    return float((both[0] - both[1]).norm() / both[1].norm())


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table."""
    found = Table(title="saved for backward")
    for column in ("model", "eager", "share", "less", "bar", "peak", "gradient error", "time"):
        found.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        found.add_row(
            row["model"],
            f"{row['before']:,}",
            f"{row['after']:,}",
            f"{100 * row['less']:.1f} %",
            "" if row["bar"] is None else f"{100 * row['bar']:.1f} %",
            f"{row['peak']:.3f}",
            f"{row['error']:.1e}",
            "" if row["time"] is None else f"{row['time']:.3f}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(TRANSFORMERS), choices=TRANSFORMERS)
    parser.add_argument("--repeats", type=int, default=0, help="timed pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        print(f"{name} ...", file=sys.stderr)
        rows.append(compare(name, options.repeats))
    Console(width=110).print(table(rows))
    return int(any(row["bar"] is not None and row["less"] < row["bar"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
