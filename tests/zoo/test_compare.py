"""The comparison of gradients is strict, except where they cancel."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo.compare import Run, run, run_problems
from tests.zoo.registry import ZooModel


class Net(nn.Module):
    """``before.bias`` has no gradient but noise; that of ``small`` is real, and 1e-4 of others."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.small = nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.before(x)).exp() + 1e-4 * self.small.sin()


ENTRY = ZooModel("net", Net, lambda batch: ((torch.randn(batch, 3, 9, 9),), {}))


@pytest.fixture
def want() -> Run:
    return run(ENTRY.model(), ENTRY)


def spoiled(want: Run, name: str, factor: float) -> list[str]:
    got = dataclasses.replace(want, gradients=copy.deepcopy(want.gradients))
    gradient: Any = got.gradients[name]
    gradient.mul_(factor)
    return list(run_problems(got, want))


def test_a_gradient_that_cancels_is_noise(want: Run) -> None:
    assert want.exact is not None
    noise, other = want.gradients["before.bias"], want.gradients["before.weight"]
    assert noise is not None
    assert other is not None
    assert noise.norm() < 1e-5 * other.norm()
    assert not spoiled(want, "before.bias", -1.0)


@pytest.mark.parametrize("name", ["small", "before.weight", "norm.bias"])
def test_a_small_gradient_is_none(want: Run, name: str) -> None:
    assert spoiled(want, name, 1 + 1e-4)
    assert not spoiled(want, name, 1 + 1e-6)


def test_noise_has_a_limit(want: Run) -> None:
    assert spoiled(want, "before.bias", 1e4)
