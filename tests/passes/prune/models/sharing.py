"""Parameters and modules used more than once, or in uncommon ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.models.kinds import (
    conv_bn,
    kind,
    mlp,
    randn,
)


class Siamese(nn.Module):
    """One encoder for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 16), nn.ReLU(), conv_bn(16, 32, stride=2))
        self.head = nn.Linear(64, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a).mean((2, 3)), self.encoder(b).mean((2, 3))
        return self.head(torch.cat([(a - b).abs(), a * b], -1))


kind("shared_module", lambda n: tuple(torch.randn(2, n, 3, 8, 8)))(Siamese)


class Looped(nn.Module):
    """One residual block run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
        self.block = nn.Sequential(nn.LayerNorm(32), *mlp(32, 64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


kind("block_looped", randn(8))(Looped)


class TwoOutputs(nn.Module):
    """Logits, and the features that they come from as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.box = mlp(12, 48, 32), mlp(32, 24, 4)
        self.classes = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.trunk(x))
        return {"box": self.box(h), "classes": self.classes(h).log_softmax(-1)}


kind("two_outputs", randn(12))(TwoOutputs)


class Bare(nn.Module):
    """Parameters without layers: F.linear, matmul from both sides, addmm, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(32, 10)), nn.Parameter(torch.empty(32, 24))
        self.c, self.d = nn.Parameter(torch.empty(40, 24)), nn.Parameter(torch.empty(40, 5))
        self.bias, self.scale = nn.Parameter(torch.empty(24)), nn.Parameter(torch.empty(1, 40))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.a))
        y = torch.addmm(self.bias, y, self.b).relu()
        y = (self.c @ y.t()).t() * self.scale
        return y @ self.d


kind("bare_parameters", randn(10))(Bare)


class Slices(nn.Module):
    """Parts of a layer's output go different ways, and come together in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(10, 64), nn.Linear(32, 16), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        left, right = y[:, :32], y[:, 32:]
        return self.down(torch.cat([right.sigmoid(), F.relu(self.mid(left))], dim=-1))


kind("slices", randn(10))(Slices)


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 48), nn.Linear(48, 16)
        self.biases = nn.ParameterList([torch.empty(48), torch.empty(20)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.two(torch.tanh(self.one(x)))
        y = torch.tanh(F.linear(z, self.two.weight.t(), self.biases[0]))
        return F.linear(y, self.one.weight.t(), self.biases[1])


kind("tied_autoencoder", randn(20))(TiedAutoencoder)


class SoftExperts(nn.Module):
    """Every expert computes, and a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 24), nn.Linear(24, 4), nn.Linear(24, 3)
        self.experts = nn.ModuleList(mlp(24, 32, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        weights = self.router(h).softmax(-1)
        mixed = torch.stack([expert(h) for expert in self.experts], dim=-2)
        return self.head(h + (weights.unsqueeze(-1) * mixed).sum(-2))


kind("soft_experts", randn(5, 8))(SoftExperts)


class BatchedExperts(nn.Module):
    """Experts as one parameter of three axes, by bmm and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 3)
        self.up, self.down = (
            nn.Parameter(torch.empty(4, 16, 40)), nn.Parameter(torch.empty(4, 40, 16))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x.unsqueeze(0).expand(4, -1, -1), self.up)
        y = torch.bmm(F.gelu(h), self.down)
        return self.head(torch.einsum("end,ne->nd", y, self.router(x).softmax(-1)))


kind("batched_experts", randn(16))(BatchedExperts)
