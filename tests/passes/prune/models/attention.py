"""Attention of many forms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.models.kinds import (
    ids,
    kind,
    mlp,
    randn,
)


class Block(nn.Module):
    """A pre-norm transformer block around some attention."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.body = attention, mlp(width, 2 * width, width)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x + self.attention(self.one(x), *more)
        return x + self.body(self.two(x))


class Stack(nn.Module):
    """A linear stem, learned positions, two blocks, a norm, a head."""

    def __init__(
        self, attention: Callable[[], nn.Module], width: int = 32, length: int = 6
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.position = nn.Parameter(torch.empty(length + 2, width))
        self.blocks = nn.ModuleList(Block(width, attention()) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SelfMHA(nn.Module):
    """PyTorch's own attention, of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class ViT(nn.Module):
    """Patches, a class token, position embeddings, PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 5)
        self.token, self.position = (nn.Parameter(torch.empty(1, n, 32)) for n in (1, 10))
        self.blocks = nn.Sequential(*(Block(32, SelfMHA(32, 4)) for _ in range(2)))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


kind("vit_own", randn(3, 12, 12))(ViT)


class FusedQKV(nn.Module):
    """One projection for queries, keys and values; heads by view, permute and unbind."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (
            self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, w))


kind("attention_fused", randn(6, 8))(lambda: Stack(FusedQKV))


class LiteralSizes(nn.Module):
    """Attention whose views hold numbers, its softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(-1, 6, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(-1, 6, 32))


kind("attention_literal", randn(6, 8))(lambda: Stack(LiteralSizes))


class EinsumAttention(nn.Module):
    """Attention by einsum over projections of three axes."""

    def __init__(self, width: int = 32, heads: int = 4, each: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.empty(width, heads, each)) for _ in range(3))
        self.out = nn.Parameter(torch.empty(heads, each, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhte,bhse->bhts", q, k).mul(8**-0.5).softmax(-1)
        return torch.einsum("bhts,bhse,hed->btd", weights, v, self.out)


kind("attention_einsum", randn(6, 8))(lambda: Stack(EinsumAttention))


class RotaryAttention(nn.Module):
    """Rotary positions over interleaved pairs."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads
        self.register_buffer("angles", torch.empty(8, width // heads // 2))

    def turned(self, x: Tensor) -> Tensor:
        a, b, angles = x[..., ::2], x[..., 1::2], self.angles[: x.shape[-2]]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


kind("attention_rotary", randn(6, 8))(lambda: Stack(RotaryAttention))


class Perceiver(nn.Module):
    """Learned queries attend to the inputs, of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, 5, 24))
        self.stem, self.head = nn.Linear(8, 40), nn.Linear(24, 3)
        self.cross = nn.MultiheadAttention(24, 3, kdim=40, vdim=40, batch_first=True)
        self.norm, self.body = nn.LayerNorm(24), mlp(24, 48, 24)

    def forward(self, x: Tensor) -> Tensor:
        h, q = F.gelu(self.stem(x)), self.latent.expand(x.shape[0], -1, -1)
        q = q + self.cross(q, h, h, need_weights=False)[0]
        return self.head((q + self.body(self.norm(q))).mean(1))


kind("cross_attention", randn(7, 8))(Perceiver)


class Decoding(nn.Module):
    """A decoder layer of PyTorch: self-attention with a causal mask, cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.context, self.head = nn.Linear(8, 32), nn.Linear(6, 32), nn.Linear(32, 3)
        self.layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.layer(self.stem(x), self.context(context), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


kind("decoder_layer", lambda n: (torch.randn(n, 5, 8), torch.randn(n, 7, 6)))(Decoding)


class Positions(nn.Module):
    """Tables of token, position and segment embeddings, added and normalised after."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(40, 32), nn.Embedding(12, 32)
        self.segments = nn.Parameter(torch.empty(2, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(where) + self.segments[(where > 3).long()]
        return self.head(self.layer(self.norm(x)))


kind("position_tables", ids(8, 40))(Positions)
