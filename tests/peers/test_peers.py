"""Is LXT run as it is meant to be?  The papers' equations by hand, and what is conserved."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from tests.peers import by_hand, environment
from tests.peers.client import Lxt, PeerError, config_for_4, missing, needs_peers

WIDTHS: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 30,
}
LLAMA: dict[str, Any] = {**WIDTHS, "num_key_value_heads": 2}


def sharpened(
    model: nn.Module, dtype: torch.dtype = torch.double, biases: bool = True
) -> nn.Module:
    """In eval mode, with weights so large that attention and activations do something."""
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
        elif name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2 * biases)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model.to(dtype).eval().requires_grad_(False)


def llama(layers: int = 1) -> nn.Module:
    config = transformers.LlamaConfig(**LLAMA, num_hidden_layers=layers, rope_theta=100.0)
    return transformers.LlamaForCausalLM(config)


def qwen2(layers: int = 1) -> nn.Module:
    return transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**LLAMA, num_hidden_layers=layers)
    )


def qwen3(layers: int = 1) -> nn.Module:
    config = transformers.Qwen3Config(**LLAMA, num_hidden_layers=layers, head_dim=6)
    return transformers.Qwen3ForCausalLM(config)


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = transformers.Gemma3TextConfig(
        **LLAMA, num_hidden_layers=3, head_dim=6, sliding_window=3, layer_types=kinds
    )
    return transformers.Gemma3ForCausalLM(config)


def bert(layers: int = 1) -> nn.Module:
    config = transformers.BertConfig(**WIDTHS, num_hidden_layers=layers, num_labels=3)
    return transformers.BertForSequenceClassification(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=4,
        vocab_size=30,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def vit() -> nn.Module:
    sizes = {n: v for n, v in WIDTHS.items() if n != "vocab_size"}
    config = transformers.ViTConfig(
        **sizes, num_hidden_layers=2, image_size=8, patch_size=4, num_labels=3
    )
    return transformers.ViTForImageClassification(config)


TOKENS = torch.tensor([[3, 14, 15, 9, 26], [5, 3, 5, 8, 9]])
LAST = torch.tensor([[4, 7], [4, 11]])  # position, token


@needs_peers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("rules", ["attnlrp", "cp"])
@pytest.mark.parametrize("make", [llama, qwen2, qwen3])
def test_lxt_is_the_papers_on_one_layer(make: Any, rules: str, attention: str) -> None:
    model = sharpened(make())
    found = Lxt.of(model, rules, attention).explain({"input_ids": TOKENS}, LAST)
    x = model.get_input_embeddings()(TOKENS)
    expected = by_hand.llama(model.state_dict(), model.config, x, LAST, rules)
    # LXT's norms and the eager softmax are in single precision whatever the model's is
    torch.testing.assert_close(found["inputs_embeds"], x)
    torch.testing.assert_close(
        found["relevance"], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max())
    )


@needs_peers
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_lxt_is_the_papers_on_one_layer_of_bert(attention: str) -> None:
    model = sharpened(bert())
    target = torch.tensor([[1], [2]])
    found = Lxt.of(model, attention=attention).explain({"input_ids": TOKENS}, target)
    x = model.get_input_embeddings()(TOKENS)
    expected = by_hand.bert(model.state_dict(), model.config, x, target)
    # the identity rule divides by x + 1e-10
    torch.testing.assert_close(found["relevance"], expected, rtol=1e-7, atol=1e-8)


def conserving(model: nn.Module, without: tuple[str, ...] = ()) -> nn.Module:
    """Only embeddings or pixels can get relevance: no biases, positions or class token."""
    model = sharpened(model, biases=False)
    added = ("wpe.weight", "position_embeddings", "position_embeddings.weight", "cls_token")
    for name, parameter in model.named_parameters():
        if name.endswith((*added, "token_type_embeddings.weight", *without)):
            nn.init.zeros_(parameter)
    return model


@needs_peers
@pytest.mark.parametrize("make", [llama, qwen2, qwen3, gemma3, gpt2, vit])
def test_cp_conserves_without_biases(make: Any) -> None:
    lxt = Lxt.of(conserving(make()), "cp")
    image = {"pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.double)}
    target = torch.tensor([[1], [2]]) if make is vit else LAST
    found = lxt.explain(image if make is vit else {"input_ids": TOKENS}, target)
    explained = found["output"][(torch.arange(2), *target.T)]
    sums = found["relevance"].flatten(1).sum(1)
    torch.testing.assert_close(sums, explained, rtol=1e-5, atol=1e-6)


@needs_peers
@pytest.mark.parametrize("make", [llama, qwen2, qwen3, gemma3, bert, gpt2])
def test_attnlrp_conserves_where_a_layer_does_not_attend(make: Any) -> None:
    """What it loses is lost in the softmax: nothing, where attention's output is not used."""
    output = ("o_proj.weight", "attention.output.dense.weight", "attn.c_proj.weight")
    model, target = conserving(make(), output), torch.tensor([[1], [2]]) if make is bert else LAST
    found = Lxt.of(model).explain({"input_ids": TOKENS}, target)
    explained = found["output"][(torch.arange(2), *target.T)]
    torch.testing.assert_close(found["relevance"].sum((1, 2)), explained, rtol=1e-5, atol=1e-6)
    attending = Lxt.of(conserving(make())).explain({"input_ids": TOKENS}, target)
    explained = attending["output"][(torch.arange(2), *target.T)]
    assert ((attending["relevance"].sum((1, 2)) - explained).abs() > 1e-2 * explained.abs()).all()


