"""Transformers of two layers, from their configs with random weights, for benchmarks.

ViT (width 384, batch 4, 197 tokens), BERT (width 384, batch 8, 128 tokens, dropout .1) and Llama
(width 256, batch 4, 128 tokens). `+qv` and `+all` freeze the model and add LoRA of rank 8 to the
projections of query and value, or to every linear layer of the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from tests.zoo.registry import Inputs, ZooModel


def vit() -> nn.Module:
    """ViT for classification."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def bert() -> nn.Module:
    """BERT for classification, with its dropout of .1."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536,
        vocab_size=1000,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> nn.Module:
    """Llama for language modelling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=688,
        vocab_size=1000,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _images(batch: int) -> Inputs:
    return (), {"pixel_values": torch.randn(batch, 3, 224, 224), "labels": torch.arange(batch)}


def _sentences(batch: int) -> Inputs:
    ids = torch.randint(0, 1000, (batch, 128))
    return (), {"input_ids": ids, "labels": torch.zeros(batch).long()}


def _text(batch: int) -> Inputs:
    ids = torch.randint(0, 1000, (batch, 128))
    return (), {"input_ids": ids, "labels": ids}


class LoRA(nn.Module):
    """A frozen linear layer and a trainable product of rank 8 beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 8, bias=False)
        self.up = nn.Linear(8, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both."""
        return self.linear(x) + self.up(self.down(x))


def with_lora(factory: Callable[[], nn.Module], wanted: Callable[[str], bool]) -> nn.Module:
    """A model that is frozen but for its classifier, with the wanted linear layers adapted."""
    model = factory()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for path, part in list(model.named_modules()):
        for name, child in list(part.named_children()):
            if "layer" in path and isinstance(child, nn.Linear) and wanted(name):
                setattr(part, name, LoRA(child))
    return model


_FAMILIES = {"vit384": (vit, _images, 4), "bert384": (bert, _sentences, 8),
             "llama256": (llama, _text, 4)}  # fmt: skip
_ADAPTED: Mapping[str, Callable[[str], bool]] = {
    "qv": lambda name: name in ("query", "value", "q_proj", "v_proj"),
    "all": lambda _: True,
}
TRANSFORMERS: dict[str, ZooModel] = {}
for _family, (_factory, _sample, _batch) in _FAMILIES.items():
    TRANSFORMERS[_family] = ZooModel(_family, _factory, _sample, _batch)
    for _variant, _wanted in _ADAPTED.items():
        _name = f"{_family}+{_variant}"
        _adapted = partial(with_lora, _factory, _wanted)
        TRANSFORMERS[_name] = ZooModel(_name, _adapted, _sample, _batch)
