"""Surviving weights against exhaustive search, and what must hold for every answer."""

from __future__ import annotations

import math
import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.solvers.surviving import Layer, Survival, SurvivalError, survive

SMALL = settings(max_examples=150, deadline=None, derandomize=True)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Layer], int]:
    """A few layers with options in any order, ties and losses that are not convex."""
    loss = st.one_of(st.integers(0, 4).map(float), st.floats(0, 10, width=32))
    layers = []
    for number in range(draw(st.integers(1, 5))):
        kept = draw(st.lists(st.integers(0, 30), min_size=1, max_size=5, unique=True))
        losses = draw(st.lists(loss, min_size=len(kept), max_size=len(kept)))
        layers.append(Layer(str(number), tuple(kept), tuple(losses)))
    return layers, draw(st.integers(0, 120))


def brute(layers: list[Layer], limit: int) -> float:
    """The least loss, by trying everything."""
    options = [range(len(layer.kept)) for layer in layers]
    return min(
        (
            sum(layer.losses[i] for layer, i in zip(layers, chosen, strict=True))
            for chosen in product(*options)
            if sum(layer.kept[i] for layer, i in zip(layers, chosen, strict=True)) <= limit
        ),
        default=math.inf,
    )


def check(layers: list[Layer], limit: int, found: Survival) -> None:
    """What holds for every answer, straight from the definition."""
    chosen = list(zip(layers, found.options, strict=True))
    assert found.kept == tuple(layer.kept[i] for layer, i in chosen)
    assert found.loss == pytest.approx(sum(layer.losses[i] for layer, i in chosen))
    assert found.bound <= found.loss
    if found.status == "infeasible":
        assert sum(found.kept) == sum(min(layer.kept) for layer in layers) > limit
    else:
        assert sum(found.kept) <= limit


@SMALL
@given(problems())
def test_it_is_the_best_of_all(problem: tuple[list[Layer], int]) -> None:
    layers, limit = problem
    found, best = survive(layers, limit), brute(layers, limit)
    check(layers, limit, found)
    assert (found.status == "infeasible") == (best == math.inf)
    if best < math.inf:
        assert found.loss == pytest.approx(best)
        assert found.status == "optimal"


@SMALL
@given(problems(), st.integers(1, 3))
def test_a_bound_holds_with_few_states(problem: tuple[list[Layer], int], states: int) -> None:
    layers, limit = problem
    found, best = survive(layers, limit, states=states), brute(layers, limit)
    check(layers, limit, found)
    if best < math.inf:
        assert found.bound <= best * (1 + 1e-12)
        assert found.loss >= best * (1 - 1e-12)


def large(layers: int, options: int) -> tuple[list[Layer], int]:
    """As many layers as a large transformer has, of uneven sizes and bumpy curves."""
    drawn = random.Random(0)
    result = []
    for number in range(layers):
        size, scale = drawn.randint(1000, 5_000_000), drawn.random()
        shares = [(i + 1) / options for i in range(options)]
        losses = [scale * (1 - s) ** 2 * drawn.uniform(0.7, 1.3) for s in shares]
        result.append(Layer(str(number), tuple(int(s * size) for s in shares), tuple(losses)))
    return result, sum(max(layer.kept) for layer in result) // 2


def test_hundreds_of_layers() -> None:
    layers, limit = large(200, 20)
    seen: list[Survival] = []
    found = survive(layers, limit, states=5000, progress=seen.append)
    check(layers, limit, found)
    assert found.gap <= 1e-4
    assert found.seconds < 20
    assert [s.loss for s in seen] == sorted((s.loss for s in seen), reverse=True)
    assert [s.bound for s in seen] == sorted(s.bound for s in seen)


def test_the_time_is_kept() -> None:
    layers, limit = large(200, 20)
    found = survive(layers, limit, time_limit=1e-6)
    check(layers, limit, found)
    assert found.gap < 0.05


@pytest.mark.parametrize(
    ("kept", "losses"),
    [((), ()), ((1,), (1.0, 2.0)), ((1, 1), (1.0, 2.0)), ((-1,), (0.0,)), ((1,), (math.nan,))],
)
def test_what_makes_no_sense(kept: tuple[int, ...], losses: tuple[float, ...]) -> None:
    with pytest.raises(SurvivalError):
        Layer("a", kept, losses)


def test_options_that_make_no_sense() -> None:
    with pytest.raises(SurvivalError):
        survive([], 1, time_limit=0)


def test_nothing_to_choose() -> None:
    assert survive([], 0).status == "optimal"
