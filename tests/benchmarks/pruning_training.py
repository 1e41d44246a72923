"""Training around pruning: brief recovery, gradual decay, rounds; each against equal epochs.

    python -m tests.benchmarks.pruning_training [--seeds 0 1 2] [--shares 0.5 0.25]
        [--epochs 3] [--ways TEXT ...] [--json FILE]

The small residual network of `tests.benchmarks.digits` is trained, pruned to a share of its FLOPs
by `taylor2` on nine batches, and then trained for some epochs, each way for as many:

`recovery`: norms, biases and head alone; the same with low-rank adapters;
`all weights`: ordinary fine-tuning;
`gradual`: `gradually` around the same loop, from the dense network, zero after two thirds of it;
`rounds`: `iteratively`, one epoch after each round.

Accuracies are on test images under noise, mean and deviation over the seeds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

import graphopt
from graphopt.passes.prune import gradually, iteratively, recover
from graphopt.training import recalibrate
from tests.benchmarks.digits import BATCH, Data, accuracy, digits, epoch, train, trained
from tests.benchmarks.peer_pruning import counted
from tests.benchmarks.pruning import table

Row = dict[str, Any]
cross_entropy = nn.functional.cross_entropy

_CALIBRATION, _RATE, _RECOVERY_RATE = 9, 1e-3, 1e-2
_SETTINGS: dict[str, Any] = {"time_limit": 10.0, "loss": cross_entropy}


class Task:
    """A trained network, its data, and how long it may be trained after pruning."""

    def __init__(self, seed: int, share: float, epochs: int, net: nn.Module) -> None:
        self.seed, self.share, self.epochs, self.net = seed, share, epochs, net
        self.data, self.test = digits(seed)
        self.batches = list(epoch(self.data, self.generator(100)))[:_CALIBRATION]
        self.inputs = (self.batches[0][0],)
        self.budget = f"flops={share:%}"

    def generator(self, offset: int) -> torch.Generator:
        """Random numbers of order and noise, the same for all ways."""
        return torch.Generator().manual_seed(self.seed + offset)

    @functools.cached_property
    def small(self) -> nn.Module:
        """The network pruned at once, not trained any more."""
        return graphopt.optimize(
            self.net, self.budget, self.inputs, data=self.batches, verify=False, **_SETTINGS
        )

    def training(self) -> list[Data]:
        """All batches of all epochs."""
        generator = self.generator(200)
        return [batch for _ in range(self.epochs) for batch in epoch(self.data, generator)]


def pruned(task: Task) -> nn.Module:
    """No training at all."""
    return task.small


def recalibrated(task: Task) -> nn.Module:
    """Running statistics alone."""
    module = copy.deepcopy(task.small)
    recalibrate(module, task.training(), pairs=True)
    return module


def recovered(task: Task, **options: Any) -> nn.Module:
    """Norms, biases, head."""
    module = copy.deepcopy(task.small)
    recover(module, task.training(), loss=cross_entropy, lr=_RECOVERY_RATE, **options)
    return module


def distilled(task: Task) -> nn.Module:
    """The same, from labels and the dense network."""
    return recovered(task, teacher=task.net)


def fine_tuned(task: Task) -> nn.Module:
    """All weights."""
    module = copy.deepcopy(task.small)
    train(module, task.data, task.epochs, _RATE, task.generator(200))
    return module


def gradual(task: Task, **options: Any) -> nn.Module:
    """Decay while the dense network is trained on."""
    net, batches = copy.deepcopy(task.net), task.training()
    steps = len(batches) * 2 // 3
    optimizer = torch.optim.Adam(net.parameters(), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    net.train()
    settings = {"steps": steps, "periods": 4, "sampling": 3, "time_limit": 10.0, **options}
    with gradually(net, task.budget, task.inputs, **settings) as pruning:
        for images, targets in batches:
            optimizer.zero_grad()
            cross_entropy(net(images), targets).backward()
            optimizer.step()
            schedule.step()
            pruning.step()
    return pruning.module


def in_rounds(task: Task) -> nn.Module:
    """One epoch after each round."""
    generator = task.generator(200)

    def one_epoch(module: nn.Module) -> None:
        train(module, task.data, 1, _RATE, generator)

    return iteratively(
        task.net, task.budget, task.inputs, train=one_epoch, rounds=task.epochs,
        data=task.batches, **_SETTINGS,
    )  # fmt: skip


WAYS: dict[str, Callable[[Task], nn.Module]] = {
    "pruned": pruned,
    "statistics": recalibrated,
    "recovery": recovered,
    "recovery, teacher": distilled,
    "recovery, adapters of rank 4": functools.partial(recovered, adapter_rank=4),
    "all weights": fine_tuned,
    "rounds": in_rounds,
    "gradual": gradual,
    "gradual, hesso": functools.partial(gradual, criterion="hesso"),
    "gradual, hesso, solver": functools.partial(gradual, criterion="hesso", allocation="solver"),
    "gradual, hesso, corrective": functools.partial(
        gradual, criterion="hesso", corrective=True, sampling=2
    ),
    "gradual, corrective": functools.partial(gradual, corrective=True, sampling=2),
}


def compare(seeds: Sequence[int], shares: Sequence[float], epochs: int, ways: Sequence[str]):
    """A row for each share and way."""
    runs: dict[tuple[float, str], list[Row]] = {}
    for seed in seeds:
        net = trained(seed, digits(seed)[0])
        for share in shares:
            task = Task(seed, share, epochs, net)
            dense = {"flops": 1.0, "accuracy": accuracy(net, task.test), "seconds": 0.0}
            runs.setdefault((share, "dense"), []).append(dense)
            for name in ways:
                began = time.perf_counter()
                module = WAYS[name](task)
                row = {
                    "flops": counted(module, task.inputs) / counted(net, task.inputs),
                    "accuracy": accuracy(module, task.test),
                    "seconds": time.perf_counter() - began,
                }
                runs.setdefault((share, name), []).append(row)
                print(f"  seed {seed}, {share:.0%}, {name}: {row}", file=sys.stderr, flush=True)
    rows = []
    for (share, name), each in runs.items():
        row: Row = {"way": name, "asked": share}
        for key in each[0]:
            values = [run[key] for run in each]
            row[key] = statistics.mean(values)
            row[f"{key}_deviation"] = statistics.stdev(values) if len(values) > 1 else 0.0
        rows.append(row)
    return sorted(rows, key=lambda row: -row["asked"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = compare(options.seeds, options.shares, options.epochs, options.ways)
    Console(width=120).print(table(f"{options.epochs} epochs of {BATCH} images a step", rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
