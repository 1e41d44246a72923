"""Functions that aren't zero at zero."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.relevance.rules import Identity, Secant
from tests.passes.relevance.rules.test_sums import EMITTERS, close, drawn, run

LIFTED: dict[str, tuple[Callable[[Tensor], Tensor], float, float]] = {
    "sigmoid": (torch.sigmoid, 0.5, 0.25),
    "softplus": (F.softplus, math.log(2), 0.5),
    "exp": (torch.exp, 1.0, 1.0),
    "cos": (torch.cos, 1.0, 0.0),
    "hardsigmoid": (F.hardsigmoid, 0.5, 1 / 6),
    "logsigmoid": (F.logsigmoid, -math.log(2), 0.5),
    "written out": (lambda x: x.exp() + (-x).exp(), 2.0, 0.0),
}


@EMITTERS
@pytest.mark.parametrize("name", LIFTED)
def test_what_a_function_is_at_zero_is_a_constant(name: str, explicit: bool) -> None:
    function, at_zero, slope = LIFTED[name]
    (x,) = drawn((3, 40))
    x[:, 0], x[:, 1], x[:, 2] = 0, 1e-12, -1e-9
    found, r = run(function, [x], Secant(), explicit)
    quotient = r / function(x)
    risen = torch.where(x.abs() < 1e-8, slope * x, function(x) - at_zero)
    close(found.relevance[0], quotient * risen)
    close(found.ledger["constants"], (quotient * at_zero).sum(1))
    found.check(1e-12)


@EMITTERS
def test_where_a_function_is_zero_there_is_nothing_to_share(explicit: bool) -> None:
    (x,) = drawn((3, 40))
    x[:, ::2] -= 6  # a hard sigmoid is zero below -3
    found, r = run(F.hardsigmoid, [x], Secant(), explicit)
    assert not bool(found.relevance[0][F.hardsigmoid(x) == 0].any())
    found.check(1e-12)
    close(found.relevance[0].sum(1) + found.ledger["constants"], r.sum(1))


@EMITTERS
@pytest.mark.parametrize(
    "function", [F.gelu, torch.tanh, F.relu, torch.sqrt, torch.log, torch.reciprocal]
)
def test_through_all_others_everything_goes(function: Any, explicit: bool) -> None:
    (x,) = drawn((3, 40))
    found, r = run(function, [x.abs()], Secant(), explicit)
    close(found.relevance[0], r)
    assert "constants" not in found.ledger
    same, _ = run(function, [x.abs()], Identity(), explicit)
    assert torch.equal(found.relevance[0], same.relevance[0])


@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp", "epsilon-plus"])
def test_a_gate_near_zero_explodes_nothing(composite: str) -> None:
    """``R / x`` of a sigmoid at 1e-7 would be ten million times what there is."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.score(x).sigmoid().sum(1, keepdim=True)

    model = Gated()
    x = torch.randn(1, 4)
    with torch.no_grad():  # sums of ordinary summands that cancel
        model.score.weight -= 0.9999999 * (model.score.weight @ x.T) @ x / (x @ x.T)
    explained: Any = graphopt.explain(model, (x,), composite=composite)
    found = explained(x)
    weights = model.score.weight.detach()
    torch.testing.assert_close(
        found.relevance["x"], 0.25 * x * weights.sum(0), rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(found.ledger["constants"], torch.tensor([2.0]))
