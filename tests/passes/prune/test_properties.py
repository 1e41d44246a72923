"""Properties of pruning over generated models, each stated from outside the code under test."""

from __future__ import annotations

import copy
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import BudgetInfeasible, CaptureError
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Analysis, analyse
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.rewrite import pruned
from tests.passes.prune.generated import INPUTS, Recipe, built, recipes

EXACT = 1e-10
"""Relative to the largest element of an output, in double precision."""


@dataclass
class Subject:
    """A generated model and what the analysis says of it."""

    model: nn.Module
    x: Tensor
    program: Program
    analysis: Analysis

    @property
    def dimensions(self) -> Dimensions:
        return Dimensions(self.analysis)


def captured(model: nn.Module, x: Tensor) -> Program:
    module = graphopt.optimize(
        model, passes="canonicalize", example_inputs=(x,), verify=False, time_limit=5
    )
    program = module.program
    assert isinstance(program, Program)
    return program


def subject(recipe: Recipe) -> Subject:
    model, x = built(recipe)
    program = captured(model, x)
    return Subject(model, x, program, analyse(program))


def some(dimensions: Dimensions, seed: int) -> frozenset[int]:
    """Units to remove: some of each dimension, never all."""
    draw = random.Random(seed)
    gone: set[int] = set()
    for dimension in dimensions.all:
        units = list(dimension.units)
        gone.update(draw.sample(units, draw.randrange(len(units))))
    return frozenset(gone)


def outputs(module: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        return module(x)


def distance(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    pairs = list(zip(got, want, strict=True))
    assert all(a.shape == b.shape and b.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def kept(analysis: Analysis, removed: frozenset[int]) -> dict[str, dict[int, tuple[int, ...]]]:
    """Parameter -> axis -> places that stay."""
    every = {s.path: analysis.kept(s, removed) for s in analysis.slots.values() if s.is_trained}
    return {path: axes for path, axes in every.items() if axes}


def zeroed(model: nn.Module, places: dict[str, dict[int, tuple[int, ...]]]) -> nn.Module:
    """The source's own code, with zeros by hand wherever nothing is kept."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, axes in places.items():
            parameter = model.get_parameter(path)
            for axis, stay in axes.items():
                gone = sorted(set(range(parameter.shape[axis])) - set(stay))
                parameter.index_fill_(axis, torch.tensor(gone), 0.0)
    return model


def check_masked(recipe: Recipe, seed: int) -> None:
    """What comes back is the masked network, on other batch sizes too."""
    it = subject(recipe)
    removed = some(it.dimensions, seed)
    event(f"dimensions: {min(len(it.dimensions.all), 3)}")
    module = pruned(it.program, it.analysis, removed).emit().eval()
    places = kept(it.analysis, removed)
    twin = zeroed(it.model, places)
    assert distance(outputs(module, it.x), outputs(twin, it.x)) <= EXACT
    more = INPUTS[recipe.start](3)
    more = more.double() if more.is_floating_point() else more
    assert distance(outputs(module, more), outputs(twin, more)) <= EXACT
    for name, parameter in module.named_parameters():
        full = it.model.get_parameter(name).shape
        want = [len(places.get(name, {}).get(i, range(n))) for i, n in enumerate(full)]
        assert list(parameter.shape) == want


EXAMPLES = 12
quick = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
seeds = st.integers(0, 999)


@quick
@given(recipes(), seeds)
def test_it_is_the_masked_network(recipe: Recipe, seed: int) -> None:
    check_masked(recipe, seed)