@needs_peers
@pytest.mark.parametrize("make", [llama, qwen2, qwen3, gemma3, bert, gpt2, vit])
def test_both_sides_have_the_same_model(make: Any) -> None:
    """The outputs are those of transformers 5 here; off, the patches leave the plain gradient."""
    model = sharpened(make(), torch.float)
    image = torch.randn(2, 3, 8, 8)
    inputs = {"pixel_values": image} if make is vit else {"input_ids": TOKENS}
    output = model(**inputs).logits
    target = LAST if output.ndim == 3 else torch.tensor([[1], [2]])
    lxt = Lxt.of(model)
    torch.testing.assert_close(lxt.explain(inputs, target)["output"], output, rtol=1e-4, atol=1e-5)

    x = (image if make is vit else model.get_input_embeddings()(TOKENS)).requires_grad_()
    again = model(**{"pixel_values" if make is vit else "inputs_embeds": x}).logits
    (gradient,) = torch.autograd.grad(again[(torch.arange(2), *target.T)].sum(), x)
    figures, tensors = lxt.cost(inputs, target, repeats=1, warmup=0)
    atol = 1e-5 * float(gradient.abs().max())
    torch.testing.assert_close(tensors["gradient"], gradient, rtol=1e-4, atol=atol)
    assert not torch.allclose(tensors["relevance"], x * gradient, rtol=1e-2)
    assert figures["seconds"] > 0
    assert min(figures["peak"], figures["reference_peak"]) > x.nbytes


@needs_peers
def test_the_peak_is_the_allocators() -> None:
    """Measured there and here on the same step: forward and input gradient."""
    from graphopt.cost.allocator import trace_memory

    model = sharpened(bert(3), torch.float)
    target = torch.tensor([[1], [2]])
    figures, _ = Lxt.of(model).cost({"input_ids": TOKENS}, target, repeats=1)
    x = model.get_input_embeddings()(TOKENS).requires_grad_()

    def step() -> Tensor:
        output = model(inputs_embeds=x).logits
        (found,) = torch.autograd.grad(output[(torch.arange(2), *target.T)].sum(), x)
        return found

    step()
    assert figures["reference_peak"] == pytest.approx(trace_memory(step).peak, rel=0.01)


@needs_peers
def test_what_lxt_lacks_is_said() -> None:
    with pytest.raises(PeerError, match="cp_LRP"):
        Lxt.of(bert(), "cp").explain({"input_ids": TOKENS}, torch.tensor([[0], [0]]))


# ---- without the environment ---------------------------------------------------------------------


def test_an_environment_that_is_not_there_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAPHOPT_PEERS", str(tmp_path))
    assert str(tmp_path) in str(missing())
    assert "python -m tests.peers.environment" in str(missing())
    assert not environment.is_complete(tmp_path)


def test_configurations_go_back_to_version_4() -> None:
    config = config_for_4(gemma3().config.to_dict())
    assert config["rope_theta"] == 1e6
    assert config["rope_local_base_freq"] == 1e4
    assert config["sliding_window_pattern"] == 2
    assert math.isclose(config_for_4(llama().config.to_dict())["rope_theta"], 100.0)
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ValueError, match="alternate"):
        config_for_4({"layer_types": kinds})
    with pytest.raises(ValueError, match="another kind"):
        config_for_4({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})
