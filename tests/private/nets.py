"""Small networks that the engines' tests share, each with an input and what it compares."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt


class Plain(nn.Module):
    """Two convolutions and ReLUs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self.head = nn.Linear(4 * 3 * 3, 5)

    def activation(self, x: Tensor, site: int) -> Tensor:
        return F.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.first(x), 0)
        x = self.activation(self.second(x), 1)
        return self.head(x.flatten(1))


class Gathered(Plain):
    """`Plain` with a tenth of each site's ReLUs kept: gathered, passed through, put back."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        for site, size in enumerate((4 * 6 * 6, 4 * 3 * 3)):
            kept = torch.randperm(size, generator=generator)[: size // 10].sort().values
            self.register_buffer(f"kept{site}", kept)

    def activation(self, x: Tensor, site: int) -> Tensor:
        kept = getattr(self, f"kept{site}")
        flat = x.flatten(1)
        compared = F.relu(flat.index_select(1, kept))
        return flat.index_copy(1, kept, compared).view_as(x)


class Blended(Gathered):
    """`Gathered` as published code writes it: a mask times every ReLU."""

    def activation(self, x: Tensor, site: int) -> Tensor:
        flat = x.flatten(1)
        mask = torch.zeros(flat.shape[1]).index_fill(0, getattr(self, f"kept{site}"), 1.0)
        return (mask * F.relu(flat) + (1 - mask) * flat).view_as(x)


class Polynomial(Plain):
    """`Plain` with the degree-2 polynomial nearest to a ReLU at N(0, 1)."""

    def activation(self, x: Tensor, site: int) -> Tensor:
        return 0.1995 * x * x + 0.5 * x + 0.1995


class Pooled(nn.Module):
    """Overlapping and padded max pooling, average pooling, ReLU6, leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.depthwise = nn.Conv2d(3, 3, 3, padding=1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu6(4 * self.conv(x)), 3, 2, 1)
        x = F.leaky_relu(self.depthwise(x), 0.1)
        return F.adaptive_avg_pool2d(F.avg_pool2d(x, 2), 1).flatten(1)


class Residual(nn.Module):
    """A residual block with batch norms of running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
        )
        self.head = nn.Linear(4, 3)
        for norm in (self.norm, self.block[1], self.block[4]):
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.block(x))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Causal attention, layer norm and GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.norm = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        heads = [t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = self.norm(x + mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def emitted() -> nn.Module:
    """`Residual` with a quarter of its ReLUs kept, the rest replaced by polynomials."""
    images = torch.randn(32, 1, 12, 12)
    spec = "canonicalize,linearize{relus=25%,replacement=poly2}"
    return graphopt.optimize(
        Residual().eval(), passes=spec, example_inputs=(images[:2],), data=[images], time_limit=5.0
    )


IMAGE = (1, 1, 12, 12)
NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (Plain, IMAGE),
    "gathered": (Gathered, IMAGE),
    "blended": (Blended, IMAGE),
    "polynomial": (Polynomial, IMAGE),
    "pooled": (Pooled, IMAGE),
    "residual": (Residual, IMAGE),
    "attention": (Attention, (1, 5, 8)),
    "emitted": (emitted, IMAGE),
}


def build(name: str, batch: int = 1) -> tuple[nn.Module, Tensor]:
    """A network in eval mode and an input."""
    torch.manual_seed(0)
    factory, shape = NETS[name]
    model = factory().eval()
    return model, torch.randn(batch, *shape[1:])


def gathered() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """For the command line: ``tests/private/nets.py:gathered``."""
    model, x = build("gathered")
    return model, (x,)
