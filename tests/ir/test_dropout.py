"""Dropout as a mask and a product: the draws and the bits of torch's own op."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir.dropout import split_dropout

aten = torch.ops.aten


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_same_bits_and_same_draws(p: float, dtype: torch.dtype, transposed: bool) -> None:
    def step(x: torch.Tensor, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, mask = aten.native_dropout(x, p, True)
        scale = 1 / (1 - p) if p < 1 else 0.0
        return out, mask, aten.native_dropout_backward(gradient, mask, scale)

    x, gradient = torch.randn(33, 17, dtype=dtype), torch.randn(17, 33, dtype=dtype).t()
    x = x.t().contiguous().t() if transposed else x
    traced = make_fx(step, tracing_mode="fake")(x, gradient)
    split_dropout(traced.graph)
    traced.recompile()
    assert not any("native_dropout" in str(node.target) for node in traced.graph.nodes)
    torch.manual_seed(0)
    # eager's `dropout` draws nothing where all or nothing is dropped
    want = eager(x, gradient, p) if 0 < p < 1 else step(x, gradient)[::2]
    after = torch.rand(3)
    torch.manual_seed(0)
    out, mask, backward = traced(x, gradient)
    assert torch.equal(torch.rand(3), after)
    torch.manual_seed(0)
    assert torch.equal(mask, aten.native_dropout(x, p, True)[1])
    assert torch.equal(out, want[0])
    assert torch.equal(backward, want[1])


def eager(x: torch.Tensor, gradient: torch.Tensor, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """What `dropout` gives outside of a graph, and its gradient."""
    leaf = x.detach().requires_grad_()
    out = torch.nn.functional.dropout(leaf, p)
    return out.detach(), torch.autograd.grad(out, leaf, gradient)[0]


def test_the_mask_is_random_and_fake_when_asked() -> None:
    mask_op = torch.ops.graphopt.dropout_mask.default
    assert torch.Tag.nondeterministic_seeded in mask_op.tags
    with FakeTensorMode():
        mask = mask_op(torch.empty(3, 5).t(), 0.2)
    assert (tuple(mask.shape), mask.dtype) == ((5, 3), torch.bool)
