"""`share`: the same gradients from fewer saved bytes, rule by rule."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.measure import measure_step
from tests.passes.rematerialize.test_planned_step import assert_close, gradients


def shared(model: nn.Module, *inputs: Tensor, **options: Any) -> Any:
    return graphopt.optimize(model, passes="canonicalize,share", example_inputs=inputs, **options)


def saved(module: nn.Module, *inputs: Tensor) -> int:
    return measure_step(module, inputs).saved


def distance(module: nn.Module, model: nn.Module, *inputs: Tensor) -> float:
    """Of all gradients together from those of a model, relative to these."""
    loss = lambda m: m(*inputs).square().mean()  # noqa: E731
    got, want = (
        torch.cat([g.flatten() for g in gradients(m, loss).values()]) for m in (module, model)
    )
    return float((got - want).norm() / want.norm())


def rules(module: Any) -> set[str]:
    return {site["rule"] for site in module.report.to_dict()["share"]["sites"]}


class ActivationsInARow(nn.Module):
    """Of pre-activation, GELU's output and norm's output one is enough."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.norm(x * 2))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


def dropped() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 256), nn.Dropout(0.3), nn.Tanh(), nn.Linear(256, 32))


def gated_sum() -> nn.Module:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 256), nn.Linear(256, 32)

        def forward(self, x: Tensor) -> Tensor:
            h = F.relu(self.up(x))
            return self.down(torch.cumsum(h, 1))  # which keeps nothing of h

    return Model()


def pooled(kind: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), kind(2), nn.Conv2d(8, 8, 3))


class FrozenConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * 2 + 1).tanh()


def frozen_norm() -> nn.Module:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Tanh(), nn.Conv2d(8, 8, 3))
    model[1].eval().requires_grad_(False)
    return model


tokens = torch.randn(64, 32)
images = torch.randn(4, 3, 16, 16)

dropped_input = nn.Sequential(nn.Dropout(0.3), nn.Linear(32, 32), nn.Tanh())

CASES = {
    "norm and activation": (ActivationsInARow(), tokens, 0.6, "recompute"),
    "gated": (Gated(), tokens, 0.68, "recompute"),
    "dropout": (dropped(), tokens, 0.55, "bit mask"),
    "dropped input": (dropped_input, tokens, 0.55, "bit mask"),
    "relu": (gated_sum(), tokens, 0.55, "relu sign"),
    "max pool": (pooled(nn.MaxPool2d), images, 0.4, "byte index"),
    "average pool": (pooled(nn.AvgPool2d), images, 0.3, "unread operand"),
    "frozen convolution": (FrozenConvolution(), images, 0.45, "unread operand"),
    "frozen norm": (frozen_norm(), images, 0.7, "unread operand"),
}


@pytest.mark.parametrize("case", CASES)
def test_less_is_saved_for_the_same_gradients(case: str) -> None:
    model, x, most, rule = CASES[case]
    module = shared(model, x)
    before, after = saved(copy.deepcopy(model), x), saved(copy.deepcopy(module), x)
    assert after <= most * before
    assert rule in rules(module)
    loss = lambda m: m(x).square().mean()  # noqa: E731
    assert_close(gradients(module, loss), gradients(model, loss))
    torch.manual_seed(1)
    got = module(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, model(x), rtol=1e-6, atol=1e-6)


def test_the_report_is_what_is_measured() -> None:
    model = dropped()
    module = shared(model, tokens)
    section = module.report.to_dict()["share"]
    assert section["saved_before"] == saved(copy.deepcopy(model), tokens)
    assert section["saved_after"] == saved(copy.deepcopy(module), tokens)
    after = sum(site["bytes_after"] for site in section["sites"])
    before = sum(site["bytes_before"] for site in section["sites"])
    assert abs(after - section["saved_after"]) <= 0.05 * section["saved_after"]
    assert abs(before - section["saved_before"]) <= 0.05 * section["saved_before"]


@pytest.mark.parametrize("dtype", [torch.float64])
def test_directional_derivative_with_dropout(dtype: torch.dtype) -> None:
    """The gradient is that of the loss with the masks of the same seed."""
    torch.manual_seed(0)
    model = nn.Sequential(ActivationsInARow(), dropped(), Gated()).to(dtype)
    x = torch.randn(16, 32, dtype=dtype)
    module = shared(model, x)

    def loss(m: nn.Module) -> Tensor:
        torch.manual_seed(5)
        return m(x).square().mean()

    module.zero_grad()
    loss(module).backward()
    directions = [torch.randn_like(p) for p in module.parameters()]
    slope = sum(
        float((p.grad * d).sum()) for p, d in zip(module.parameters(), directions, strict=True)
    )
    step, values = 1e-5, []
    for sign in (1, -1):
        moved = copy.deepcopy(module)
        with torch.no_grad():
            for p, d in zip(moved.parameters(), directions, strict=True):
                p.add_(d, alpha=sign * step)
            values.append(float(loss(moved)))
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-5 * abs(slope)


def test_another_batch_a_copy_and_a_file(tmp_path: Any) -> None:
    model = dropped()
    module = shared(model, tokens)
    module.save(tmp_path / "shared.pt2")
    loss = lambda m: m(tokens[:24]).square().mean()  # noqa: E731
    want = gradients(model, loss)
    for other in (module, copy.deepcopy(module), graphopt.load(tmp_path / "shared.pt2")):
        assert_close(gradients(other, loss), want)
        assert saved(copy.deepcopy(other), tokens) < 0.55 * saved(copy.deepcopy(model), tokens)


def test_what_is_frozen_later_is_planned_anew() -> None:
    model = ActivationsInARow()
    module = shared(model, tokens)
    for m in (model, module):
        m.get_parameter("down.weight").requires_grad_(False)
    loss = lambda m: m(tokens).square().mean()  # noqa: E731
    assert_close(gradients(module, loss), gradients(model, loss))
    assert saved(copy.deepcopy(module), tokens) <= saved(copy.deepcopy(model), tokens)


def test_with_a_budget() -> None:
    model = nn.Sequential(dropped(), dropped(), dropped())
    passes = "canonicalize,share,rematerialize{memory=60%}"
    module = graphopt.optimize(model, passes=passes, example_inputs=(tokens,), time_limit=2)
    loss = lambda m: m(tokens).square().mean()  # noqa: E731
    assert_close(gradients(module, loss), gradients(model, loss))
    memory = module.report.to_dict()["memory"]
    assert memory["measured_peak"] <= memory["budget"]
