"""Gates, mixers, recurrences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.models.kinds import (
    ids,
    kind,
    mlp,
    randn,
)


class ChunkGLU(nn.Module):
    """Gated units by chunk, then by F.glu."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(10, 64), nn.Linear(32, 48), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.one(x).chunk(2, dim=-1)
        return self.head(F.glu(self.two(value * F.gelu(gate)), dim=-1))


kind("glu_chunk", randn(10))(ChunkGLU)


class ConvGLU(nn.Module):
    """F.glu over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 48, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(48), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.norm(self.two(F.glu(self.one(x), 1))), 1))


kind("glu_conv", randn(3, 8, 8))(ConvGLU)


class RMSNorm(nn.Module):
    """Root-mean-square norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GatedMLP(nn.Module):
    """Pre-norm residual blocks with a gated MLP; one norm is PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4, bias=False)
        self.norms = nn.ModuleList([RMSNorm(32), nn.RMSNorm(32), RMSNorm(32)])
        self.gates = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(48, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            h = self.norms[i](x)
            x = x + self.downs[i](F.silu(self.gates[i](h)) * self.ups[i](h))
        return self.head(self.norms[2](x))


kind("gated_mlp", randn(6, 8))(GatedMLP)


class Mixer(nn.Module):
    """MLP-Mixer: MLPs over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(5))
        self.tokens = nn.ModuleList(mlp(16, 32, 16) for _ in range(2))
        self.channels = nn.ModuleList(mlp(24, 48, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


kind("mlp_mixer", randn(3, 16, 16))(Mixer)


class Recurrent(nn.Module):
    """Embedding, a recurrent network, the last step's state."""

    def __init__(self, cell: type[nn.Module], layers: int, both: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.rnn = cell(16, 24, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(48 if both else 24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


kind("lstm", ids(7, 30))(lambda: Recurrent(nn.LSTM, 1, False))
kind("gru", ids(7, 30))(lambda: Recurrent(nn.GRU, 2, False))
kind("lstm_bidirectional", ids(7, 30))(lambda: Recurrent(nn.LSTM, 2, True))


class TextClassifier(nn.Module):
    """Embeddings, the mean of those that are no padding, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 32, padding_idx=0), mlp(32, 48, 3)

    def forward(self, ids: Tensor) -> Tensor:
        valid = (ids != 3).unsqueeze(-1).to(self.embed.weight.dtype)
        return self.body((self.embed(ids) * valid).sum(1) / valid.sum(1).clamp(min=1))


kind("text_mean", ids(9, 40))(TextClassifier)
