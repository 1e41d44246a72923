"""The same function written in another way has the same relevance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt

Function = Callable[["Weights", Tensor], Tensor]


class Weights(nn.Module):
    """Weights that both ways of writing a function share."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))
        self.head, self.wide = nn.Linear(8, 3), nn.Linear(8, 24)
        self.gain = nn.Parameter(torch.rand(8) + 0.5)
        self.conv, self.norm = nn.Conv1d(5, 5, 3, padding=1), nn.BatchNorm1d(5)
        self.norm.running_mean = torch.randn(5)
        self.norm.running_var = torch.rand(5) + 0.5


class Written(nn.Module):
    def __init__(self, weights: Weights, function: Function) -> None:
        super().__init__()
        self.weights, self.function = weights, function

    def forward(self, x: Tensor) -> Tensor:
        return self.weights.head(self.function(self.weights, x)).sum(1)


def gelu_new(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3))))


def gelu_constants(x: Tensor) -> Tensor:
    half, root = torch.tensor(0.5, dtype=x.dtype), torch.tensor(2 / math.pi, dtype=x.dtype).sqrt()
    return half * x * (1 + torch.tanh(root * (x + 0.044715 * x * x * x)))


def written_softmax(x: Tensor) -> Tensor:
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def written_norm(x: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)


