"""Allocations of widths: value kept by each rule, the solver's, its proven bound and its gap.

    python -m tests.benchmarks.widths [--only TEXT] [--seconds 30] [--json FILE]

Instances are generated: layer shapes of known networks, gains log-normal. Values are in percent
of the value of the full widths; a budget of 0.5 limits FLOPs (or both FLOPs and parameters) to
half of those of the full widths. "0.5 % at s" is when the gap fell to that.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    Rule,
    Term,
    WidthProblem,
    allocate,
    by_rule,
)

_CLOSE = 5e-3


@dataclass
class Builder:
    """Dimensions and layers of a network, added one by one.

    Attributes:
        seed: of the gains.
        spread: standard deviation of the logarithm of the gains within a dimension.
        step: of all widths.
    """

    seed: int = 0
    spread: float = 1.0
    step: int = 1
    dimensions: list[Dimension] = field(default_factory=list)
    flops: list[Term] = field(default_factory=list)
    params: list[Term] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Seeds the gains."""
        self.random = random.Random(self.seed)

    def width(self, full: int, name: str) -> int:
        """A prunable dimension; dimensions differ in what they are worth."""
        level = self.random.gauss(0.0, 0.7)
        gains = sorted(self.random.lognormvariate(level, self.spread) for _ in range(full))
        self.dimensions.append(Dimension(name, tuple(reversed(gains)), step=self.step))
        return len(self.dimensions) - 1

    def layer(self, weights: float, positions: float, *widths: int) -> None:
        """A layer with `weights` times the product of the widths, at so many positions."""
        powers = tuple(sorted((d, widths.count(d)) for d in set(widths)))
        self.params.append(Term(weights, powers))
        self.flops.append(Term(2 * weights * positions, powers))

    def problem(self, budget: float, params: bool = False) -> WidthProblem:
        """Limits on FLOPs and perhaps on parameters, a share of those of the full widths."""
        named = [("flops", self.flops), ("params", self.params)][: 1 + params]
        full = [len(d.gains) for d in self.dimensions]
        costs = []
        for name, terms in named:
            total = 0.0
            for term in terms:
                product = term.coefficient
                for index, exponent in term.powers:
                    product *= full[index] ** exponent
                total += product
            costs.append(Cost(name, tuple(terms), budget * total))
        return WidthProblem(tuple(self.dimensions), tuple(costs))


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3), **how: float) -> Builder:
    """Bottleneck blocks in four stages with shared residual widths, 224 pixels."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    stem = before = net.width(64, "stem")
    net.layer(3 * 49, 112**2, stem)
    for stage, (count, inner) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True)):
        positions = (56 >> stage) ** 2
        hub = net.width(4 * inner, f"residual {stage}")
        net.layer(1, positions, before, hub)
        for block in range(count):
            one = net.width(inner, f"{stage}.{block}.1")
            two = net.width(inner, f"{stage}.{block}.2")
            net.layer(1, positions, before if block == 0 else hub, one)
            net.layer(9, positions, one, two)
            net.layer(1, positions, two, hub)
        before = hub
    net.layer(1000, 1, before)
    return net


def resnet18(**how: float) -> Builder:
    """Basic blocks in four stages with shared residual widths, 224 pixels."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    before = net.width(64, "residual 0")
    net.layer(3 * 49, 112**2, before)
    for stage in range(4):
        positions = (56 >> stage) ** 2
        hub = net.width(64 << stage, f"residual {stage}") if stage else before
        for block in range(2):
            inner = net.width(64 << stage, f"{stage}.{block}")
            net.layer(9, positions, before if block == 0 else hub, inner)
            net.layer(9, positions, inner, hub)
        before = hub
    net.layer(1000, 1, before)
    return net


