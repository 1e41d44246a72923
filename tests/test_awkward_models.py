"""Models that were once answered wrongly, or not at all."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Drawing(nn.Module):
    """Stochastic depth with Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) if random.random() < 0.5 else x


class Counting(nn.Module):
    """Writes to an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return self.layer(x)


@dataclass
class Result:
    loss: Tensor
    logits: Tensor


class Classed(nn.Module):
    """Returns an object of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Result:
        logits = self.layer(x)
        return Result(logits.square().mean(), logits)


def test_numbers_drawn_by_python_are_refused() -> None:
    with pytest.raises(graphopt.CaptureError, match="Python's or NumPy's"):
        graphopt.capture(Drawing(), (torch.randn(4, 8),))


def test_example_inputs_are_left_as_they_were() -> None:
    count = torch.zeros(3)
    graphopt.optimize(Counting(), "memory=1GB", (torch.randn(4, 8), count), time_limit=1)
    assert not count.any()


def test_outputs_of_a_class_of_the_users() -> None:
    model, x = Classed(), torch.randn(4, 8)
    module = graphopt.optimize(model, "memory=1GB", (x,), time_limit=1)
    result = module(x)
    assert isinstance(result, Result)
    torch.testing.assert_close(result.logits, model(x).logits)
