"""Relevance against zennit and LXT, where their rules and ours say the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.relevance.composite import Composite, Match
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Identity,
    Proportional,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)
from tests.passes.relevance.rules.layers import LAYERS as ALL
from tests.passes.relevance.rules.layers import drawn
from tests.passes.relevance.rules.naive import handed_back
from tests.peers.client import Lxt, needs_peers, zennit
from tests.peers.test_peers import (
    LAST,
    TOKENS,
    bert,
    gemma3,
    gpt2,
    llama,
    qwen2,
    qwen3,
    sharpened,
    vit,
)
from tests.peers.test_zennit import vgg

SIGN: tuple[float, Any] = (1e-6, "sign")  # zennit's stabiliser
LAYERS = ["linear", "linear of tokens", "conv1d", "conv2d", "depthwise", "conv3d"]
LAYERS += [name for name in ALL if name.startswith("conv_transpose")]

# zennit's class and parameters, and ours
RULES: dict[str, tuple[str, dict[str, Any], Rule]] = {
    "epsilon": ("Epsilon", {"epsilon": 1e-6}, Epsilon(*SIGN)),
    "large epsilon": ("Epsilon", {"epsilon": 0.25}, Epsilon(0.25, "sign")),
    "norm": ("Norm", {}, Epsilon(*SIGN)),
    "gamma": ("Gamma", {"gamma": 0.25}, Gamma(0.25, *SIGN)),
    "z-plus": ("ZPlus", {}, ZPlus(*SIGN)),
    "alpha-beta": ("AlphaBeta", {"alpha": 2.0, "beta": 1.0}, AlphaBeta(2.0, 1.0, "absorb", *SIGN)),
    "w-square": ("WSquare", {}, WSquare(True, *SIGN)),
    "flat": ("Flat", {}, Flat(*SIGN)),
    "z-box": ("ZBox", {"low": -3.0, "high": 4.0}, ZBox(-3.0, 4.0, *SIGN)),
}


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Equal, relative to the largest."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


@needs_peers
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_zennit_rule_by_rule(name: str, rule: str) -> None:
    layer, naive = drawn(name)
    kind, options, ours = RULES[rule]
    x, c = naive.x, naive.quotient
    expected = zennit(layer, x, c * layer(x), rule=kind, **options)
    for explicit in (False, True):
        found = handed_back(layer, x, ours, c, explicit=explicit)
        close(found.relevance[0], expected, 1e-9)


@needs_peers
@pytest.mark.parametrize("layer", [nn.ReLU(), nn.Tanh(), nn.GELU(), nn.SiLU()])
def test_zennit_passes_activations(layer: nn.Module) -> None:
    x, c = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    found = handed_back(layer, x, Identity(), c)
    close(found.relevance[0], zennit(layer, x, c * layer(x), rule="Pass"), 1e-9)


@needs_peers
def test_zennit_averages() -> None:
    layer, x = nn.AvgPool2d(2), torch.randn(2, 3, 4, 6).double()
    c = torch.randn_like(layer(x))
    found = handed_back(layer, x, Proportional("signed", *SIGN), c)
    close(found.relevance[0], zennit(layer, x, c * layer(x), rule="Norm"), 1e-9)


def _boxed() -> Composite:
    rules = composite_of("epsilon-gamma-box").stabilised(*SIGN)
    return rules.before((Match(family=("conv",), depth="first"), ZBox(-4.0, 4.0, *SIGN)))


def _absorbing(name: str) -> Composite:
    """What a sign that is missing would have taken is lost in zennit."""
    rules = composite_of(name).stabilised(*SIGN)
    own = (Match(family=("conv",)), AlphaBeta(2.0, 1.0, "absorb", *SIGN))
    flat = (Match(family=("conv",), depth="first"), Flat(*SIGN))
    return rules.before(*([flat] if "flat" in name else []), own)


BOX = {"low": -4 * torch.ones(1, 3, 1, 1), "high": 4 * torch.ones(1, 3, 1, 1)}
COMPOSITES: dict[str, tuple[dict[str, Any], Any]] = {
    "EpsilonPlus": ({}, lambda: composite_of("epsilon-plus").stabilised(*SIGN)),
    "EpsilonPlusFlat": ({}, lambda: composite_of("epsilon-plus-flat").stabilised(*SIGN)),
    "EpsilonGammaBox": (BOX, _boxed),
    "EpsilonAlpha2Beta1": ({}, lambda: _absorbing("epsilon-alpha2-beta1")),
    "EpsilonAlpha2Beta1Flat": ({}, lambda: _absorbing("epsilon-alpha2-beta1-flat")),
    "ExcitationBackprop": ({}, lambda: composite_of("excitation").stabilised(*SIGN)),
}


def deep() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A VGG with biases."""
    torch.manual_seed(1)
    net = nn.Sequential(
        *(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Dropout()),
        *(nn.Linear(8, 10), nn.ReLU(), nn.Linear(10, 4)),
    ).double()
    net.eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8).double()
    return net, x, net(x).argmax(1)


