"""Limits on the seconds of private inference: kept by the prediction, spent where it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import BudgetInfeasible
from graphopt.private import predict
from tests.passes.linearize.nets import cnn, drawn, section

images = drawn(12, 3, 8, 8)
PUBLIC = ("_graphopt.*",)


def optimized(model: nn.Module, budget: str | None, **options: Any) -> Any:
    return graphopt.optimize(
        model, budget, (images[:1],), data=[images], time_limit=10.0, **options
    )


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return cnn(nn.ReLU(), nn.ReLU())


@pytest.mark.parametrize("protocol", ["crypten", "cheetah", "gc"])
@pytest.mark.parametrize("network", ["lan", "wan"])
def test_the_prediction_of_the_result_is_within_the_limit(
    model: nn.Module, protocol: str, network: str
) -> None:
    before = predict(model, protocol, network, (images[:1],))
    least = predict(
        optimized(model, f"relus=0,protocol={protocol}"), protocol, network, (images[:1],),
        public=PUBLIC,
    )  # fmt: skip
    limit = (before.seconds + least.seconds) / 2
    module = optimized(model, f"pi_latency={limit!r},protocol={protocol},network={network}")
    after = predict(module, protocol, network, (images[:1],), public=PUBLIC)
    report = section(module)
    assert after.seconds <= limit
    assert report["seconds_after"] == pytest.approx(after.seconds)
    assert report["seconds_before"] == pytest.approx(before.seconds)
    assert (report["rounds_after"], report["bytes_after"]) == (after.rounds, after.bytes)
    assert report["relus_after"] < report["relus_before"]


def test_where_rounds_are_dear_whole_calls_go(model: nn.Module) -> None:
    near = section(optimized(model, "pi_latency=75%,network=lan"))
    far = section(optimized(model, "pi_latency=75%,network=wan"))
    calls = [sum(site["kept"] > 0 for site in report["sites"]) for report in (near, far)]
    assert calls[1] <= calls[0]
    assert far["rounds_after"] < far["rounds_before"]


def test_a_limit_that_the_source_keeps_changes_nothing(model: nn.Module) -> None:
    module = optimized(model, "pi_latency=100%")
    assert list(module.state_dict()) == list(model.state_dict())
    assert section(module)["seconds_after"] == section(module)["seconds_before"]
    linear = optimized(nn.Sequential(nn.Conv2d(3, 2, 3)), "pi_latency=100%,relus=0")
    assert section(linear)["relus_before"] == 0


def test_what_linear_layers_take_cannot_be_undercut(model: nn.Module) -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        optimized(model, "pi_latency=1ns")
    assert caught.value.smallest is not None
    assert 0 < caught.value.smallest < predict(model, "crypten", "lan", (images[:1],)).seconds


def test_higher_degrees_take_part_where_products_are_cheap(model: nn.Module) -> None:
    """A product costs CrypTen a 29th of a ReLU's bytes, and they lose less than squares do."""
    every = section(optimized(model, "pi_latency=60%"))
    spec = "canonicalize,linearize{pi_latency=60%,replacement=poly2}"
    squares = section(optimized(model, None, passes=spec))
    assert {site["choice"] for site in every["sites"]} & {"poly3", "poly4"}
    assert every["output_error"] < squares["output_error"]
