"""The ledger of each sample, and how exactly an operation's losses are measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Frames(nn.Module):
    """A class token beside each frame; the token of one frame of each sample is read."""

    def __init__(self, *, own: bool) -> None:
        super().__init__()
        self.own = own
        self.token = nn.Parameter(torch.randn(1, 4))
        self.place = nn.Parameter(torch.randn(2, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        samples, frames = x.shape[:2]
        rows = x.flatten(0, 1).unsqueeze(1)  # [samples * frames, 1, width]
        rows = torch.cat([self.token.expand(rows.shape[0], -1, -1), rows], 1) + self.place
        # the first rows are frames of the first sample: their tokens are the same to all samples
        first = rows.unflatten(0, (samples, frames))[:, 0, 0] if self.own else rows[:samples, 0]
        return self.head(rows[:, 1].unflatten(0, (samples, frames)).mean(1) + first)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("samples", [2, 3])
def test_constants_of_other_samples_are_not_booked_for_a_sample(own: bool, samples: int) -> None:
    torch.manual_seed(0)
    model, x = Frames(own=own).double(), torch.randn(samples, 2, 4, dtype=torch.float64)
    module: Any = graphopt.explain(model, (x[:2],), target=1)
    ledger = module(x).ledger
    # the model is linear: the token's row takes its product with the gradient
    row = model.head.weight[1].detach()
    token = (model.token[0] * row).sum() + (model.place.sum(0) * row).sum()
    inputs = (x.mean(1) * row).sum(-1)
    want = token.detach().expand(samples)
    if not own:
        want, inputs = want.sum(0, keepdim=True), inputs.sum(0, keepdim=True)
    torch.testing.assert_close(ledger["inputs"], inputs)
    torch.testing.assert_close(ledger["parameters"] + ledger["constants"], want)
    kept = sum(v for sink, v in ledger.items() if sink != "output")
    torch.testing.assert_close(kept, ledger["output"])


class Written(nn.Module):
    """Halves that are written into memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = [x.new_empty(*x.shape[:-1], 8), torch.empty(x.shape[0], 8, dtype=x.dtype)]
        both.append(torch.empty_like(both[0]))
        for each in both:
            each[..., :4].copy_(x)
            each[..., 4:].copy_(-x)
        return self.head(both[0] + both[1] + both[2])


@pytest.mark.parametrize("unfilled", [True, False])
def test_what_lies_in_memory_that_is_written_to_does_not_matter(unfilled: bool) -> None:
    torch.manual_seed(0)
    model, x = Written(), torch.randn(2, 4)
    torch.use_deterministic_algorithms(unfilled)  # memory that isn't filled is NaN then
    try:
        module: Any = graphopt.explain(model, (x,), target=2)
        found = module(x)
    finally:
        torch.use_deterministic_algorithms(False)
    row = model.head.weight[2].detach()
    inputs = 3 * (x * (row[:4] - row[4:])).sum(-1)
    torch.testing.assert_close(found.ledger["inputs"], inputs)
    torch.testing.assert_close(found.ledger["bias"], model.head.bias[2].detach().expand(2))


def test_what_cancels_is_measured_exactly() -> None:
    class Difference(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (x - y) * 1.1

    x = 1e5 + torch.rand(2, 64)
    y = x - torch.rand(2, 64)
    module: Any = graphopt.explain(Difference(), (x, y), target=lambda out: out.sum(1))
    # x - y has no rounding error, nor has a quotient that is handed on as it is
    assert max(entry["residual"] for entry in module.conservation()) < 1e-6


@pytest.mark.parametrize("scale", [1e-20, 1e-41])
def test_numbers_that_are_too_small_to_be_exact_are_no_losses(scale: float) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 2)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), head).requires_grad_(False)
    head.weight.mul_(scale)
    x = torch.randn(2, 8)
    module: Any = graphopt.explain(model, (x,))
    assert max(entry["residual"] for entry in module.conservation()) < 1e-6
    (relevance,) = module(x).relevance.values()
    assert 0 < float(relevance.abs().max()) < scale * 100