@needs_peers
@pytest.mark.parametrize("make", [vgg, deep], ids=["without biases", "with biases"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_zennit_composites(name: str, make: Any) -> None:
    torch.manual_seed(0)
    net, x, target = make()
    options, rules = COMPOSITES[name]
    output = net(x)
    relevance = output * F.one_hot(target, output.shape[1])
    expected = zennit(net, x, relevance, composite=name, **options)
    explained = graphopt.explain(net, (x,), composite=rules(), target=target)
    close(explained(x).relevance["input_1"], expected)


# --- LXT --------------------------------------------------------------------------------------


class Embedded(nn.Module):
    """A model of transformers on embedded tokens or on pixels; its logits."""

    def __init__(self, model: Any, name: str) -> None:
        super().__init__()
        self.model, self.name = model, name

    def forward(self, x: Tensor) -> Tensor:
        options = {} if self.name == "pixel_values" else {"use_cache": False}
        if self.model.config.model_type in ("bert", "vit"):
            options = {}
        return self.model(**{self.name: x}, **options).logits


def ours(model: Any, name: str, x: Tensor, target: Tensor, composite: Any) -> Any:
    """Our explanation of one logit of each sample."""

    def chosen(logits: Tensor) -> Tensor:
        return logits[(torch.arange(2), *target.T)]

    return graphopt.explain(Embedded(model, name), (x,), composite=composite, target=chosen)(x)


MODELS = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "gemma3": gemma3,
    "gpt2": gpt2,
    "bert": bert,
    "vit": vit,
}


CASES = [
    pytest.param(name, rules, attention, marks=[pytest.mark.slow] if is_slow else [])
    for name in MODELS
    for rules in ("attnlrp", "cp")
    for attention in ("sdpa", "eager")
    for is_slow in [attention == "eager" and name not in ("bert", "qwen3")]
    if (name, rules) != ("bert", "cp")  # LXT has none
]


@needs_peers
@pytest.mark.parametrize(("name", "rules", "attention"), CASES)
def test_lxt_on_its_families(name: str, rules: str, attention: str) -> None:
    model: Any = sharpened(MODELS[name]())
    model.set_attn_implementation(attention)
    torch.manual_seed(4)
    x = (
        torch.randn(2, 3, 8, 8).double()
        if name == "vit"
        else model.get_input_embeddings()(TOKENS).detach()
    )
    kind = "pixel_values" if name == "vit" else "inputs_embeds"
    target = torch.tensor([[1], [2]]) if name in ("vit", "bert") else LAST
    expected = Lxt.of(model, rules, attention).explain({kind: x}, target)
    composite = "attnlrp" if rules == "attnlrp" else "cp-lrp-activated"
    found = ours(model, kind, x, target, composite)
    torch.testing.assert_close(found.output, expected["output"], rtol=1e-6, atol=1e-6)
    close(found.relevance["x"], expected["relevance"])