def vgg16(**how: float) -> Builder:
    """A chain of convolutions without any residual stream, 224 pixels."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    before, size = None, 224
    for full, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for i in range(count):
            here = net.width(full, f"{size}.{i}")
            if before is None:
                net.layer(27, size**2, here)
            else:
                net.layer(9, size**2, before, here)
            before = here
        size //= 2
    one, two = net.width(4096, "fc1"), net.width(4096, "fc2")
    assert before is not None
    net.layer(49, 1, before, one)
    net.layer(1, 1, one, two)
    net.layer(1000, 1, two)
    return net


def transformer(layers: int = 12, model: int = 768, length: int = 512, **how: float) -> Builder:
    """An encoder: one residual stream, heads, width of a head, and inner width for every layer."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    hub = net.width(model, "residual")
    net.step = 1
    for layer in range(layers):
        heads = net.width(model // 64, f"{layer}.heads")
        size = net.width(64, f"{layer}.head")
        inner = net.width(4 * model, f"{layer}.inner")
        net.layer(4, length, hub, heads, size)
        net.flops.append(Term(4 * length**2, ((heads, 1), (size, 1))))
        net.layer(2, length, hub, inner)
    return net


def mobilenet(**how: float) -> Builder:
    """Inverted residuals with depthwise convolutions and squeeze-and-excite, 224 pixels."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    before, size = net.width(32, "stem"), 112
    net.layer(27, size**2, before)
    stages = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
    for stage, (full, count, stride) in enumerate(stages):
        hub = net.width(full, f"residual {stage}")
        for block in range(count):
            old = size
            size = size // stride if block == 0 else size
            inner = net.width(6 * full, f"{stage}.{block}.inner")
            squeeze = net.width(full // 4, f"{stage}.{block}.squeeze")
            net.layer(1, old**2, before if block == 0 else hub, inner)
            net.layer(9, size**2, inner)
            net.layer(2, 1, inner, squeeze)
            net.layer(1, size**2, inner, hub)
        before = hub
    net.layer(1000, 1, before)
    return net


def densenet(blocks: tuple[int, ...] = (6, 12, 8), growth: int = 32, **how: float) -> Builder:
    """Dense blocks: every layer reads all layers before it."""
    net = Builder(**how)  # pyright: ignore[reportArgumentType]
    size, before = 56, [net.width(64, "stem")]
    net.layer(147, 112**2, before[0])
    for block, count in enumerate(blocks):
        for layer in range(count):
            here = net.width(growth, f"{block}.{layer}")
            for earlier in before:
                net.layer(9, size**2, earlier, here)
            before.append(here)
        size //= 2
        narrow = net.width(growth * 4, f"{block}.transition")
        for earlier in before:
            net.layer(1, size**2, earlier, narrow)
        before = [narrow]
    net.layer(1000, 1, before[0])
    return net


def generated() -> Iterator[tuple[str, WidthProblem]]:
    """The instances measured."""
    for budget in (0.75, 0.5, 0.25):
        yield f"ResNet-50 at {budget:g}", resnet50().problem(budget)
    yield "ResNet-50, params too", resnet50().problem(0.5, params=True)
    yield "ResNet-50, steps of 8", resnet50(step=8).problem(0.5)
    yield "ResNet-50, even gains", resnet50(spread=0.1).problem(0.5)
    yield "ResNet-50, 48 inner", resnet50((4, 6, 9, 5), seed=1).problem(0.5)
    yield "ResNet-18", resnet18().problem(0.5)
    yield "VGG-16, params too", vgg16().problem(0.5, params=True)
    yield "encoder, 12 layers", transformer().problem(0.5)
    yield "encoder, params too", transformer(24).problem(0.5, params=True)
    yield "MobileNet", mobilenet().problem(0.5)
    yield "ResNet-50, equal gains", resnet50(spread=0.0).problem(0.5)
    yield "ResNet-18, equal gains", resnet18(spread=0.0).problem(0.3)
    yield "DenseNet, 26 layers", densenet().problem(0.5)
    yield "DenseNet, 58 layers", densenet((6, 12, 24, 16)).problem(0.5)


def measure(problem: WidthProblem, seconds: float) -> tuple[dict[str, Allocation], float | None]:
    """Every rule and the solver on one instance; seconds until the gap was 0.5 %."""
    found = {str(rule): by_rule(problem, rule) for rule in get_args(Rule)}
    close: list[float] = []

    def note(allocation: Allocation) -> None:
        if allocation.gap <= _CLOSE and not close:
            close.append(allocation.seconds)

    found["allocate"] = allocate(problem, time_limit=seconds, progress=note)
    return found, close[0] if close else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="instances with this in their name")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each instance")
    parser.add_argument("--json", type=Path, help="also write the allocations there")
    options = parser.parse_args()
    table = Table("instance", "dims", "greedy %", "uniform %", "threshold %", "allocate %")
    for column in ("bound %", "gap %", "status", "0.5 % at s", "s"):
        table.add_column(column)
    results = {}
    for name, problem in generated():
        if options.only not in name:
            continue
        found, close = measure(problem, options.seconds)
        best, full = found["allocate"], sum(sum(d.gains) for d in problem.dimensions)
        values = [f"{100 * allocation.value / full:.3f}" for allocation in found.values()]
        table.add_row(
            name, str(len(problem.dimensions)), *values, f"{100 * best.bound / full:.3f}",
            f"{100 * best.gap:.4f}", best.status,
            "-" if close is None else f"{close:.1f}", f"{best.seconds:.1f}",
        )  # fmt: skip
        results[name] = {rule: asdict(allocation) for rule, allocation in found.items()}
        print(f"{name}: done", file=sys.stderr)
    Console(width=150).print(table)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
