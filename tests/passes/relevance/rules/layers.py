"""Linear layers and convolutions in every form that a graph may have them in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.relevance.rules.naive import Calls, Naive

CONV = (1, 2, 3, 4)


def _time_first(m: Any, x: Tensor) -> Tensor:
    return F.linear(x.transpose(0, 1), m.w, m.b).transpose(0, 1)


def _folded_tokens(m: Any, x: Tensor) -> Tensor:
    return torch.addmm(m.b, x.flatten(0, 1), m.w.t(), beta=0.5, alpha=-2).unflatten(
        0, (x.shape[0], -1)
    )


# name -> (how it is made, shape of the input, dimensions of a row of the operation's result)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "linear of tokens": (lambda: nn.Linear(6, 5), (2, 3, 6)),
    "time first": (lambda: Calls(_time_first, w=(4, 5), b=(4,)), (2, 3, 5)),
    "addmm of tokens": (lambda: Calls(_folded_tokens, w=(4, 5), b=(4,)), (2, 3, 5)),
    "addmm with a scalar bias": (
        lambda: Calls(lambda m, x: torch.addmm(m.b, x, m.w), w=(5, 4), b=(1,)),
        (3, 5),
    ),
    "matmul": (lambda: Calls(lambda m, x: x @ m.w, w=(5, 4)), (2, 3, 5)),
    "matmul from the left": (lambda: Calls(lambda m, x: m.w @ x, w=(4, 5)), (2, 5, 3)),
    "bmm": (
        lambda: Calls(lambda m, x: torch.bmm(x, m.w.expand(x.shape[0], -1, -1)), w=(1, 5, 4)),
        (2, 3, 5),
    ),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=2, dilation=2), (2, 3, 5, 6)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 4, 3, stride=2, bias=False), (2, 2, 5, 6)),
    "conv2d, same": (lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 2, 4, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 2, 3, 4, 3)),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
    "conv_transpose2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 3, 4),
    ),
    "conv_transpose3d": (
        lambda: nn.ConvTranspose3d(2, 2, 2, dilation=2, bias=False),
        (1, 2, 3, 2, 3),
    ),
}


@functools.cache
def _model(name: str) -> nn.Module:
    """One for all tests, which don't change it, so that it is captured once."""
    torch.manual_seed(3)
    layer = LAYERS[name][0]().double().requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def drawn(name: str, sign: str = "mixed") -> tuple[nn.Module, Naive]:
    """A layer in double precision, and its reference with an input and relevance."""
    layer, shape = _model(name), LAYERS[name][1]
    torch.manual_seed(4)
    x = torch.randn(shape, dtype=torch.double)
    x = x.abs() if sign == "positive" else x
    z = layer(x)
    rows = tuple(range(1, z.ndim)) if "conv" in name or name == "depthwise" else (-1,)
    return layer, Naive(layer, x, torch.randn_like(z), rows)
