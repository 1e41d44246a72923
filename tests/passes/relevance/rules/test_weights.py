"""Rules for layers, against what they are contribution by contribution."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from graphopt.passes.relevance.composite import matches
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    Epsilon,
    Flat,
    Gamma,
    Identity,
    Rule,
    WSquare,
    ZBox,
    ZPlus,
)
from graphopt.passes.relevance.rules.base import WEIGHTED
from tests.passes.relevance.rules.layers import LAYERS, drawn
from tests.passes.relevance.rules.naive import Calls, Naive, handed_back

RULES: dict[str, Rule] = {
    "epsilon 0": Epsilon(),
    "epsilon": Epsilon(0.01),
    "epsilon, sign": Epsilon(0.1, "sign"),
    "epsilon, clip": Epsilon(0.3, "clip"),
    "epsilon, unsigned": Epsilon(0.1, "unsigned"),
    "gamma": Gamma(0.5),
    "gamma, stabilised": Gamma(0.25, 0.01, "sign"),
    "z-plus": ZPlus(),
    "z-plus, stabilised": ZPlus(1e-3),
    "alpha-beta": AlphaBeta(),
    "alpha-beta, absorbing": AlphaBeta(3.0, 2.0, "absorb", 0.01, "sign"),
    "w-square": WSquare(),
    "w-square with bias": WSquare(bias=True),
    "flat": Flat(),
    "z-box": ZBox(-2.0, 4.0),
}


def compare(layer: nn.Module, naive: Naive, rule: Rule, inputs: torch.Tensor | None = None) -> None:
    """Both emitters give the reference's relevance, the bias its share, and add up."""
    expected, bias = naive.rule(rule.name, **rule.options())
    size = float(expected.abs().max())
    x = naive.x if inputs is None else inputs
    for explicit in (False, True):
        found = handed_back(layer, x, rule, naive.quotient, explicit=explicit)
        torch.testing.assert_close(found.relevance[0], expected, rtol=1e-11, atol=1e-12 * size)
        booked = found.ledger.get("bias", torch.zeros_like(bias))
        torch.testing.assert_close(booked, bias, rtol=1e-11, atol=1e-12 * size)
        found.check(1e-12)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_a_rule_is_its_definition(name: str, rule: Rule) -> None:
    layer, naive = drawn(name)
    compare(layer, naive, rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_a_rule_behind_a_relu_is_the_same(rule: Rule) -> None:
    """Known signs save work and change nothing."""
    layer, naive = drawn("conv2d", "positive")
    compare(nn.Sequential(nn.ReLU(), layer), naive, rule)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("name", ["linear of tokens", "conv1d", "conv_transpose2d"])
def test_single_precision_adds_up(name: str, rule: Rule) -> None:
    layer, naive = drawn(name)
    x, c = naive.x.float(), naive.quotient.float()
    single = copy.deepcopy(layer).float()
    for explicit in (False, True):
        handed_back(single, x, rule, c, explicit=explicit).check(1e-6)


def test_bounds_by_channel() -> None:
    layer, naive = drawn("conv2d")
    compare(layer, naive, ZBox((-1.0, -2.0, -3.0), (3.0, 2.0, 1.0)))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("emitter", ["auto", "explicit"])
def test_a_bias_that_is_data(rule: Rule, emitter: str) -> None:
    """``beta y + alpha x W``: what the bias takes is handed on to where it comes from."""
    torch.manual_seed(0)
    model = Calls(lambda m, x, y: torch.addmm(y, x, m.w, beta=-2.0, alpha=3.0), w=(5, 4)).double()
    x, y = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    quotient = torch.randn(3, 4).double()
    found = handed_back(model, (x, y), rule, quotient, explicit=emitter == "explicit")
    for row in range(3):  # with the other one given, it is a layer with a bias
        own = slice(row, row + 1)
        naive = Naive(lambda a, r=own: model(a, y[r]), x[own], quotient[own])
        expected, bias = naive.rule(rule.name, **rule.options())
        torch.testing.assert_close(found.relevance[0][own], expected, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(found.relevance[1][own].sum(1), bias, rtol=1e-11, atol=1e-11)
    found.check(1e-12)


def test_results_of_zero_absorb() -> None:
    """Where nothing contributes there is nothing to share: the ledger says so."""
    layer = nn.Linear(3, 2).double()
    nn.init.zeros_(layer.bias)
    some: list[Rule] = [ZPlus(), AlphaBeta(), AlphaBeta(missing="absorb"), Gamma(), Epsilon(1e-6)]
    for rule in some:
        model = nn.Sequential(layer, nn.Sigmoid())
        # sigmoid(0) = 1/2, and the identity hands all of it on
        rules = composite_of("cp-lrp").before(matches([Family.ACTIVATION], Identity()))
        rules = rules.before(matches(WEIGHTED, rule))
        x = torch.tensor([[0.0, 0.0, 0.0], [1.0, -2.0, 3.0]]).double()
        found = handed_back(model, x, rules, torch.ones(2, 2).double())
        assert bool(torch.isfinite(found.relevance[0]).all())
        found.check(1e-12)
        assert float(found.ledger["epsilon"][0]) == pytest.approx(1.0)
        assert float(found.ledger["epsilon"][1]) == pytest.approx(0.0, abs=1e-5) or not isinstance(
            rule, Gamma | Epsilon
        )


# --- norms behind layers ----------------------------------------------------------------------


def _norm(kind: type[nn.Module], channels: int) -> Any:
    norm: Any = kind(channels).double().eval()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
    return norm


class _Folded(nn.Module):
    """A layer and the norm behind it as one matrix."""

    def __init__(self, layer: nn.Module, norm: Any) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x))


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize(
    "name",
    [
        "linear",
        "linear without bias",
        "addmm with a scalar bias",
        "conv1d",
        "conv2d without bias",
        "depthwise",
        "conv3d",
        "conv_transpose2d",
        "conv_transpose3d",
    ],
)
def test_a_norm_behind_a_layer_is_a_part_of_it(name: str, rule: Rule) -> None:
    """The reference takes both for one affine map, whose weights are measured."""
    layer, plain = drawn(name)
    norms = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    model = _Folded(layer, _norm(norms[plain.z.unflatten(1, plain.shape[1:]).ndim], plain.shape[1]))
    naive = Naive(model.requires_grad_(False), plain.x, plain.quotient, plain.rows)
    compare(model, naive, rule)


def test_a_norm_stays_where_the_layer_is_read_elsewhere() -> None:
    """Then the layer's own result counts: relevance is that of the two apart."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 3, 3).double(), _norm(nn.BatchNorm2d, 3)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = conv, norm

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    x = torch.randn(2, 2, 5, 5).double()
    c = torch.randn(2, 3, 3, 3).double()
    found = handed_back(Both().eval(), x, ZPlus(), c)
    found.check(1e-12)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    inner = Naive(conv, x, (c * (scale.view(-1, 1, 1) + 1)).detach(), (1, 2, 3))
    torch.testing.assert_close(found.relevance[0], inner.z_plus()[0], rtol=1e-10, atol=1e-10)
