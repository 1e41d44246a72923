"""Levels of homomorphic encryption: counted as the engines' circuit has them, spent where best."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.budget import Quantity
from graphopt.errors import BudgetError, BudgetInfeasible, UnsupportedError
from graphopt.passes.linearize.choice import Limits, Structure, problem
from graphopt.passes.linearize.latency import PrivateLatency
from graphopt.passes.linearize.levels import Levels, levels_of
from graphopt.passes.linearize.replacements import Kind
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.sites import Site
from graphopt.private import comparisons, predict
from graphopt.solvers import nonlinearity as solver
from tests.passes.linearize.graphs import Graph
from tests.passes.linearize.nets import Net, cnn, drawn, section

images = drawn(12, 3, 8, 8)
PUBLIC = ("_graphopt.*",)
DEEP: tuple[Kind, ...] = ("identity", "affine", "poly2", "poly3", "poly4")


def optimized(model: nn.Module, budget: str | None, **options: Any) -> Any:
    return graphopt.optimize(
        model, budget, (images[:1],), data=[images], time_limit=10.0, **options
    )


def levels(module: Any) -> int:
    return predict(module, "ckks", "lan", (images[:1],), public=PUBLIC).levels


@cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return cnn(nn.ReLU(), nn.ReLU())


def test_levels_of_replacements() -> None:
    assert [levels_of(kind) for kind in DEEP] == [0, 1, 2, 3, 3]


@pytest.mark.parametrize(
    ("seed", "kinds"),
    [
        (0, ("identity", "affine", "poly2")),
        (1, ("identity", "poly2", "poly4")),
        (2, ("affine", "poly2", "poly3")),
        (3, ("identity", "affine", "poly4")),
    ],
)
def test_the_best_choice_of_all(seed: int, kinds: tuple[Kind, ...]) -> None:
    """By brute force, within every limit that is anything to the graph.

    The levels of each choice are those of the emitted program; the solver's independent checker
    counts the same along the edges.
    """
    graph = Graph(seed, 3, kinds)
    depth = Levels(graph.program, graph.context, graph.sites, dict.fromkeys(graph.sites, kinds))
    every = []
    for choice in graph.choices(keep=False):
        told = graph.cost(choice, "ckks").levels
        question = asked(graph, depth, None)
        assert solver.check(question, stated(graph, choice, told)).depth == told
        every.append((told, graph.lost(choice)))
    assert depth.least()[0] == min(every)[0]
    for limit in range(min(every)[0], max(every)[0] + 1):
        question = asked(graph, depth, limit)
        answer = solver.select(question, time_limit=10.0, tolerance=0.0)
        assert solver.check(question, answer).ok
        assert answer.objective == pytest.approx(min(lost for n, lost in every if n <= limit))


def asked(graph: Graph, depth: Levels, limit: int | None) -> solver.NonlinearityProblem:
    limits, structure = Limits(0, levels=limit), Structure(depth.edges)
    return problem(graph.damage, limits, "site", depth.prices, structure)


def stated(graph: Graph, choice: Mapping[Site, Kind | None], depth: int) -> solver.Selection:
    options = tuple(list(graph.kinds).index(kind) for kind in choice.values() if kind)
    nothing = torch.zeros(0, dtype=torch.int64).numpy()
    return solver.Selection(
        options, (nothing,) * len(options), graph.lost(choice), 0.0, 1.0, "feasible", 0.0, 0.0,
        0, 0, 0, depth,
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["crypten", "semi2k", "aby3", "gc"])
def test_the_best_choice_within_seconds(protocol: str) -> None:
    """Rounds and bytes: prices and the rest are the prediction of every program."""
    graph = Graph(5, 2, ("affine", "poly2"))
    latency = PrivateLatency(
        graph.program, graph.context, protocol, "wan", graph.sites, lambda _: graph.kinds,
        Quantity(100.0, "%"), lambda chosen: linearized(graph.program, chosen, {}),
    )  # fmt: skip
    rest, every = latency.rest(graph.sites), []
    for choice in graph.choices(keep=True):
        cost = graph.cost(choice, protocol)
        prices = [
            latency.prices[s].keep if k is None else latency.prices[s].replace[k]
            for s, k in choice.items()
        ]
        priced = sum(
            p.fixed + p.element * s.per_sample for p, s in zip(prices, choice, strict=True)
        )
        assert rest + priced * 1e-12 == pytest.approx(cost.seconds, rel=1e-6)
        every.append((cost.seconds, graph.lost(choice)))
    for share in (0.2, 0.45, 0.8):
        low, high = min(every)[0], max(every)[0]
        limit = low + share * (high - low)
        question = problem(graph.damage, Limits(cost=latency.cost(limit)), "site", latency.prices)
        answer = solver.select(question, time_limit=10.0, tolerance=0.0)
        assert answer.objective == pytest.approx(min(d for s, d in every if s <= limit))


@pytest.mark.parametrize("limit", [7, 9, 12])
def test_what_comes_out_keeps_the_limit(limit: int) -> None:
    module = optimized(model(), f"levels={limit}")
    report = section(module)
    assert levels(module) == report["levels_after"] <= limit
    assert report["protocol"] == "ckks"
    assert report["relus_after"] == 0
    assert comparisons(module, images[:1]) == {}
    assert report["bound"] <= report["damage"] <= report["greedy_damage"] * (1 + 1e-9)
    assert report["gap"] == pytest.approx(0.0, abs=1e-4)
    assert report["status"] in ("optimal", "feasible")


def test_more_levels_lose_less() -> None:
    errors = [section(optimized(model(), f"levels={n}"))["output_error"] for n in (6, 8, 12)]
    assert errors == sorted(errors, reverse=True)


def test_the_fewest_levels() -> None:
    """Linear layers: convolution, norm, average, convolution, norm, linear."""
    with pytest.raises(BudgetInfeasible) as caught:
        optimized(model(), "levels=5")
    error = caught.value
    assert (error.field, error.requested, error.smallest, error.proven) == ("levels", 5, 6, True)
    assert "conv2d -> batch_norm -> avg_pool2d -> conv2d_1 -> batch_norm_1 -> linear" in str(error)
    with pytest.raises(BudgetInfeasible) as caught:
        optimized(model(), None, passes="canonicalize,linearize{levels=7,replacement=affine}")
    assert caught.value.smallest == 8


def test_pools_are_averages() -> None:
    """An average takes a level; here the identity stands in for what would be its affine map."""
    pooled = cnn(nn.ReLU(), nn.ReLU(), pool=nn.MaxPool2d(2))
    assert levels(optimized(pooled, "levels=6")) == 6
    assert levels(optimized(pooled, "levels=9")) <= 9


def test_what_can_not_be_replaced_can_not_run() -> None:
    two = Net(
        lambda s, x: torch.maximum(s.a(x), s.b(x)), a=nn.Conv2d(3, 2, 3), b=nn.Conv2d(3, 2, 3)
    ).eval()
    with pytest.raises(BudgetInfeasible) as caught:
        optimized(two, "levels=20")
    assert "maximum" in str(caught.value)
    assert caught.value.smallest is None
    soft = Net(lambda s, x: s.a(x).relu().softmax(1), a=nn.Conv2d(3, 2, 3)).eval()
    with pytest.raises(UnsupportedError, match="softmax"):
        optimized(soft, "levels=20")


def test_nothing_to_replace() -> None:
    linear = nn.Sequential(nn.Conv2d(3, 2, 3)).eval()
    assert section(optimized(linear, "levels=1"))["levels_after"] == 1
    deeper = nn.Sequential(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 2, 3)).eval()
    with pytest.raises(BudgetInfeasible):
        optimized(deeper, "levels=1")


def test_ciphertexts_of_inputs_and_outputs() -> None:
    """Communication depends on their sizes alone."""
    report = section(optimized(model(), "pi_latency=10s,protocol=ckks,network=wan"))
    assert report["relus_after"] == 0
    assert report["seconds_after"] == pytest.approx(81 * (192 + 5) * 8 / 200e6 + 40e-3)
    with pytest.raises(BudgetInfeasible) as caught:
        optimized(model(), "pi_latency=1ms,protocol=ckks,network=wan")
    assert caught.value.smallest == pytest.approx(report["seconds_after"])


@pytest.mark.parametrize(
    "budget", ["levels=50%", "pi_latency=50%,protocol=ckks", "levels=9,pi_latency=1s", "levels=0"]
)
def test_limits_that_make_no_sense(budget: str) -> None:
    with pytest.raises(BudgetError):
        optimized(model(), budget)
