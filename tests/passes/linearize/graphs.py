"""Small random graphs with a few ReLUs, and all that may become of them."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.program import Program
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.sites import Site, sites
from graphopt.pipeline import PassContext
from graphopt.private import PrivateCost, predict

x = torch.linspace(-1, 1, 12).view(2, 6)


class Drawn(nn.Module):
    """Linear layers, ReLUs and sums of earlier values, at random."""

    def __init__(self, seed: int, relus: int) -> None:
        super().__init__()
        self.random, self.layers = random.Random(seed), nn.ModuleList()
        torch.manual_seed(seed)
        self.plan = [self._step(number) for number in range(relus)]

    def _step(self, number: int) -> tuple[list[int], int]:
        """What is added up (0 is the input), and through how many linear layers that goes."""
        added = self.random.sample(range(number + 1), min(number + 1, self.random.randint(1, 2)))
        layers = self.random.randint(0, 2)
        self.layers.append(nn.Sequential(*(nn.Linear(6, 6) for _ in range(layers))))
        return added, layers

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for (added, _), layers in zip(self.plan, self.layers, strict=True):
            values.append(torch.relu(layers(sum(values[i] for i in added))))
        return torch.stack(values[1:]).sum(0)


@dataclass(frozen=True)
class Graph:
    """A program, its sites, and made-up damages of replacing them whole."""

    seed: int
    relus: int
    kinds: Sequence[Kind]

    @cached_property
    def program(self) -> Program:
        program = graphopt.capture(Drawn(self.seed, self.relus).eval(), (x,))
        assert isinstance(program, Program)
        return program

    @cached_property
    def sites(self) -> list[Site]:
        return sites(self.program)

    @cached_property
    def context(self) -> PassContext:
        return PassContext(args=(x,))

    @cached_property
    def damage(self) -> Damage:
        generator = torch.Generator().manual_seed(self.seed)
        return {
            site: {
                kind: torch.rand(1, generator=generator, dtype=torch.float64) / (1 + DEGREES[kind])
                for kind in self.kinds
            }
            for site in self.sites
        }

    def choices(self, *, keep: bool) -> Iterator[dict[Site, Kind | None]]:
        """All of them; None keeps a site."""
        menu: list[Kind | None] = [*self.kinds, *([None] if keep else [])]
        for each in itertools.product(menu, repeat=len(self.sites)):
            yield dict(zip(self.sites, each, strict=True))

    def lost(self, choice: Mapping[Site, Kind | None]) -> float:
        return sum(float(self.damage[s][k]) for s, k in choice.items() if k is not None)

    def cost(self, choice: Mapping[Site, Kind | None], protocol: str) -> PrivateCost:
        """What the engines' prediction says of the emitted program."""
        replaced = [
            Replacement(
                site, torch.zeros(0, dtype=torch.int64), kind,
                None if kind == "identity" else torch.full((DEGREES[kind] + 1, site.channels), 0.5),
            )
            for site, kind in choice.items()
            if kind is not None
        ]  # fmt: skip
        program = linearized(self.program, replaced, {})
        return predict(program, protocol, "wan", (x,), public=("_graphopt.*",))
