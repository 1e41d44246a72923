"""What a kind of model is, and what models are made of."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Sample = Callable[[int], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        factory: Makes the model.
        sample: Makes inputs of a batch size.
        hf: Whether it needs the transformers library.
    """

    factory: Callable[[], nn.Module]
    sample: Sample
    hf: bool = False

    def __call__(self, batch: int = 2) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its arguments, the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = self.factory().eval()
            randomise(model)
            inputs = self.sample(batch)
        return model, inputs if isinstance(inputs, tuple) else (inputs,)


MODELS: dict[str, Kind] = {}


def kind(name: str, sample: Sample, **fields: Any) -> Callable[[Any], Any]:
    """Declare a model: decorates a class or a factory."""

    def declare(factory: Any) -> Any:
        assert name not in MODELS
        MODELS[name] = Kind(factory, sample, **fields)
        return factory

    return declare


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Give all parameters and buffers random values; variances are positive."""
    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("inv_freq"):
                tensor.uniform_(0.1, 1)
            else:
                tensor.normal_(0, scale)


def randn(*shape: int) -> Sample:
    """A sampler of normal tensors of shape ``(batch, *shape)``."""
    return lambda batch: torch.randn(batch, *shape)


def ids(length: int, vocabulary: int) -> Sample:
    """A sampler of token ids."""
    return lambda batch: torch.randint(1, vocabulary, (batch, length))


def conv_bn(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, and BatchNorm."""
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def classifier(*body: nn.Module, width: int, classes: int = 5) -> nn.Sequential:
    """A body of convolutions, global pooling, a head."""
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*body, *pool)
