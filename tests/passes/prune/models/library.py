"""Models of the transformers library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.passes.prune.models.kinds import (
    Sample,
    ids,
    kind,
    randn,
)
from tests.zoo import ZOO


class Logits(nn.Module):
    """A model of the zoo that takes its inputs by place, and gives its logits alone."""

    def __init__(self, name: str, inputs: Sequence[str], **fixed: Any) -> None:
        super().__init__()
        self.model, self.inputs, self.fixed = ZOO[name].model(), inputs, fixed

    def forward(self, *args: Tensor) -> Tensor:
        given = dict(zip(self.inputs, args, strict=True))
        return self.model(**given, **self.fixed, return_dict=True).logits


def padded(length: int) -> Sample:
    """Token ids with a mask of which the last two are padding."""

    def sample(batch: int) -> tuple[Tensor, ...]:
        mask = (torch.arange(length) < length - 2).long().expand(batch, length).clone()
        return torch.randint(1, 96, (batch, length)), mask

    return sample


def _zoo(name: str, inputs: str, sample: Sample, entry: str | None = None) -> None:
    kind(name, sample, hf=True)(lambda: Logits(entry or name, inputs.split()))


def _two_ids(batch: int) -> tuple[Tensor, ...]:
    return torch.randint(1, 96, (batch, 9)), torch.randint(1, 96, (batch, 6))


def _speech(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 8, 60), torch.randint(1, 96, (batch, 6))


_zoo("hf_vit", "pixel_values", randn(3, 16, 16), "vit")
_zoo("hf_bert", "input_ids attention_mask", padded(9), "bert")
_zoo("hf_gpt2", "input_ids", ids(9, 96), "gpt2")
_zoo("hf_llama_gqa", "input_ids attention_mask", padded(9), "llama")
_zoo("hf_t5", "input_ids decoder_input_ids", _two_ids, "t5")
_zoo("hf_whisper", "input_features decoder_input_ids", _speech, "whisper")
_zoo("hf_mamba", "input_ids", ids(5, 96), "mamba")
_zoo("hf_swin", "pixel_values", randn(3, 32, 32), "swin")


class OwnLogits(nn.Module):
    """A model of the library by its configuration."""

    def __init__(self, family: str, head: str, **config: Any) -> None:
        super().__init__()
        import transformers

        config = {"vocab_size": 64, "pad_token_id": 0, **config}
        self.model = getattr(transformers, family + head)(
            getattr(transformers, family + "Config")(**config)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


@kind("hf_llama_tied", ids(9, 64), hf=True)
def llama_tied() -> nn.Module:
    return OwnLogits(
        "Llama", "ForCausalLM", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, tie_word_embeddings=True,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@kind("hf_distilbert", ids(9, 64), hf=True)
def distilbert() -> nn.Module:
    return OwnLogits(
        "DistilBert", "ForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=48,
        max_position_embeddings=32,
    )  # fmt: skip
