"""Small models whose planned steps are tested here."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ConvNet(nn.Module):
    """Convolutions with BatchNorm and residuals; budgets bite."""

    def __init__(self, width: int = 8, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x))) + x
        return self.head(x.mean((2, 3)))


class Dropped(nn.Module):
    """Linear layers with dropout after each."""

    def __init__(self, width: int = 64, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = nn.functional.dropout(torch.tanh(layer(x)), 0.3, self.training)
        return x


class TwoHeads(nn.Module):
    """Two outputs, of which a loss may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.one, self.two = nn.Linear(16, 64), nn.Linear(64, 4), nn.Linear(64, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.drop(torch.tanh(self.body(x)))
        return {"one": self.one(h), "two": self.two(h)}


def convnet() -> tuple[nn.Module, Tensor]:
    """The model and inputs of batch 6."""
    torch.manual_seed(0)
    return ConvNet(), torch.randn(6, 3, 16, 16)


def dropped() -> tuple[nn.Module, Tensor]:
    """The model and inputs of batch 128."""
    torch.manual_seed(0)
    return Dropped(), torch.randn(128, 64)