def rms(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def attention(w: Weights, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in w.wide(x).chunk(3, -1))
    return q, k, v


def eager(w: Weights, x: Tensor, softmax: Callable[..., Tensor]) -> Tensor:
    q, k, v = attention(w, x)
    y = softmax(q @ k.transpose(-1, -2) / 2) @ v
    return y.transpose(1, 2).flatten(2)


def fused(w: Weights, x: Tensor) -> Tensor:
    q, k, v = attention(w, x)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def separate(w: Weights, x: Tensor) -> Tensor:
    parts = zip(w.wide.weight.chunk(3), w.wide.bias.chunk(3), strict=True)
    q, k, v = (F.linear(x, a, b).unflatten(-1, (2, 4)).transpose(1, 2) for a, b in parts)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def folded(w: Weights, x: Tensor) -> Tensor:
    mean, variance = w.norm.get_buffer("running_mean"), w.norm.get_buffer("running_var")
    scale = w.norm.weight / torch.sqrt(variance + w.norm.eps)
    bias = (w.conv.get_parameter("bias") - mean) * scale + w.norm.bias
    return F.conv1d(x, w.conv.weight * scale[:, None, None], bias, padding=1)


PAIRS: dict[str, tuple[Function, Function]] = {
    "gelu_new": (
        lambda w, x: F.gelu(w.first(x), approximate="tanh"),
        lambda w, x: gelu_new(w.first(x)),
    ),
    "gelu_with_constant_tensors": (
        lambda w, x: F.gelu(w.first(x), approximate="tanh"),
        lambda w, x: gelu_constants(w.first(x)),
    ),
    "gelu_of_erf": (
        lambda w, x: F.gelu(w.first(x)),
        lambda w, x: w.first(x) * 0.5 * (1.0 + torch.erf(w.first(x) / math.sqrt(2.0))),
    ),
    "silu": (lambda w, x: F.silu(w.first(x)), lambda w, x: (y := w.first(x)) * torch.sigmoid(y)),
    "quick_gelu_in_steps": (
        lambda w, x: (y := w.first(x)) * torch.sigmoid(1.702 * y),
        lambda w, x: torch.mul(y := w.first(x), (y * 1.702).contiguous().sigmoid()),
    ),
    "hardswish": (
        lambda w, x: F.hardswish(w.first(x)),
        lambda w, x: (y := w.first(x)) * F.relu6(y + 3) / 6,
    ),
    "mish": (
        lambda w, x: F.mish(w.first(x)),
        lambda w, x: (y := w.first(x)) * torch.tanh(F.softplus(y)),
    ),
    "layer_norm": (lambda w, x: F.layer_norm(x, (8,)), lambda w, x: written_norm(x)),
    "rms_norm": (
        lambda w, x: F.rms_norm(x, (8,), w.gain, 1e-6),
        lambda w, x: w.gain * rms(x).to(x.dtype),
    ),
    "softmax": (
        lambda w, x: w.first(x).softmax(-1),
        lambda w, x: written_softmax(w.first(x)),
    ),
    "attention": (fused, lambda w, x: eager(w, x, lambda s: s.softmax(-1))),
    "attention_with_written_softmax": (fused, lambda w, x: eager(w, x, written_softmax)),
    "queries_keys_values_in_one": (fused, separate),
    "batch_norm": (lambda w, x: w.norm(w.conv(x)), folded),
    "split_linear": (
        lambda w, x: w.first(x),
        lambda w, x: (
            F.linear(x[..., :3], w.first.weight[:, :3])
            + F.linear(x[..., 3:], w.first.weight[:, 3:], w.first.bias)
        ),
    ),
    "linear_by_hand": (
        lambda w, x: w.first(x),
        lambda w, x: x @ w.first.weight.T + w.first.bias,
    ),
    "concatenated_linear": (
        lambda w, x: w.first(x),
        lambda w, x: torch.cat(
            [F.linear(x, w.first.weight[:3], w.first.bias[:3]),
             F.linear(x, w.first.weight[3:], w.first.bias[3:])], -1
        ),
    ),
    "identities": (
        lambda w, x: w.first(x).relu(),
        lambda w, x: F.dropout(
            (((w.first(x) + 0) * 1).reshape(-1, 4, 10).reshape(x.shape)).relu(), 0.5, False
        ).detach(),
    ),
    "products": (
        lambda w, x: (w.first(x) * w.second(x)) * w.third(x),
        lambda w, x: w.first(x) * (w.second(x) * w.third(x)),
    ),
    "swiglu": (
        lambda w, x: F.silu(w.first(x)) * w.second(x),
        lambda w, x: w.second(x) * ((y := w.first(x)) * y.sigmoid()),
    ),
    "in_place": (
        lambda w, x: torch.cat([x[..., :2] * 2, x[..., 2:]], -1).relu(),
        lambda w, x: written_in_place(x),
    ),
    "gru_gate": (
        lambda w, x: torch.sigmoid(-w.first(x)) * w.second(x),
        lambda w, x: (1 - torch.sigmoid(w.first(x))) * w.second(x),
    ),
    "gate_of_exponentials": (
        lambda w, x: torch.sigmoid(w.first(x)) * w.second(x),
        lambda w, x: 1 / (1 + torch.exp(-w.first(x))) * w.second(x),
    ),
    "gate_as_a_ratio": (
        lambda w, x: torch.sigmoid(w.first(x)) * w.second(x),
        lambda w, x: (e := torch.exp(w.first(x))) / (e + 1) * w.second(x),
    ),
    "softplus": (
        lambda w, x: F.softplus(w.first(x)),
        lambda w, x: torch.log(1 + torch.exp(w.first(x))),
    ),
    "softplus_of_log1p": (
        lambda w, x: F.softplus(w.first(x)),
        lambda w, x: w.first(x).exp().log1p(),
    ),
}  # fmt: skip


def written_in_place(x: Tensor) -> Tensor:
    y = x.clone()
    view = y[..., :2]
    view.mul_(2)
    y.relu_()
    return y


SIGNED = [
    (name, composite)
    for composite in ("excitation", "epsilon-plus")
    for name in ("linear_by_hand", "batch_norm", "gelu_of_erf", "layer_norm", "identities")
]
"""Rules that look at signs take a bias for what it is, however it is added."""


@pytest.mark.parametrize(
    ("name", "composite"),
    [*((n, c) for c in ("cp-lrp", "attnlrp") for n in PAIRS), *SIGNED],
)
def test_relevance_does_not_depend_on_how_it_is_written(name: str, composite: str) -> None:
    torch.manual_seed(0)
    weights = Weights().double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    found = []
    for function in PAIRS[name]:
        model = Written(weights, function)
        explained: Any = graphopt.explain(model, (x,), composite=composite)
        result = explained(x)
        torch.testing.assert_close(result.output, model(x))
        found.append(result.relevance["x"])
    scale = float(found[0].abs().max())
    assert float((found[0] - found[1]).abs().max()) <= 1e-7 * scale
