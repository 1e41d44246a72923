"""Recurrent, attention and embedding models."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.registry import randn, zoo


def tokens(vocabulary: int, length: int) -> object:
    """A sampler of token ids of shape ``(batch, length)``."""
    return lambda batch: torch.randint(0, vocabulary, (batch, length))


@zoo(tokens(50, 12), name="lstm", tags="dropout rnn plan")
class LSTMClassifier(nn.Module):
    """Bidirectional two-layer LSTM with dropout between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.lstm = nn.LSTM(16, 24, 2, batch_first=True, dropout=0.2, bidirectional=True)
        self.head = nn.Linear(48, 4)

    def forward(self, ids: Tensor) -> Tensor:
        y, (hidden, _) = self.lstm(self.embed(ids))
        return self.head(y.mean(1) + torch.cat([hidden[-2], hidden[-1]], 1))


@zoo(randn(9, 6), name="gru", tags="dropout rnn plan")
class GRUNet(nn.Module):
    """Two-layer GRU with dropout, its state returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 10, 2, batch_first=True, dropout=0.25)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, state = self.gru(x)
        return self.head(y), state


@zoo(randn(7, 5), name="rnn_tanh", tags="rnn")
class ElmanNet(nn.Module):
    """A tanh RNN with an initial state made from the input's batch size."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(5, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        state = torch.zeros(1, x.size(0), 8, dtype=x.dtype, device=x.device)
        return self.rnn(x, state)[1].squeeze(0)


@zoo(randn(6, 5), name="lstm_cell", tags="rnn plan")
class UnrolledCell(nn.Module):
    """An LSTMCell unrolled by a Python loop over time."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(5, 7)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(x.shape[0], 7)
        cell = torch.zeros_like(hidden)
        seen = []
        for step in x.unbind(1):
            hidden, cell = self.cell(step, (hidden, cell))
            seen.append(hidden)
        return torch.stack(seen, 1)


class SDPA(nn.Module):
    """Self-attention through ``F.scaled_dot_product_attention`` with dropout."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.dropout, self.causal = heads, dropout, causal

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=self.causal
        )
        return self.out(y.transpose(1, 2).reshape(b, t, w))


@zoo(randn(16, 32), name="sdpa_dropout", tags="dropout plan")
class SDPABlock(nn.Module):
    """Two pre-norm transformer blocks over fused attention with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(32) for _ in range(2)])
        self.blocks = nn.ModuleList([SDPA(32, 4, 0.1, True), SDPA(32, 4, 0.1, False)])
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return self.head(x)


@zoo(
    lambda n: ((torch.randn(n, 8, 16), torch.arange(8).expand(n, 8) < 6), {}),
    name="multihead_attention",
    tags="dropout plan",
)
class MultiheadAttentionNet(nn.Module):
    """``nn.MultiheadAttention`` with weights returned and a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, key_padding_mask=~valid)
        return self.norm(x + y), weights


@zoo(randn(10, 16), name="transformer_encoder", tags="dropout plan")
class Encoder(nn.Module):
    """``nn.TransformerEncoder`` of two post-norm layers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


@zoo(
    lambda n: ((torch.randn(n, 6, 16), torch.randn(n, 5, 16)), {}),
    name="transformer",
    tags="dropout plan",
)
class EncoderDecoder(nn.Module):
    """``nn.Transformer`` with a causal target mask."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Transformer(16, 2, 1, 1, 24, dropout=0.1, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
        return self.model(source, target, tgt_mask=mask, tgt_is_causal=True)


@zoo(tokens(20, 9), name="embedding_padding", tags="plan")
class PaddedEmbedding(nn.Module):
    """``padding_idx`` (its row gets no gradient), a bag of embeddings and a masked mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12, padding_idx=0)
        self.bag = nn.EmbeddingBag(20, 12, mode="sum")
        self.head = nn.Linear(12, 6)

    def forward(self, ids: Tensor) -> Tensor:
        mask = (ids != 0).unsqueeze(-1).float()
        pooled = (self.embed(ids) * mask).sum(1) / mask.sum(1).clamp_min(1.0)
        return self.head(pooled + self.bag(ids))


@zoo(tokens(40, 11), name="tied_weights", tags="tied dropout plan")
class TiedLanguageModel(nn.Module):
    """Embedding and output head share one parameter; position ids are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.position = nn.Embedding(32, 16)
        self.register_buffer("ids", torch.arange(32), persistent=False)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 16))
        self.head = nn.Linear(16, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.position(self.ids[: ids.shape[1]])
        return self.head(x + self.body(x))


@zoo(
    lambda n: {
        "ids": torch.randint(0, 30, (n, 8)),
        "mask": torch.ones(n, 8, dtype=torch.bool),
        "labels": torch.randint(0, 4, (n,)),
    },
    name="dict_kwargs",
    tags="dropout plan",
)
class DictOutputs(nn.Module):
    """Keyword arguments in (one left at ``None``), a dict of outputs with the loss out."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(16, 4)

    def forward(
        self,
        ids: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        scale: float = 1.0,
    ) -> dict[str, Tensor]:
        x = self.embed(ids)
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        if bias is not None:
            x = x + bias
        logits = self.head(self.drop(x.mean(1))) * scale
        out = {"logits": logits, "hidden": x}
        if labels is not None:
            out["loss"] = F.cross_entropy(logits, labels)
        return out


@zoo(randn(5, 6, 8), name="einsum", tags="plan")
class EinsumNet(nn.Module):
    """Bilinear attention written with einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(8, 2, 4) / 3)
        self.k = nn.Parameter(torch.randn(8, 2, 4) / 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.einsum("bstd->btsd", x)
        q = torch.einsum("btsd,dhe->bthse", x, self.q)
        k = torch.einsum("btsd,dhe->bthse", x, self.k)
        scores = torch.einsum("bthse,bthre->bthsr", q, k).log_softmax(-1)
        return torch.einsum("bthsr,btrd->bhtsd", scores, x)


@zoo(randn(32), name="fft", tags="plan complex")
class FourierBlock(nn.Module):
    """A spectral layer with complex weights and complex activations."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(17, dtype=torch.complex64))
        self.mix = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        spectrum = torch.fft.rfft(x, norm="ortho") * self.weight
        y = torch.fft.irfft(spectrum, n=32, norm="ortho")
        return self.mix(F.relu(y)), spectrum.abs()
