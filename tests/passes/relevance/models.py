"""Architectures beyond the zoo, small and with random weights: only their operators matter here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.registry import ZooModel

MODELS: dict[str, ZooModel] = {}

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.3,
}  # fmt: skip


def ids(batch: int) -> Any:
    return (), {"input_ids": torch.randint(3, 64, (batch, 7))}


def pixels(size: int = 32) -> Callable[[int], Any]:
    return lambda batch: ((), {"pixel_values": torch.randn(batch, 3, size, size)})


def waves(batch: int) -> Any:
    return (), {"input_values": torch.randn(batch, 400)}


def library(
    name: str,
    family: str,
    head: str,
    sample: Callable[[int], Any],
    attention: str = "sdpa eager",
    model: str = "",
    **config: Any,
) -> None:
    """A model of the transformers library, with fused and with written-out attention."""

    def make(attention: str) -> Callable[[], nn.Module]:
        def factory() -> nn.Module:
            import transformers

            kind = getattr(transformers, family + "Config")
            made = kind(**config)
            made._attn_implementation = attention
            return getattr(transformers, (model or family) + head)(made)

        return factory

    for way in attention.split():
        full = name if way == "sdpa" else f"{name}_{way}"
        MODELS[full] = ZooModel(full, make(way), sample, batch=2, requires=("transformers",))


def decoder(name: str, family: str, model: str = "", **config: Any) -> None:
    config = SIZES | {"use_cache": False} | config
    library(name, family, "ForCausalLM", ids, "sdpa eager", model, **config)


def encoder(
    name: str, family: str, head: str, attention: str = "sdpa eager", **config: Any
) -> None:
    config = SIZES | config
    library(name, family, head, ids, attention, **config)


encoder("roberta", "Roberta", "ForSequenceClassification")
encoder("electra", "Electra", "ForSequenceClassification", embedding_size=8)
encoder("albert", "Albert", "ForSequenceClassification", embedding_size=8)
encoder("mpnet", "MPNet", "ForSequenceClassification", attention="eager")
encoder("deberta", "Deberta", "ForSequenceClassification", relative_attention=True,
        pos_att_type=["c2p", "p2c"], attention="eager")  # fmt: skip
encoder("deberta_v2", "DebertaV2", "ForSequenceClassification", relative_attention=True,
        pos_att_type=["c2p", "p2c"], attention="eager")  # fmt: skip
encoder("data2vec", "Data2VecText", "ForSequenceClassification")
library("distilbert", "DistilBert", "ForSequenceClassification", ids, vocab_size=64, dim=16,
        n_layers=2, n_heads=2, hidden_dim=24, max_position_embeddings=32)  # fmt: skip
encoder("modernbert", "ModernBert", "ForSequenceClassification", cls_token_id=1, sep_token_id=2)
decoder("qwen3", "Qwen3", num_key_value_heads=1, head_dim=8)
decoder("gemma3", "Gemma3Text", model="Gemma3", num_key_value_heads=1, head_dim=8, sliding_window=4)
decoder("mistral", "Mistral", num_key_value_heads=1, sliding_window=4)
decoder("phi", "Phi")
decoder("gpt_neox", "GPTNeoX")
decoder("opt", "OPT", ffn_dim=24, word_embed_proj_dim=16)
decoder("falcon", "Falcon", num_kv_heads=1, alibi=False)
decoder("cohere", "Cohere", num_key_value_heads=1)
library("xlnet", "XLNet", "ForSequenceClassification", ids, attention="eager",
        vocab_size=64, d_model=16, n_layer=2,
        n_head=2, d_inner=24)  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 32, "patch_size": 8,
}  # fmt: skip
for family in ("DeiT", "Beit", "Data2VecVision", "Dinov2"):
    library(family.lower(), family, "ForImageClassification", pixels(), **VISION)
library("convnext", "ConvNext", "ForImageClassification", pixels(), attention="eager",
        depths=[1, 1],
        hidden_sizes=[8, 16], num_stages=2)  # fmt: skip
library("convnext_v2", "ConvNextV2", "ForImageClassification", pixels(), attention="eager",
        depths=[1, 1],
        hidden_sizes=[8, 16], num_stages=2)  # fmt: skip
library("segformer", "Segformer", "ForImageClassification", pixels(64), depths=[1, 1],
        hidden_sizes=[8, 16], num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2])  # fmt: skip
library(
    "pvt",
    "Pvt",
    "ForImageClassification",
    pixels(64),
    attention="eager",
    image_size=64,
    depths=[1, 1],
    hidden_sizes=[8, 16],
    num_encoder_blocks=2,
    sequence_reduction_ratios=[2, 1],
    patch_sizes=[4, 2],
    strides=[4, 2],
    num_attention_heads=[1, 2],
    mlp_ratios=[2, 2],
)
library("wav2vec2", "Wav2Vec2", "ForSequenceClassification", waves, **SIZES,
        conv_dim=[8, 8], conv_kernel=[10, 3], conv_stride=[5, 2], num_feat_extract_layers=2,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, layerdrop=0.0,
        apply_spec_augment=False)  # fmt: skip


def own(name: str, *shape: int, **fields: Any) -> Callable[[Any], Any]:
    """A network written here, with one floating input."""

    def declare(factory: Any) -> Any:
        sample = fields.pop("sample", lambda batch: ((torch.randn(batch, *shape),), {}))
        MODELS[name] = ZooModel(name, factory, sample, batch=2, **fields)
        return factory

    return declare


@own("vgg", 3, 16, 16)
def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.Conv2d(b, b, 3, padding=1)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 12), nn.ReLU(), nn.Linear(12, 5))


class SqueezeExcite(nn.Module):
    """MobileNet-v3's block: hard-swish, and channels weighed by a hard sigmoid of their means."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.norm = nn.Conv2d(3, 12, 1, bias=False), nn.BatchNorm2d(12)
        self.depth = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.down, self.up, self.head = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.depth(F.hardswish(self.norm(self.expand(x)))))
        gate = F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(y, 1)))))
        return self.head((y * gate).mean((2, 3)))


