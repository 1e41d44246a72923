"""A run's graph computes the same after it was made smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Maxout(nn.Module):
    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.choose = nn.Linear(6, 8, bias=False), choose

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).chunk(2, 1)
        return self.choose(first, second)


@pytest.mark.parametrize("emitter", ["auto", "explicit"])
@pytest.mark.parametrize("choose", [torch.maximum, torch.minimum, torch.max, torch.fmax])
def test_the_larger_of_two_values_takes_all(
    choose: Callable[[Tensor, Tensor], Tensor], emitter: str
) -> None:
    """Its derivative is written in place: zero times the gradient where the other one won."""
    torch.manual_seed(0)
    model, x = Maxout(choose).double(), torch.randn(3, 6).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
    explained: Any = graphopt.explain(model, (x,), composite="lrp-0", emitter=emitter)
    found = explained(x)
    torch.testing.assert_close(found.relevance["x"], gradient * x)
    torch.testing.assert_close(found.ledger["inputs"], found.ledger["output"])


def test_no_write_is_left_in_a_run() -> None:
    x = torch.randn(3, 6)
    explained: Any = graphopt.explain(Maxout(torch.maximum), (x,))
    calls = [n.target for n in explained.graph.graph.nodes if n.op == "call_function"]
    assert not any(getattr(t, "_schema", None) and t._schema.is_mutable for t in calls)
