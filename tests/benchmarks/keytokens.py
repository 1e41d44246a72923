"""Sequences whose class two key tokens decide among distractors, and a BERT of two layers for them.

Which tokens matter is known. Needs torch and transformers alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PAD, MASK = 0, 1
CLASSES = 4
LENGTH, SHORTEST = 24, 16
_FIRST, _SECOND = 2, 2 + CLASSES  # where both kinds of key tokens begin
_OTHERS = 2 + 2 * CLASSES
VOCABULARY = 64
_MASKED = 0.3


def sequences(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw sequences with one key token of each of two kinds; the class is their sum modulo 4.

    Neither key says anything alone. Between them stand distractors and mask tokens, so that a
    sequence of which tokens are removed is nothing new.

    Returns:
        Ids ``(count, LENGTH)``, attention mask ``(count, LENGTH)``, classes ``(count,)``, and masks
        ``(count, LENGTH)``, bool, of the two key tokens.
    """
    generator = torch.Generator().manual_seed(seed)

    def drawn(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = drawn(_OTHERS, VOCABULARY, count, LENGTH)
    masked = torch.rand(count, 1, generator=generator) * 2 * _MASKED
    ids[torch.rand(count, LENGTH, generator=generator) < masked] = MASK
    lengths = drawn(SHORTEST, LENGTH + 1, count)
    inside = torch.arange(LENGTH) < lengths[:, None]
    places = torch.rand(count, LENGTH, generator=generator).masked_fill(~inside, 2).argsort(1)
    first, second = drawn(0, CLASSES, count), drawn(0, CLASSES, count)
    rows = torch.arange(count)
    ids[rows, places[:, 0]] = _FIRST + first
    ids[rows, places[:, 1]] = _SECOND + second
    truth = torch.zeros(count, LENGTH, dtype=torch.bool)
    truth[rows[:, None], places[:, :2]] = True
    return ids.where(inside, PAD), inside.long(), (first + second) % CLASSES, truth


class TextClassifier(nn.Module):
    """A BERT, the mean over its tokens, and a linear layer."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def pooled(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Mean of the last states over what isn't padding, ``(batch, width)``."""
        out: Any = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
        weights = attention_mask.unsqueeze(-1).to(out.last_hidden_state.dtype)
        return (out.last_hidden_state * weights).sum(1) / weights.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores of the classes."""
        return self.head(self.pooled(input_ids, attention_mask))


def network() -> TextClassifier:
    """Two layers of width 64 and four heads, with random weights."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=PAD,
        initializer_range=0.1,  # with the usual 0.02 it does not learn in this time
    )
    return TextClassifier(BertModel(config, add_pooling_layer=False), 64, CLASSES)


def trained(seed: int = 0, steps: int = 1500, batch: int = 64) -> nn.Module:
    """A trained network, in eval mode."""
    ids, mask, classes, _ = sequences(steps * batch, seed)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        net = network().train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for rows in torch.arange(len(ids)).split(batch):
        loss = F.cross_entropy(net(ids[rows], mask[rows]), classes[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, seed: int = 1, count: int = 4000) -> float:
    """Share of fresh sequences that are read rightly."""
    ids, mask, classes, _ = sequences(count, seed)
    parts = torch.arange(count).split(500)
    found = torch.cat([net(ids[rows], mask[rows]).argmax(1) for rows in parts])
    return float((found == classes).double().mean())