own("mobilenet_v3", 3, 12, 12)(SqueezeExcite)


class Conformer(nn.Module):
    """Half a feed-forward, attention, a gated depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.feed = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.SiLU(), nn.Linear(24, 12))
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.point, self.depth = nn.Conv1d(12, 24, 1), nn.Conv1d(12, 12, 3, padding=1, groups=12)
        self.norm, self.last, self.head = nn.BatchNorm1d(12), nn.LayerNorm(12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0.5 * self.feed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        y = F.glu(self.point(x.transpose(1, 2)), 1)
        x = x + F.silu(self.norm(self.depth(y))).transpose(1, 2)
        return self.head(self.last(x).mean(1))


own("conformer", 9, 12)(Conformer)


class WaveNet(nn.Module):
    """Dilated causal convolutions with tanh times sigmoid, skips added."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(2, 8, 1)
        self.dilated = nn.ModuleList(nn.Conv1d(8, 16, 2, dilation=2**i) for i in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        skips = torch.zeros_like(x)
        for index, conv in enumerate(self.dilated):
            value, gate = conv(F.pad(x, (2**index, 0))).chunk(2, 1)
            y = value.tanh() * gate.sigmoid()
            x, skips = x + y, skips + y
        return self.head(skips.amax(-1))


own("wavenet", 2, 12)(WaveNet)


class PointNet(nn.Module):
    """Shared layers, the largest over points, and a predicted rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 9))
        self.points = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        turn = self.turn(x).amax(1).unflatten(1, (3, 3)) + torch.eye(3, dtype=x.dtype)
        return self.head(self.points(torch.bmm(x, turn)).max(1).values)


own("pointnet", 10, 3)(PointNet)


class GraphNet(nn.Module):
    """Graph attention and convolution over a dense adjacency."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.left, self.right = nn.Linear(8, 1), nn.Linear(8, 1)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        degree = adjacency.sum(-1, keepdim=True).clamp(min=1)
        h = F.relu(adjacency.to(x.dtype) / degree @ self.first(x))
        scores = F.leaky_relu(self.left(h) + self.right(h).transpose(1, 2), 0.2)
        weights = scores.masked_fill(adjacency == 0, -torch.inf).softmax(-1).nan_to_num()
        return self.head(F.elu(weights @ self.second(h)).mean(1))


own(
    "graph_attention",
    sample=lambda n: ((torch.randn(n, 6, 5), torch.randint(0, 2, (n, 6, 6))), {}),
)(GraphNet)


class HyperNet(nn.Module):
    """Weights made from the input, and a bilinear form."""

    def __init__(self) -> None:
        super().__init__()
        self.make, self.pair, self.head = nn.Linear(6, 36), nn.Bilinear(6, 6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bij,bj->bi", self.make(x).unflatten(1, (6, 6)), x)
        return self.head(self.pair(y, x).relu())


own("hypernet", 6)(HyperNet)


class StateSpace(nn.Module):
    """A diagonal state space: a recurrence with a decay, as einsum over a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.into, self.out = (nn.Parameter(torch.rand(6, 4)) for _ in range(3))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.shape[1], dtype=x.dtype)
        kernel = torch.einsum(
            "hn,hnl->hl", self.into * self.out, torch.exp(-self.decay[..., None] * steps)
        )
        gap = (steps[:, None] - steps[None]).clamp(min=0).long()
        full = kernel[:, gap] * torch.ones(len(steps), len(steps), dtype=x.dtype).tril()
        return self.head(F.gelu(torch.einsum("htk,bkh->bth", full, x)).mean(1))


own("state_space", 8, 6)(StateSpace)


class Spectral(nn.Module):
    """A Fourier layer: mixing in frequency, and FNet's real part."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5, 6, 2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.fft.rfft(x, dim=1) * torch.view_as_complex(self.scale)
        y = x + torch.fft.irfft(y, n=x.shape[1], dim=1)
        y = y + torch.fft.fft2(y, dim=(1, 2)).real
        return self.head(F.gelu(y).mean(1))


own("spectral", 8, 6)(Spectral)


class Recurrent(nn.Module):
    """A recurrent layer of any kind, its last step and its mean."""

    def __init__(self, kind: str, **options: Any) -> None:
        super().__init__()
        self.layer = getattr(nn, kind)(6, 8, num_layers=2, **options)
        self.first = options.get("batch_first", False)
        width = options.get("proj_size", 8) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x if self.first else x.transpose(0, 1))[0]
        return self.head(y.mean(1 if self.first else 0))


own("lstm_projected", 5, 6)(lambda: Recurrent("LSTM", proj_size=4, batch_first=True))
own("lstm_both_ways", 5, 6)(lambda: Recurrent("LSTM", bidirectional=True))
own("gru_both_ways", 5, 6)(lambda: Recurrent("GRU", bidirectional=True, batch_first=True))
own("rnn_relu", 5, 6)(lambda: Recurrent("RNN", nonlinearity="relu", bias=False))


class Tables(nn.Module):
    """Categories with an offset for each column, a bag of words, and one-hot rows."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.bag = nn.Embedding(12, 6), nn.EmbeddingBag(9, 6, mode="mean")
        self.weight, self.head = nn.Parameter(torch.randn(4, 6)), nn.Linear(6, 3)

    def forward(self, columns: Tensor, words: Tensor) -> Tensor:
        offsets = torch.tensor([0, 4, 8])
        y = self.rows(columns + offsets).sum(1) + self.bag(words)
        y = y + F.one_hot(columns[:, 0], 4).to(y.dtype) @ self.weight
        return self.head(y.tanh())


own("tables", sample=lambda n: ((torch.randint(0, 4, (n, 3)), torch.randint(0, 9, (n, 5))), {}))(
    Tables
)
