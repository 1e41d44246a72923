"""Attention, written in the ways in which people write it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.linearize.nets import Net, drawn

Attend = Callable[[Any, Tensor, Tensor, Tensor, Tensor], Tensor]
HEADS, WIDTH, LENGTH = 4, 6, 7
LOW = torch.finfo(torch.float32).min


def attention(attend: Attend, *, groups: int = 1, head: bool = True) -> nn.Module:
    """Vectors ``[batch, length, 12]`` and booleans ``[batch, length]``: which of them count."""

    def forward(net: Any, x: Tensor, counts: Tensor) -> Tensor:
        heads = [
            part.unflatten(-1, (-1, WIDTH)).transpose(1, 2)
            for part in (net.q(x), net.k(x), net.v(x))
        ]
        mixed = attend(net, heads[0], heads[1], heads[2], counts[:, None, None, :])
        found = mixed.transpose(1, 2).flatten(2)
        return net.out(found) if head else found

    torch.manual_seed(1)
    own = HEADS * WIDTH // groups
    net: Any = Net(
        forward, q=nn.Linear(12, HEADS * WIDTH), k=nn.Linear(12, own), v=nn.Linear(12, own),
        out=nn.Linear(HEADS * WIDTH, 5), drop=nn.Dropout(0.3),
    )  # fmt: skip
    with torch.no_grad():
        net.q.weight *= 3.0
    settled: nn.Module = net.eval()
    return settled


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-1, -2) / math.sqrt(WIDTH)


def added(counts: Tensor, low: float = LOW) -> Tensor:
    return (1.0 - counts.to(torch.float32)) * low


def _summed(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return net.drop(torch.softmax(scores(q, k) + added(counts), -1)) @ v


def _filled(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return F.softmax(scores(q, k).masked_fill(~counts, -math.inf), -1) @ v


def _chosen(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    low = torch.full([], LOW, dtype=q.dtype, device=q.device)
    return torch.einsum("bhqk,bhkd->bhqd", torch.where(counts, scores(q, k), low).softmax(-1), v)


def _batched(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    shape = (*q.shape[:3], k.shape[2])
    mask = added(counts).expand(shape).reshape(-1, *shape[2:])
    flat = [t.reshape(-1, *t.shape[2:]) for t in (q / math.sqrt(WIDTH), k, v)]
    p = torch.baddbmm(mask, flat[0], flat[1].transpose(1, 2)).softmax(-1)
    return torch.bmm(p, flat[2]).view_as(q)


def _viewed(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    x = scores(q, k).unsqueeze(1) + added(counts, -math.inf).nan_to_num(0.0, neginf=LOW)[:, None]
    p = x.view_as(scores(q, k)).softmax(-1, dtype=torch.float32).to(q.dtype)
    return p @ v


def _one_op(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, counts, net.drop.p if net.training else 0.0)


def _one_op_added(net: Any, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
    low = torch.zeros_like(counts, dtype=q.dtype).masked_fill(~counts, -math.inf)
    return F.scaled_dot_product_attention(q, k, v, low, scale=0.3)


FORMS: dict[str, Attend] = {
    "summed": _summed, "filled": _filled, "chosen": _chosen, "batched": _batched,
    "viewed": _viewed, "one_op": _one_op, "one_op_added": _one_op_added,
}  # fmt: skip


def inputs(batch: int = 5, length: int = LENGTH, seed: int = 3) -> tuple[Tensor, Tensor]:
    """Vectors, of which the last ones of each sample don't count."""
    lengths = 2 + torch.arange(batch) % (length - 1)
    return drawn(batch, length, 12, seed=seed), torch.arange(length) < lengths[:, None]
