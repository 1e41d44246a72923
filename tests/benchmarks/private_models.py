"""Networks that `linearize` has emitted, for engines to run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from tests.zoo.vision import CNN, ResNet, UNet

Inputs = dict[str, Tensor]


class Mobile(nn.Module):
    """Inverted residuals as in MobileNetV2: depthwise convolutions and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = self._layer(3, 8, 3, stride=2)
        self.first = self._inverted(8, 24, 8)
        self.second = self._inverted(8, 24, 8)
        self.head = nn.Linear(8, 5)

    @staticmethod
    def _layer(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Module:
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU6(inplace=True))

    def _inverted(self, c_in: int, middle: int, c_out: int) -> nn.Module:
        return nn.Sequential(
            self._layer(c_in, middle, 1),
            self._layer(middle, middle, 3, groups=middle),
            nn.Conv2d(middle, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, 5)`` of images ``(batch, 3, n, n)``."""
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def vit() -> nn.Module:
    """A ViT of two layers: softmax, GELU, layer norm; weights as large as trained ones."""
    import transformers

    library: Any = transformers
    config = library.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        image_size=16, patch_size=4, num_labels=5, initializer_range=0.15,
    )  # fmt: skip
    return library.ViTForImageClassification(config)


def cnn() -> nn.Module:
    """Two residual blocks."""
    make: Any = CNN
    return make(16, 2)


@dataclass(frozen=True)
class Emitted:
    """A network and how it was linearized.

    Attributes:
        name: What it is called in tables.
        build: Makes the source.
        side: Pixels of the images that it takes.
        options: Of `linearize`.
        calibrated: Whether the pass sees data.
        argument: Name of the model's input.
    """

    name: str
    build: Callable[[], nn.Module]
    side: int
    options: str
    calibrated: bool = True
    argument: str = "x"

    def made(self) -> tuple[nn.Module, Inputs]:
        """The linearized network in eval mode, and an input of one sample."""
        torch.manual_seed(0)
        model = settled(self.build())
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(33, 3, self.side, self.side, generator=generator)
        batches: Any = [{self.argument: images[:32]}] if self.calibrated else None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ranges of random networks may grow
            module = graphopt.optimize(
                model,
                passes=f"canonicalize,linearize{{{self.options}}}",
                example_kwargs={self.argument: images[:2]},
                data=batches,
                time_limit=20.0,
            )
        return module.eval(), {self.argument: images[32:]}


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, norms with the statistics of what they read, as after training."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        generator = torch.Generator().manual_seed(2)
        model.train()
        with torch.no_grad():
            model(torch.randn(64, 3, 16, 16, generator=generator))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


EMITTED = (
    Emitted("resnet, affine", ResNet, 16, "relus=25%,replacement=affine"),
    Emitted("cnn, poly2", cnn, 16, "relus=25%,replacement=poly2"),
    Emitted("unet, auto", UNet, 16, "relus=25%"),
    Emitted("mobilenet, auto", Mobile, 16, "relus=25%"),
    Emitted("resnet, channels", ResNet, 16, "relus=25%,granularity=channel"),
    Emitted("resnet, 3 sites", ResNet, 16, "relu_sites=3,replacement=affine"),
    Emitted("resnet, data-free", ResNet, 16, "relus=25%", calibrated=False),
    Emitted("vit, gelu", vit, 16, "relus=25%,replacement=poly2", argument="pixel_values"),
)
