"""What weighs values: gates and attention, and what is made of them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt


class Experts(nn.Module):
    """Four layers without biases that are weighed; ``constant`` takes the weights for constants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.constant = False
        self.gate = nn.Linear(6, 4, bias=False)
        self.other = nn.Linear(6, 4, bias=False)
        self.experts = nn.Linear(6, 24, bias=False)
        self.leave = nn.Linear(6, 3, bias=False)

    def weights(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        weights = self.weights(x)
        weights = weights.detach() if self.constant else weights
        found = self.experts(x).unflatten(-1, (4, 6)) * weights[..., None]
        return self.leave(found.sum(1))


def of_two(self: Experts, x: Tensor) -> Tensor:
    values, places = self.gate(x).softmax(-1).topk(2, -1)
    values = values / (values.sum(-1, keepdim=True) + 1e-6)
    return torch.zeros(len(x), 4, dtype=x.dtype).scatter(-1, places, values)


def of_one(self: Experts, x: Tensor) -> Tensor:
    values, places = self.gate(x).softmax(-1).max(-1, keepdim=True)
    return torch.zeros(len(x), 4, dtype=x.dtype).scatter(-1, places, values)


def straight_through(self: Experts, x: Tensor) -> Tensor:
    soft = self.gate(x).softmax(-1)
    return F.one_hot(soft.argmax(-1), 4).to(x.dtype) - soft.detach() + soft


def stretched(self: Experts, x: Tensor) -> Tensor:
    return (torch.sigmoid(self.gate(x)) * 1.2 - 0.1).clamp(0, 1)


def twice(self: Experts, x: Tensor) -> Tensor:
    return torch.sigmoid(self.gate(x)) * torch.sigmoid(self.other(x))


def differential(self: Experts, x: Tensor) -> Tensor:
    return self.gate(x).softmax(-1) - 0.3 * self.other(x).softmax(-1)


def by_logarithm(self: Experts, x: Tensor) -> Tensor:
    return F.log_softmax(self.gate(x), -1).exp()


def activated(self: Experts, x: Tensor) -> Tensor:
    """No weights: values with a gate on them."""
    return torch.sigmoid(self.gate(x)) * torch.tanh(self.other(x))


WEIGHTS = [of_two, of_one, straight_through, stretched, twice, differential, by_logarithm]
X = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def model(weights: Any) -> Experts:
    return type("Weighed", (Experts,), {"weights": weights})().double()


def gradient(net: Experts) -> Tensor:
    """Gradient times input where the weights are constants: the layers have no biases."""
    net.constant = True
    x = X.clone().requires_grad_()
    (grad,) = torch.autograd.grad(net(x).amax(-1).sum(), x)
    return (x * grad).detach()


@pytest.mark.parametrize("weights", WEIGHTS, ids=lambda f: f.__name__)
def test_what_is_made_of_weights_alone_weighs(weights: Any) -> None:
    net = model(weights)
    found: Any = graphopt.explain(net, (X,))(X)
    torch.testing.assert_close(found.relevance["x"], gradient(net), rtol=1e-6, atol=1e-9)
    shared: Any = graphopt.explain(model(weights), (X,), composite="attnlrp")(X)
    assert not torch.allclose(shared.relevance["x"], found.relevance["x"])


def test_a_gated_activation_is_a_value() -> None:
    """Its product with a value is shared: neither says how much of the other one counts."""
    net = model(activated)
    found: Any = graphopt.explain(net, (X,))(X)
    assert not torch.allclose(found.relevance["x"], gradient(net))
