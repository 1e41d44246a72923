"""AttnLRP and CP-LRP of one layer of a transformer, written out from the papers' equations.

AttnLRP: Achtibat et al., ICML 2024, Props. 3.1, 3.3, 3.4 and Eqs. 8, 9; CP-LRP: Ali et al., ICML
2022.  All is in terms of the coefficient `c = R / x` of a value `x`, which for rules without
stabiliser needs no division: `R = x c` is taken at the input alone.  No autograd is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = Mapping[str, Tensor]
HALF = {"attnlrp": 0.5, "cp": 0.0}


def heads(x: Tensor, count: int) -> Tensor:
    """(batch, tokens, width) -> (batch, heads, tokens, width of a head)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def unheads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(-2)


@dataclass
class Attention:
    """softmax(q k^T / sqrt(d) + mask) v, and its coefficients."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    rules: str

    def __post_init__(self) -> None:
        self.scale = self.q.shape[-1] ** -0.5
        scores = self.q @ self.k.mT * self.scale
        self.p = (scores + self.mask).softmax(-1)
        self.out = self.p @ self.v

    def back(self, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prop. 3.3 on both products, Prop. 3.1 on the softmax; CP: the probabilities are given."""
        half = HALF[self.rules]
        c_p = half * c @ self.v.mT
        c_s = self.p * (c_p - (self.p * c_p).sum(-1, keepdim=True)) * self.scale
        c_v = (1 - half) * self.p.mT @ c
        return half * c_s @ self.k, half * c_s.mT @ self.q, c_v


def rotate(x: Tensor, base: float, sign: float = 1.0) -> Tensor:
    """Rotary embedding (halves, as in Llama); its transpose with sign -1."""
    half = x.shape[-1] // 2
    turns = base ** (-torch.arange(half, dtype=x.dtype) / half)
    angle = torch.arange(x.shape[-2], dtype=x.dtype)[:, None] * turns
    cos, sin = angle.cos(), sign * angle.sin()
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rms(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The value, and the factor from its coefficient to the input's (Prop. 3.4: identity)."""
    factor = weight * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    return x * factor, factor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(-1, keepdim=True)
    factor = weight * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return centred * factor + bias, factor


def centre(c: Tensor) -> Tensor:
    """Coefficient of x from that of x - mean(x)."""
    return c - c.mean(-1, keepdim=True)


def llama(w: Weights, config: Any, x: Tensor, target: Tensor, rules: str) -> Tensor:
    """Relevance at the embeddings of a Llama or Qwen of one layer; `target`: position and token."""
    n, groups, eps = config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
    base, own = config.rope_parameters["rope_theta"], "model.layers.0."

    def linear(a: Tensor, name: str) -> Tensor:
        return F.linear(a, w[own + name + ".weight"], w.get(own + name + ".bias"))

    def normed(a: Tensor, name: str) -> tuple[Tensor, Tensor]:
        weight = w.get(own + f"self_attn.{name}_norm.weight")
        return rms(a, weight, eps) if weight is not None else (a, torch.ones_like(a))

    h, norm1 = rms(x, w[own + "input_layernorm.weight"], eps)
    q, norm_q = normed(heads(linear(h, "self_attn.q_proj"), n), "q")
    k, norm_k = normed(heads(linear(h, "self_attn.k_proj"), groups), "k")
    v = heads(linear(h, "self_attn.v_proj"), groups)
    shared = n // groups
    wide = [a.repeat_interleave(shared, 1) for a in (rotate(k, base), v)]
    mask = torch.full((x.shape[1],) * 2, -torch.inf, dtype=x.dtype).triu(1)
    attention = Attention(rotate(q, base), *wide, mask, rules)
    y = x + linear(unheads(attention.out), "self_attn.o_proj")
    g, norm2 = rms(y, w[own + "post_attention_layernorm.weight"], eps)
    gate, up = linear(g, "mlp.gate_proj"), linear(g, "mlp.up_proj")
    z = y + linear(F.silu(gate) * up, "mlp.down_proj")
    _, norm3 = rms(z, w["model.norm.weight"], eps)

    c = torch.zeros_like(x)
    rows = torch.arange(len(x))
    c[rows, target[:, 0]] = w["lm_head.weight"][target[:, 1]]
    c_z = c * norm3
    half = HALF[rules]  # of a product; CP: the gate is given
    c_gated = c_z @ w[own + "mlp.down_proj.weight"]
    c_gate = half * c_gated * up * F.silu(gate) / gate  # identity rule: c_in = c y / x
    c_up = (1 - half) * c_gated * F.silu(gate)
    c_g = c_gate @ w[own + "mlp.gate_proj.weight"] + c_up @ w[own + "mlp.up_proj.weight"]
    c_y = c_z + c_g * norm2
    c_q, c_k, c_v = attention.back(heads(c_y @ w[own + "self_attn.o_proj.weight"], n))
    c_k, c_v = (a.unflatten(1, (groups, shared)).sum(2) for a in (c_k, c_v))
    c_q, c_k = rotate(c_q, base, -1.0) * norm_q, rotate(c_k, base, -1.0) * norm_k
    named = {"q": c_q, "k": c_k, "v": c_v}
    c_h = sum(unheads(a) @ w[own + f"self_attn.{n}_proj.weight"] for n, a in named.items())
    return x * (c_y + c_h * norm1)


def bert(w: Weights, config: Any, x: Tensor, target: Tensor) -> Tensor:
    """Relevance at the word embeddings of a BERT classifier of one layer: AttnLRP, no mask."""
    own, eps, n = "bert.encoder.layer.0.", config.layer_norm_eps, config.num_attention_heads

    def linear(a: Tensor, name: str) -> Tensor:
        return F.linear(a, w[name + ".weight"], w[name + ".bias"])

    def norm(a: Tensor, name: str) -> tuple[Tensor, Tensor]:
        return layer_norm(a, w[name + ".LayerNorm.weight"], w[name + ".LayerNorm.bias"], eps)

    positions = w["bert.embeddings.position_embeddings.weight"][: x.shape[1]]
    kinds = w["bert.embeddings.token_type_embeddings.weight"][0]
    e, norm0 = norm(x + positions + kinds, "bert.embeddings")
    names = [own + f"attention.self.{a}" for a in ("query", "key", "value")]
    q, k, v = (heads(linear(e, a), n) for a in names)
    attention = Attention(q, k, v, torch.zeros((), dtype=x.dtype), "attnlrp")
    attended = linear(unheads(attention.out), own + "attention.output.dense")
    y, norm1 = norm(e + attended, own + "attention.output")
    inner = linear(y, own + "intermediate.dense")
    z, norm2 = norm(y + linear(F.gelu(inner), own + "output.dense"), own + "output")
    pooled = linear(z[:, 0], "bert.pooler.dense")

    c_pooled = w["classifier.weight"][target[:, 0]] * pooled.tanh() / pooled
    c = torch.zeros_like(x)
    c[:, 0] = c_pooled @ w["bert.pooler.dense.weight"]
    c = centre(c * norm2)
    c_inner = c @ w[own + "output.dense.weight"] * F.gelu(inner) / inner
    c = centre((c + c_inner @ w[own + "intermediate.dense.weight"]) * norm1)
    parts = attention.back(heads(c @ w[own + "attention.output.dense.weight"], n))
    c_e = c + sum(unheads(p) @ w[a + ".weight"] for p, a in zip(parts, names, strict=True))
    return x * centre(c_e * norm0)
