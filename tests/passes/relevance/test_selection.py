"""Selective scans: which factors are parameters of them, and MambaLRP."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import graphopt
from graphopt.passes.relevance.composite import Match
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import Uniform
from tests.passes.relevance.rules.naive import Calls, handed_back


class Scan(nn.Module):
    """A Mamba block: written as it is, or as MambaLRP explains it by a gradient."""

    def __init__(self, width: int = 4, states: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.states, self.lrp = states, False
        self.enter = nn.Linear(width, 2 * width, bias=False)
        self.mix = nn.Conv1d(width, width, 2, padding=1, groups=width, bias=False)
        self.select = nn.Linear(width, 2 + 2 * states, bias=False)
        self.step = nn.Linear(2, width)
        self.decay = nn.Parameter(torch.rand(width, states))
        self.skip, self.leave = nn.Parameter(torch.randn(width)), nn.Linear(width, 3, bias=False)

    def act(self, x: Tensor) -> Tensor:
        return x * (F.silu(x) / x).detach() if self.lrp else F.silu(x)

    def constant(self, x: Tensor) -> Tensor:
        return x.detach() if self.lrp else x

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.enter(x).chunk(2, -1)
        u = self.act(self.mix(u.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
        dt, b, c = self.select(u).split([2, self.states, self.states], -1)
        dt = F.softplus(self.step(dt))[..., None]
        a = self.constant(torch.exp(-self.decay.exp() * dt))
        written = self.constant(dt * b[:, :, None]) * u[..., None]
        state = torch.zeros(x.shape[0], *self.decay.shape, dtype=x.dtype)
        found = []
        for i in range(x.shape[1]):
            state = a[:, i] * state + written[:, i]
            found.append((state @ self.constant(c[:, i])[..., None])[..., 0])
        y = torch.stack(found, 1) + u * self.skip
        y = y * self.act(gate)
        if self.lrp:
            y = y / 2 + (y / 2).detach()
        return self.leave(y[:, -1])


@pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])
def test_mamba_lrp_is_its_gradient(explicit: bool) -> None:
    """Jafari et al. 2024: A, B, C and the step are constants, the gate takes half."""
    net = Scan().double()
    x = torch.randn(2, 4, 4).double()
    c = torch.randn(2, 3).double()
    found = handed_back(net, x, "mamba-lrp", c, explicit=explicit)
    net.lrp = True
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf), leaf, c)
    net.lrp = False
    torch.testing.assert_close(found.relevance[0], gradient * x, rtol=1e-9, atol=1e-10)
    found.check(1e-12)
    total = (c * net(x)).sum(1).detach()  # it conserves: there is no bias on the way
    torch.testing.assert_close(found.relevance[0].sum((1, 2)), total, rtol=1e-9, atol=1e-10)


def test_mamba_of_transformers_is_found() -> None:
    config = transformers.MambaConfig(
        vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=2
    )
    model = transformers.MambaForCausalLM(config).eval()
    tokens = torch.randint(0, 20, (2, 5))
    kwargs = {"input_ids": tokens, "use_cache": False}
    explained = graphopt.explain(model, example_kwargs=kwargs, composite="mamba-lrp")
    plan: Any = explained.plan
    found = {
        op.node.name: [str(plan.roles.of(op, o)) for o in op.operands]
        for op in plan.ops.values()
        if op.family == "product"
    }
    selecting = [roles for roles in found.values() if "selection" in roles]
    # for each layer: B u once, and for each of five tokens A h (but for the first) and C h
    assert len(selecting) == 2 * (1 + 4 + 5)
    explanation = explained(**kwargs)
    ledger = dict(explanation.ledger)
    output = ledger.pop("output")
    torch.testing.assert_close(sum(ledger.values()), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: F.silu(x @ m.a) * (x @ m.b),  # a gate whose partner has weights too
        lambda m, x: x * (x @ m.a),  # a quadratic form: one product
        lambda m, x: (x @ m.a) * x + (x @ m.a),  # read elsewhere too
        lambda m, x: (x @ m.a) @ (x @ m.b),
    ],
)
def test_other_products_select_nothing(function: Any) -> None:
    """Each factor takes its half."""
    model = Calls(function, a=(4, 4), b=(4, 4)).double()
    x = torch.randn(2, 4, 4).double()
    c = torch.ones_like(model(x)).detach()
    rules = composite_of("cp-lrp").before((Match(family=("product",)), Uniform()))
    one, other = (handed_back(model, x, name, c) for name in ("mamba-lrp", rules))
    torch.testing.assert_close(one.relevance[0], other.relevance[0])
