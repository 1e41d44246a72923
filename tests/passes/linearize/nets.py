"""Small models with non-linearities in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import graphopt


class Net(nn.Module):
    """Some layers, and a function of them and the inputs."""

    def __init__(self, function: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def mlp(*acts: nn.Module) -> nn.Module:
    """Vectors of 6, a layer of 8 before each activation."""
    acts = acts or (nn.ReLU(), nn.ReLU())
    layers: list[nn.Module] = []
    for index, act in enumerate(acts):
        layers += [nn.Linear(8 if index else 6, 8), act]
    return settled(nn.Sequential(*layers, nn.Linear(8, 3)))


def cnn(*acts: nn.Module, pool: nn.Module | None = None) -> nn.Module:
    """Images of 3x8x8; a ReLU in front, one after pooling to 4x4."""
    acts = acts or (nn.ReLU(), nn.ReLU())
    return settled(
        nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), acts[0],
            pool or nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), acts[-1],
            nn.Flatten(), nn.Linear(96, 5),
        )
    )  # fmt: skip


def settled(model: nn.Module) -> nn.Module:
    """In eval mode, with norms whose statistics aren't the trivial ones."""
    generator = torch.Generator().manual_seed(5)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator))
            module.running_var.uniform_(0.2, 2.0, generator=generator)
    return model.eval()


def drawn(*shape: int, seed: int = 3) -> Tensor:
    """Inputs that don't depend on what was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linearized(model: nn.Module, *args: Any, spec: str = "relus=25%", **options: Any) -> Any:
    """By the pass alone, on its example inputs unless other data is given."""
    options = {"data": [args[0] if len(args) == 1 else args], "time_limit": 10.0} | options
    return graphopt.optimize(
        model, None, args, passes=f"canonicalize,linearize{{{spec}}}", **options
    )


def section(module: Any) -> dict[str, Any]:
    """The report's section."""
    found: dict[str, Any] = module.report.to_dict()["linearize"]
    return found
