"""Counting what reaches a comparison, by running the graph."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.private import comparisons, simulate
from tests.private.nets import build


def test_kept_elements_are_those_that_run_through_a_relu() -> None:
    sizes = {}
    for name in ("plain", "gathered", "blended", "polynomial"):
        model, x = build(name, 2)
        sizes[name] = sum(comparisons(model, x).values())
    assert sizes == {"plain": 144 + 36, "gathered": 14 + 3, "blended": 144 + 36, "polynomial": 0}


def test_everything_that_compares_counts_and_constants_do_not() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mask", torch.ones(1, 4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.clone().clamp_(0, 6)
            y = torch.where(self.mask > 0, x, -x)
            z = torch.where(y > 0.5, y, 0.0)
            return F.max_pool2d(z.abs(), 2)

    counts = comparisons(Many(), torch.randn(3, 1, 4, 4))
    kinds = {name.rstrip("_0123456789"): n for name, n in counts.items() if "where" not in name}
    assert kinds == {"clamp": 16, "gt": 16, "abs": 16, "max_pool2d": 16}
    assert [n for name, n in counts.items() if "where" in name] == [16]


def test_shared_modules_and_emitted_ones_count_each_call() -> None:
    act = nn.ReLU(inplace=True)
    model = nn.Sequential(nn.Linear(3, 5), act, nn.Linear(5, 2), act)
    x = torch.randn(4, 3)
    emitted = graphopt.capture(model, (x,)).emit()
    for module in (model, emitted):
        assert sorted(comparisons(module, x).values()) == [2, 5]


def test_a_model_that_counts_its_calls_is_left_as_it_is() -> None:
    class Counting(nn.Module):
        calls: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls.add_(1)
            return F.relu(self.layer(x)) * self.calls

    x = torch.randn(4, 3)
    for kind in (Counting(), graphopt.capture(Counting(), (x,)).emit()):
        assert sum(comparisons(kind, x).values()) == 5
        assert float(kind.get_buffer("calls")) == 0
    model = Counting()
    simulation = simulate(model, (x,), truncated_bits=0)
    exact, found = simulation.exactly(x), simulation(x)
    assert float(model.calls) == 0
    want = model(x)
    assert torch.equal(exact, want)
    assert torch.equal(found, want)
