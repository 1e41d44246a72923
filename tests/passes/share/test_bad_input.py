"""`share` on what could trip it up: hooks on saved tensors, odd layouts, vanishing gammas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.rematerialize.test_planned_step import assert_close, gradients
from tests.passes.share.test_share import CASES, ActivationsInARow, saved, shared, tokens


@pytest.mark.parametrize("case", CASES)
def test_gradients_against_finite_differences(case: str) -> None:
    """`gradcheck` in float64, dropout with the same masks each time."""
    model, x, _, _ = CASES[case]
    torch.manual_seed(0)
    # small, and away from the kinks of ReLU and of max pooling
    x = torch.randn((2, *x.shape[1:]) if x.dim() == 2 else (1, 3, 8, 8), dtype=torch.float64)
    module = shared(copy.deepcopy(model).double(), x, verify=False)

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(3)
        return module(x)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(),), eps=1e-7, atol=1e-4, rtol=1e-4)


def test_hooks_on_saved_tensors_see_less() -> None:
    """What a plan keeps passes through `saved_tensors_hooks`, and comes back from them."""
    model = ActivationsInARow()
    module = shared(model, tokens)

    def packed(m: nn.Module) -> int:
        count = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal count
            count += t.nbytes
            return t.clone()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            m(tokens).square().mean().backward()
        return count

    assert packed(module) <= packed(model)
    assert_close(
        {n: p.grad for n, p in module.named_parameters()},  # type: ignore[misc]
        {n: p.grad for n, p in model.named_parameters()},  # type: ignore[misc]
    )


def test_offloading_saved_tensors() -> None:
    model = ActivationsInARow()
    module = shared(model, tokens)
    with torch.autograd.graph.save_on_cpu():
        got = gradients(module, lambda m: m(tokens).square().mean())
    assert_close(got, gradients(model, lambda m: m(tokens).square().mean()))


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.t().contiguous().t(), lambda x: x[::2], lambda x: x[:, :1].expand(-1, 32)],
)
def test_inputs_that_are_not_contiguous(layout: Any) -> None:
    model = ActivationsInARow()
    module = shared(model, tokens)
    x = layout(tokens)
    loss = lambda m: m(x).square().mean()  # noqa: E731
    assert_close(gradients(module, loss), gradients(model, loss))


def test_a_batch_of_nothing() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 32))
    module = shared(model, tokens)
    loss = lambda m: m(tokens[:0]).sum()  # noqa: E731
    got, want = gradients(module, loss), gradients(model, loss)
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("norm", [nn.LayerNorm(32), nn.RMSNorm(32)])
def test_a_gamma_that_reaches_zero(norm: nn.Module) -> None:
    """Nothing is divided by gamma: it may vanish after the plan was made."""
    model = nn.Sequential(nn.Linear(32, 32), norm, nn.Tanh(), nn.Linear(32, 32))
    module = shared(model, tokens)
    for m in (model, module):
        with torch.no_grad():
            m.get_parameter("1.weight")[::2] = 0
    loss = lambda m: m(tokens).square().mean()  # noqa: E731
    got = gradients(module, loss)
    assert all(g.isfinite().all() for g in got.values())
    assert_close(got, gradients(model, loss))


class Frozen(nn.Module):
    """A norm whose consumer is frozen: its output is saved by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(32, 32), nn.LayerNorm(32)
        self.last = nn.Linear(32, 32).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


@pytest.mark.parametrize(
    "model", [Frozen(), nn.Linear(32, 32), nn.Sequential(nn.Linear(32, 32), nn.Sigmoid())]
)
def test_bytes_never_increase(model: nn.Module) -> None:
    module = shared(model, tokens)
    assert saved(copy.deepcopy(module), tokens) <= saved(copy.deepcopy(model), tokens)


@pytest.mark.parametrize("flag", [True, False])
def test_mixed_precision_and_flags_changed_later(flag: bool) -> None:
    model = ActivationsInARow()
    module = shared(model, tokens)
    for m in (model, module):
        m.get_parameter("up.weight").requires_grad_(flag)
    with torch.autocast("cpu", torch.bfloat16):
        got = gradients(module, lambda m: F.mse_loss(m(tokens).float(), tokens))
        want = gradients(model, lambda m: F.mse_loss(m(tokens).float(), tokens))
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=2e-2, atol=1e-4)
