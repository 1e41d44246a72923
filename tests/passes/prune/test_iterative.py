"""Pruning in rounds: the schedule's closed forms, the budget, the original's names and places."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
import graphopt.training
from graphopt import errors
from graphopt.passes.prune import iteratively, schedule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 24), nn.ReLU(),
        nn.Linear(24, 4),
    ).double()  # fmt: skip


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, 6).double()
    return x, x[:, :4].argmax(1)


def test_schedules_in_closed_form() -> None:
    assert schedule(0.4, 4, "linear") == pytest.approx((0.85, 0.7, 0.55, 0.4))
    assert schedule(0.0625, 4, "geometric") == pytest.approx((0.5, 0.25, 0.125, 0.0625))
    cubic = schedule(0.2, 4, "cubic")
    assert cubic == pytest.approx([1 - 0.8 * (1 - (1 - k / 4) ** 3) for k in range(1, 5)])
    assert cubic[-1] == 0.2
    assert schedule(0.3, 1) == (0.3,)


@pytest.mark.parametrize("shape", ["cubic", "linear"])
def test_rounds_come_down_to_the_budget_and_map_to_the_original(shape: Any) -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    full = sum(p.numel() for p in model.parameters())
    seen = []

    def train(module: graphopt.OptimizedModule) -> None:
        assert module.training
        seen.append(sum(p.numel() for p in module.parameters()) / full)
        graphopt.training.train(module, [(x, y)], loss=F.cross_entropy, epochs=3, lr=0.01)

    small = iteratively(
        model, "params=40%", (x[:8],), train=train, rounds=3, shape=shape,
        data=[(x, y)], loss=F.cross_entropy,
    )  # fmt: skip
    for left, allowed in zip(seen, schedule(0.4, 3, shape), strict=True):
        assert 0.93 * allowed <= left <= allowed
    assert all(model.state_dict()[name].equal(value) for name, value in before.items())
    found = small.report["prune"]
    assert (found["params_before"], found["params_after"]) == (full, round(seen[-1] * full))
    assert [width for _, width, _ in found["dimensions"]] == [32, 24]
    assert [record.name for record in small.program.history].count("prune") == 3
    named = dict(model.named_parameters())
    for name, parameter in small.named_parameters():  # kept places are the original's
        kept = found["kept"].get(name, {})
        places = [kept.get(str(a), range(n)) for a, n in enumerate(named[name].shape)]
        assert tuple(parameter.shape) == tuple(map(len, places))
        assert all(max(each) < n for each, n in zip(places, named[name].shape, strict=True))
    twin = small.report.masked_module().eval()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in named.values()]
    torch.testing.assert_close(twin(x), small.eval()(x))
    small.load_state_dict(before)
    rows = found["kept"]["0.weight"]["0"]
    assert small.get_parameter("0.weight").equal(model[0].weight[list(rows)])


def test_training_may_give_another_module_and_nothing_else() -> None:
    model, (x, _) = network(), batch()
    small = iteratively(model, "params=60%", (x[:8],), train=copy.deepcopy, rounds=2)
    assert small.report["prune"]["params_after"] <= 0.6 * small.report["prune"]["params_before"]
    with pytest.raises(errors.UsageError, match="train returned int"):
        iteratively(model, "params=60%", (x[:8],), train=lambda module: 3, rounds=2)  # type: ignore[arg-type, return-value]


def test_bad_requests_are_refused() -> None:
    model, (x, _) = network(), batch()
    none: Any = lambda module: None  # noqa: E731
    with pytest.raises(errors.UsageError, match="cubic"):
        iteratively(model, "params=60%", (x[:8],), train=none, shape="square")  # type: ignore[arg-type]
    with pytest.raises(errors.UsageError, match="rounds=0"):
        iteratively(model, "params=60%", (x[:8],), train=none, rounds=0)
    with pytest.raises(errors.BudgetInfeasible):
        iteratively(model, "params=1", (x[:8],), train=none, rounds=1)
