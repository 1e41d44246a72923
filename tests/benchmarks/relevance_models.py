"""Models whose explanations are timed: four samples, 64 tokens or an image each.

Transformers have 6 layers of width 384 (Llama and ViT too), attention as `sdpa`, random weights;
MiniLM and EfficientNet-Lite0 have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks.pruning_speed import WideResNet
from tests.zoo import ZOO
from tests.zoo.pretrained import photo

Inputs = dict[str, Any]

SAMPLES, TOKENS, WORDS = 4, 64, 1000


class VGG(nn.Module):
    """VGG-11 with a small head, for images of 64 pixels."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = 3
        for item in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"):
            if isinstance(item, int):
                layers += [nn.Conv2d(width, item, 3, padding=1), nn.ReLU()]
                width = item
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.head = nn.Sequential(
            nn.Flatten(), nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 1000)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Scores of a thousand classes."""
        return self.head(self.features(x))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS, hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
        intermediate_size=1536,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS, n_positions=128, n_embd=384, n_layer=6, n_head=12,
        bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=384, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=128,
        bos_token_id=0, eos_token_id=0, pad_token_id=0, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=6, intermediate_size=1536,
        image_size=128, patch_size=16,
    )  # fmt: skip
    return ViTForImageClassification(config)


def _ids() -> Inputs:
    return {"input_ids": torch.randint(1, WORDS, (SAMPLES, TOKENS))}


def _pixels(size: int) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(SAMPLES, 3, size, size)}


def _image(size: int) -> Callable[[], Inputs]:
    return lambda: {"x": torch.randn(SAMPLES, 3, size, size)}


def _sentences() -> Inputs:
    _, inputs = ZOO["minilm"].inputs(SAMPLES)
    return dict(inputs)


@dataclass(frozen=True)
class Subject:
    """A model and what it is explained on.

    Attributes:
        make: Makes the model.
        inputs: Makes its keyword inputs.
        lxt: The rules that LXT has for it.
        output: The output explained, if there are several.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    lxt: tuple[str, ...] = ()
    output: str | None = "logits"

    def build(self) -> tuple[nn.Module, Inputs]:
        """The model in eval mode, and its inputs; the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.make().eval(), self.inputs()


SUBJECTS: Mapping[str, Subject] = {
    "minilm": Subject(ZOO["minilm"].model, _sentences, ("attnlrp",), "pooler_output"),
    "bert": Subject(_bert, _ids, ("attnlrp",)),
    "gpt2": Subject(_gpt2, _ids, ("cp", "attnlrp")),
    "llama": Subject(_llama, _ids, ("cp", "attnlrp")),
    "vit": Subject(_vit, _pixels(128), ("cp", "attnlrp")),
    "resnet": Subject(WideResNet, _image(64), (), None),
    "vgg": Subject(VGG, _image(64), (), None),
    "efficientnet": Subject(
        ZOO["efficientnet_lite0"].model, lambda: {"inputs": photo(224, 2)}, (), None
    ),
}
