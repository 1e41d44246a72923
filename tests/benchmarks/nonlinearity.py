"""Selections of non-linearities: damage by each rule, the solver's, its proven bound and its gap.

    python -m tests.benchmarks.nonlinearity [--only TEXT] [--seconds 20]

Instances are generated: sites of known networks at the granularity of elements or channels,
damages log-normal, one level for every site and every channel; prices per element in bytes and per
site in rounds times the network's delay. Damages are in percent of that of replacing everything by
the least damaging option. "greedy s" and "0.5 % at s" are seconds: of `by_greedy`, and until the
gap of `select` fell to that, the preparation of the data included.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from rich.table import Table

from graphopt.solvers.nonlinearity import (
    Edge,
    NonlinearityProblem,
    Option,
    Price,
    Selection,
    Site,
    by_greedy,
    by_order,
    by_random,
    check,
    select,
)

_CLOSE = 5e-3
# Of CrypTen's measured bytes and rounds; a picosecond is the unit.
_BYTE = {"lan": 2_667, "wan": 40_000}  # 3 Gbit/s, 200 Mbit/s
_ROUND = {"lan": 800_000_000, "wan": 40_000_000_000}  # .8 ms, 40 ms


@dataclass(frozen=True)
class Way:
    """A replacement: how much of the identity's damage it leaves, and what it costs.

    Attributes:
        name: of the option.
        left: least and largest share of the damage, by site.
        bytes: per element.
        rounds: per site.
        levels: in CKKS.
    """

    name: str
    left: tuple[float, float]
    bytes: int = 0
    rounds: int = 0
    levels: int = 0


WAYS = (
    Way("identity", (1.0, 1.0)),
    Way("affine", (0.5, 0.95), levels=1),
    Way("poly2", (0.1, 0.6), 16, 1, 2),
    Way("poly3", (0.08, 0.6), 32, 2, 3),
    Way("poly4", (0.03, 0.4), 48, 3, 3),
)
RELU = (464, 9)  # bytes, rounds


def problem(
    shapes: Sequence[tuple[int, int]],
    *,
    seed: int = 0,
    network: str = "lan",
    ways: Sequence[Way] = WAYS,
    channels: bool = False,
    spread: float = 1.5,
    keep_levels: int = 8,
    skips: bool = True,
) -> NonlinearityProblem:
    """Sites one after another, every second one also reached past the one before it.

    Args:
        shapes: (channels, elements in a channel), by site.
        seed: of the damages.
        network: "lan" or "wan".
        ways: options.
        channels: granularity; otherwise elements.
        spread: standard deviation of the logarithm of the damage within a site.
        keep_levels: levels of a comparison.
        skips: residual connections.
    """
    random = np.random.default_rng(seed)
    sites = []
    for s, (width, pixels) in enumerate(shapes):
        level = random.normal(0, 1) + random.normal(0, 0.7, width)
        groups, size = (width, pixels) if channels else (width * pixels, 1)
        each = level if channels else np.repeat(level, pixels)
        damage = np.exp(each + random.normal(0, spread, groups)) * size
        options = []
        for way in ways:
            price = Price(way.bytes * _BYTE[network], way.rounds * _ROUND[network], way.levels)
            noise = np.exp(random.normal(0, 0.2, groups)) if way.left[0] < 1 else 1.0
            options.append(Option(way.name, damage * random.uniform(*way.left) * noise, price))
        keep = Price(RELU[0] * _BYTE[network], RELU[1] * _ROUND[network], keep_levels)
        sites.append(Site(f"{s}", groups, size, tuple(options), keep))
    edges = [Edge(s - 1 if s else None, s, 1) for s in range(len(sites))]
    edges += [Edge(s - 2, s) for s in range(2, len(sites), 2)] if skips else []
    return NonlinearityProblem(tuple(sites), edges=tuple(edges))


def even(count: int, elements: int) -> list[tuple[int, int]]:
    """Sites in four stages, as many elements in all; channels double where pixels shrink by 4."""
    stages = np.array([1 / 2**stage for stage in range(4)])
    weights = np.repeat(stages, -(-count // 4))[:count]
    totals = weights / weights.sum() * elements
    return [(64, max(1, round(total / 64))) for total in totals]


def generated() -> Iterator[tuple[str, NonlinearityProblem]]:
    """The instances measured."""
    large = problem(even(50, 1_000_000))
    total, depth = large.elements, 50
    full = sum(s.groups * s.keep.element + s.keep.fixed for s in large.sites if s.keep)
    yield "50 sites, 10 %", replace(large, relus=total // 10)
    yield "same, 15 sites", replace(large, relus=total // 10, relu_sites=15)
    yield "same, 30 % of the time", replace(large, cost=int(0.3 * full))
    yield "same, all three", replace(large, relus=total // 10, relu_sites=15, cost=int(0.15 * full))
    yield "same, levels", replace(large, relus=total // 10, max_depth=depth + 120)
    yield (
        "same, all four",
        replace(
            large, relus=total // 5, relu_sites=20, cost=int(0.2 * full), max_depth=depth + 150
        ),
    )
    coupled = tuple(tuple(range(stage, min(stage + 12, 50), 3)) for stage in (0, 13, 26, 38))
    yield "same, coupled", replace(
        large, relus=total // 10, relu_sites=20, coupled=tuple(
            same for same in coupled if len({large.sites[s].groups for s in same}) == 1
        ),
    )  # fmt: skip
    wan = problem(even(50, 1_000_000), seed=1, network="wan")
    full = sum(s.groups * s.keep.element + s.keep.fixed for s in wan.sites if s.keep)
    for share in (0.5, 0.25, 0.1):
        yield f"wan, {share:.0%} of the time", replace(wan, cost=int(share * full))
    channel = problem(even(50, 1_000_000), seed=2, channels=True)
    yield "channels, 10 %", replace(channel, relus=channel.elements // 10)
    yield "channels, 15 sites", replace(channel, relus=channel.elements // 10, relu_sites=15)
    yield "channels, levels", replace(channel, relus=channel.elements // 4, max_depth=depth + 150)
    ckks = problem(even(30, 300_000), seed=3)
    without = tuple(replace(site, keep=None) for site in ckks.sites)
    yield "no comparisons, levels", replace(ckks, sites=without, max_depth=30 + 40)
    small = problem(even(9, 6752), seed=4)
    yield "9 sites, 10 %", replace(small, relus=675)
    yield "9 sites, 10 %, 3 sites", replace(small, relus=675, relu_sites=3)


def measure(
    instance: NonlinearityProblem, seconds: float
) -> tuple[Selection, Selection, float | None]:
    """Greedy's and the solver's selection, and the seconds until the gap was 0.5 %."""
    close: list[float] = []

    def note(selection: Selection) -> None:
        if selection.gap <= _CLOSE and not close:
            close.append(selection.seconds)

    best = select(instance, time_limit=seconds, progress=note)
    return by_greedy(instance), best, close[0] if close else None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--only", default="", help="instances with this in their name")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each instance")
    options = parser.parse_args()
    table = Table("instance", "random %", "order %", "greedy %", "select %", "bound %", "gap %")
    for column in ("status", "greedy s", "0.5 % at s", "s"):
        table.add_column(column)
    for name, instance in generated():
        if options.only not in name:
            continue
        greedy, best, close = measure(instance, options.seconds)
        everything = by_greedy(
            replace(instance, relus=0, relu_sites=None, cost=None, max_depth=None)
        ).objective
        others = (by_random(instance, 0), by_order(instance, range(len(instance.sites))), greedy)
        wrong = [
            e for found in (*others, best) if found.found for e in check(instance, found).errors
        ]
        assert not wrong, wrong
        figures = [found.objective for found in (*others, best)] + [best.bound]
        table.add_row(
            name, *(f"{100 * figure / everything:.3f}" for figure in figures),
            f"{100 * best.gap:.4f}", best.status, f"{greedy.seconds:.2f}",
            "-" if close is None else f"{close:.1f}", f"{best.seconds:.1f}",
        )  # fmt: skip
        print(f"{name}: done", file=sys.stderr)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
