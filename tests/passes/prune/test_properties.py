"""Properties of pruning over generated models."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st

import graphopt
from graphopt.errors import BudgetInfeasible
from tests.passes.prune import properties
from tests.passes.prune.generated import Recipe, built, recipes
from tests.passes.prune.test_models import counted

PROPERTIES = [
    properties.check_masked, properties.check_keep_all, properties.check_zero_invariance,
    properties.check_union, properties.check_permuted, properties.check_trained,
    properties.check_exported,
]  # fmt: skip

seeds = st.integers(0, 999)


def examples(count: int, *, derandomize: bool = True) -> settings:
    """The same models every time, or others."""
    return settings(
        max_examples=count, deadline=None, derandomize=derandomize, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip


def check_all(recipe: Recipe, seed: int) -> None:
    subject = properties.subject(recipe)
    event(f"dimensions: {min(len(subject.dimensions.all), 3)}")
    for check in PROPERTIES:
        check(subject, seed)


def check_budget(recipe: Recipe) -> None:
    """A budget is kept, what is reported is what others count, and files give it back."""
    model, x = built(recipe, torch.float32)
    try:
        small = graphopt.optimize(model, "params=75%", (x,))
    except BudgetInfeasible:
        assume(False)
    report = small.report.to_dict()["prune"]
    # What nothing reads is never run by a captured model, and not counted.
    whole = graphopt.optimize(model, passes="canonicalize", example_inputs=(x,))
    for when, module in (("before", whole), ("after", small)):
        assert report[f"params_{when}"] == sum(p.numel() for p in module.parameters())
        if not any(isinstance(m, torch.nn.RNNBase) for m in model.modules()):
            assert report[f"flops_{when}"] == counted(module, (x,))
    assert report["params_after"] <= 0.75 * report["params_before"]
    with TemporaryDirectory() as folder:
        properties.check_saved(small, x, Path(folder) / "small.gopt")


@examples(4)
@given(recipes(), seeds)
def test_properties(recipe: Recipe, seed: int) -> None:
    check_all(recipe, seed)


@examples(3)
@given(recipes())
def test_counts_and_files(recipe: Recipe) -> None:
    check_budget(recipe)


@pytest.mark.slow
@examples(200, derandomize=False)
@given(recipes(10), seeds)
def test_properties_of_many(recipe: Recipe, seed: int) -> None:
    check_all(recipe, seed)


@pytest.mark.slow
@examples(60, derandomize=False)
@given(recipes(10))
def test_counts_and_files_of_many(recipe: Recipe) -> None:
    check_budget(recipe)
