"""What text models are made of, in modules of a few lines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import graphopt


class Doubled(torch.autograd.Function):
    """Twice the hyperbolic tangent; backward is another function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x.tanh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0


def test_an_autograd_function_is_what_its_forward_computes() -> None:
    """Bloom's GELU is one: relevance asks for no backward of the user's."""
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    class Net(nn.Module):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.first, self.last, self.activation = first, last, activation

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.activation(self.first(x)))

    x = torch.randn(3, 4).double()
    with_function = graphopt.explain(Net(Doubled.apply), (x,))(x)
    plain = graphopt.explain(Net(lambda t: 2 * t.tanh()), (x,))(x)
    torch.testing.assert_close(with_function.relevance, plain.relevance, rtol=0, atol=0)
    assert float(plain.relevance["x"].abs().min()) > 0
