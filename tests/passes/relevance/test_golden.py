"""Facts that any implementation of relevance has to give, from outside of this one."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.passes.relevance.composite import Match
from graphopt.passes.relevance.patterns import fit
from graphopt.passes.relevance.presets import PRESETS, composite_of
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    AttnLRP,
    CPAttention,
    Epsilon,
    Flat,
    Gamma,
    PatternAttribution,
    PatternNet,
    Proportional,
    Rule,
    SoftmaxTaylor,
    WSquare,
    ZPlus,
)
from tests.passes.relevance.rules.layers import drawn
from tests.passes.relevance.rules.naive import Calls, handed_back

EMITTERS = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """Equal, relative to the largest."""
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * size)


# --- 1: gradient times input ------------------------------------------------------------------


class Residual(nn.Module):
    """A ReLU network without biases, with a branch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.second = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.last = nn.Linear(16, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(y + self.second(y))
        return self.last(F.adaptive_avg_pool2d(y, 2).flatten(1))


@functools.cache
def residual() -> tuple[Residual, Tensor, Tensor]:
    net = Residual().double()
    x = torch.randn(2, 2, 4, 4).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf)[:, 0].sum(), leaf)
    return net, x, gradient * x


def at_first(net: nn.Module, x: Tensor) -> Tensor:
    return torch.zeros_like(net(x)).index_fill(1, torch.tensor([0]), 1.0)


@EMITTERS
def test_lrp_0_is_gradient_times_input(explicit: bool) -> None:
    net, x, expected = residual()
    for name in ("lrp-0", "cp-lrp", "attnlrp", "gradient-x-input"):
        found = handed_back(net, x, name, at_first(net, x), explicit=explicit)
        close(found.relevance[0], expected, 1e-13)


@pytest.mark.parametrize("stabiliser", ["rms", "sign"])
def test_epsilon_goes_to_it_at_a_known_rate(stabiliser: Any) -> None:
    """The difference is linear in epsilon."""
    net, x, expected = residual()
    errors = []
    for eps in (1e-7, 1e-6, 1e-5, 1e-4):
        rules = composite_of("epsilon").stabilised(eps, stabiliser)
        found = handed_back(net, x, rules, at_first(net, x))
        errors.append(float((found.relevance[0] - expected).abs().max()))
    slopes = [math.log10(b / a) for a, b in itertools.pairwise(errors)]
    assert slopes == pytest.approx([1.0, 1.0, 1.0], abs=0.05)


def test_shares_by_size_are_something_else() -> None:
    """A sum of both signs: absolute ratios are no gradient times input."""
    net, x, expected = residual()
    found = handed_back(net, x, "dynamic", at_first(net, x)).relevance[0]
    assert float((found - expected).abs().max()) > 0.05 * float(expected.abs().max())


# --- 2: the ledger ----------------------------------------------------------------------------


class Everything(nn.Module):
    """Attention, norms, a gate, a residual, a convolution with its batch norm, biases."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.batch = nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8)
        self.norm, self.attend = nn.LayerNorm(8), nn.Linear(8, 24)
        self.rms, self.gate, self.up = nn.RMSNorm(8), nn.Linear(8, 6), nn.Linear(8, 6)
        self.down, self.pool, self.head = nn.Linear(6, 8), nn.MaxPool1d(2), nn.Linear(8, 3)
        for buffer in (self.batch.running_mean, self.batch.running_var):
            assert buffer is not None
            nn.init.uniform_(buffer, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.batch(self.conv(x))).transpose(1, 2)
        q, k, v = self.attend(self.norm(x)).unflatten(-1, (2, 12)).transpose(1, 2).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.rms(x)
        x = x + self.down(F.gelu(self.gate(y)) * self.up(y)) + 0.1
        return self.head(self.pool(x.transpose(1, 2)).mean(-1))


@functools.cache
def everything(dtype: torch.dtype) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    net = Everything().eval().to(dtype)
    x = torch.randn(2, 4, 6).to(dtype)
    return net, x, fit(net, [torch.randn(8, 4, 6).to(dtype) for _ in range(4)])


@EMITTERS
@pytest.mark.parametrize("name", PRESETS)
def test_every_operation_gives_what_it_gets(name: str, explicit: bool) -> None:
    for dtype, tolerance in ((torch.double, 1e-12), (torch.float, 1e-6)):
        net, x, patterns = everything(dtype)
        found = handed_back(net, x, name, at_first(net, x), explicit=explicit, patterns=patterns)
        found.check(tolerance)
        if dtype == torch.double:
            close(found.ledger["output"], net(x)[:, 0].detach())


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "gradient-x-input"])
def test_both_emitters_agree(name: str) -> None:
    net, x, patterns = everything(torch.double)
    one, other = (
        handed_back(net, x, name, at_first(net, x), explicit=explicit, patterns=patterns)
        for explicit in (False, True)
    )
    close(one.relevance[0], other.relevance[0], 1e-9)


# --- 3: rules that become one another ---------------------------------------------------------


@pytest.mark.parametrize("name", ["linear of tokens", "conv2d", "conv_transpose2d"])
def test_rules_become_one_another(name: str) -> None:
    layer, naive = drawn(name)
    x, c = naive.x, naive.quotient

    def relevance(rule: Rule, quotient: Tensor = c) -> Tensor:
        return handed_back(layer, x, rule, quotient).relevance[0]

    close(relevance(Gamma(0.0)), relevance(Epsilon()))
    close(relevance(AlphaBeta(1.0, 0.0)), relevance(ZPlus()))
    positive = (c * (layer(x) > 0)).detach()
    limits = [relevance(Gamma(g), positive) - relevance(ZPlus(), positive) for g in (1e6, 1e8)]
    errors = [float(limit.abs().max()) for limit in limits]
    size = float(relevance(ZPlus(), positive).abs().max())
    assert errors[0] < 1e-4 * size
    assert errors[1] == pytest.approx(errors[0] / 100, rel=0.05)
    assert float(relevance(ZPlus(), (c.abs() / layer(x)).detach()).min()) >= 0

    ones = type(layer)(**_options(layer)).double()
    nn.init.ones_(ones.weight)  # type: ignore[arg-type]
    nn.init.zeros_(ones.bias)  # type: ignore[arg-type]
    flat, square = (handed_back(ones, x, rule, c).relevance[0] for rule in (Flat(), WSquare()))
    close(flat, square)


def _options(layer: nn.Module) -> dict[str, Any]:
    names = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride")
    names += ("padding", "output_padding", "dilation", "groups")
    found = {n: getattr(layer, n) for n in names if hasattr(layer, n)}
    return {n: v for n, v in found.items() if n != "output_padding" or any(v)}


# --- 5: norms ---------------------------------------------------------------------------------


@EMITTERS
@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(6), nn.RMSNorm(6, eps=1e-12), nn.GroupNorm(1, 4), nn.InstanceNorm1d(4)]
)
def test_norms_hand_all_on_without_a_bias(norm: nn.Module, explicit: bool) -> None:
    torch.manual_seed(0)
    norm = norm.double()
    if getattr(norm, "weight", None) is not None:
        nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 6).double()
    c = torch.randn_like(x)
    found = handed_back(norm, x, "cp-lrp", c, explicit=explicit)
    close(found.relevance[0].sum((1, 2)), (c * norm(x)).detach().sum((1, 2)), 1e-11)
    # a larger input gives the same, where epsilon doesn't count
    again = handed_back(norm, 1e3 * x, "cp-lrp", c, explicit=explicit)
    close(again.relevance[0], found.relevance[0], 1e-4)


# --- 6: softmax and attention -----------------------------------------------------------------


@EMITTERS
def test_softmax_is_its_first_order_term(explicit: bool) -> None:
    torch.manual_seed(0)
    x, c = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    found = handed_back(nn.Softmax(-1), x, SoftmaxTaylor(), c, explicit=explicit)
    s = x.softmax(-1)
    r = c * s
    close(found.relevance[0], x * (r - s * r.sum(-1, keepdim=True)))
    jacobian = torch.diag_embed(s) - s[:, :, None] * s[:, None]
    close(found.relevance[0], x * (jacobian @ (r / s)[..., None])[..., 0])
    close(found.ledger["softmax"], r.sum(1) - found.relevance[0].sum(1))


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if mask is None else scores + mask
    return scores.softmax(-1) @ v


@EMITTERS
@pytest.mark.parametrize("hidden", [None, -torch.inf, torch.finfo(torch.double).min])
def test_attention_is_what_its_operations_are(hidden: float | None, explicit: bool) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(2, 3, 4, 5).double() for _ in range(3)]
    c = torch.randn(2, 3, 4, 5).double()
    mask = None
    if hidden is not None:
        mask = torch.zeros(4, 4).double().masked_fill(torch.ones(4, 4).triu(1) > 0, hidden)
    for name in ("attnlrp", "cp-lrp", "epsilon"):
        fused, apart = (
            handed_back(Calls(lambda _, *a, f=f: f(*a, mask)), qkv, name, c, explicit=explicit)
            for f in (attend, eager)
        )
        for one, other in zip(fused.relevance, apart.relevance, strict=True):
            assert bool(torch.isfinite(one).all())
            close(one, other, 1e-3 if name == "epsilon" else 1e-10)
        close(fused.ledger["output"], apart.ledger["output"])
        fused.check(1e-12)
        apart.check(1e-12)
        if name == "cp-lrp":
            assert float(fused.relevance[0].abs().max()) == 0
            assert float(fused.relevance[1].abs().max()) == 0
            close(fused.relevance[2].sum((1, 2, 3)), fused.ledger["output"])
        if name == "attnlrp":
            close(fused.relevance[2].sum((1, 2, 3)), fused.ledger["output"] / 2)
            close(fused.ledger["softmax"], apart.ledger["softmax"], 1e-9)


@EMITTERS
@pytest.mark.parametrize("rule", [CPAttention(), AttnLRP()], ids=str)
def test_rows_without_anything_to_attend_to(rule: Rule, explicit: bool) -> None:
    torch.manual_seed(0)
    qkv = [torch.randn(2, 1, 3, 4).double() for _ in range(3)]
    mask = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
    model = Calls(lambda _, q, k, v: attend(q, k, v, mask))
    found = handed_back(model, qkv, rule, torch.ones(2, 1, 3, 4).double(), explicit=explicit)
    assert all(bool(torch.isfinite(r).all()) for r in found.relevance)
    assert float(found.relevance[0][:, :, 1].abs().max()) == 0


# --- 7: patterns ------------------------------------------------------------------------------


def test_patterns_find_the_signal() -> None:
    """``x = a_s s + a_n n`` with ``a_s = (1, 0)``, ``a_n = (1, 1)``: ``w`` has to be (1, -1)."""
    torch.manual_seed(0)
    signal, noise = torch.randn(20000, 1).double(), torch.randn(20000, 1).double()
    x = signal * torch.tensor([1.0, 0.0]).double() + noise * torch.tensor([1.0, 1.0]).double()
    layer = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -1.0]]))
    for kind in ("linear", "positive"):
        (pattern,) = fit(layer, x.split(1000), kind).values()
        assert float((layer.weight * pattern).sum()) == pytest.approx(1.0, abs=1e-12)
        torch.testing.assert_close(pattern, torch.tensor([[1.0, 0.0]]).double(), rtol=0, atol=0.03)
    patterns = fit(layer, [x])
    c = torch.ones(1, 1).double()
    given = torch.tensor([[2.0, 1.0]]).double()
    gradient = handed_back(layer, given, "gradient-x-input", c).relevance[0] / given
    assert gradient.tolist() == [[1.0, -1.0]]
    (a,) = patterns.values()
    found = handed_back(layer, given, PatternNet(), c, patterns=patterns).relevance[0]
    close(found, a)  # times y = 1
    found = handed_back(layer, given, PatternAttribution(), c, patterns=patterns).relevance[0]
    close(found, a * layer.weight.detach())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 6, 3, stride=2, groups=2),
        nn.Conv1d(3, 4, 2, dilation=2),
        nn.Linear(5, 4),
    ],
    ids=["conv2d", "conv1d", "linear"],
)
@pytest.mark.parametrize("kind", ["linear", "positive"])
def test_patterns_are_regressions_over_patches(layer: Any, kind: Any) -> None:
    """Patch by patch and neuron by neuron, as the paper has them."""
    torch.manual_seed(0)
    layer = layer.double()
    shape = {4: (3, 4, 7, 6), 3: (3, 3, 9), 2: (30, 5)}[layer.weight.ndim]
    data = [torch.randn(shape).double() + 0.5 for _ in range(3)]
    (found,) = fit(layer, data, kind).values()
    weight, bias = layer.weight.detach(), layer.bias.detach()
    for neuron in range(weight.shape[0]):
        patches = torch.cat([_patches(layer, x, neuron) for x in data])
        y = patches @ weight[neuron].flatten()
        on = y + bias[neuron] > 0 if kind == "positive" else torch.ones_like(y, dtype=torch.bool)
        covariance = (patches[on] * y[on, None]).mean(0) - patches[on].mean(0) * y.mean()
        size = covariance @ weight[neuron].flatten() if kind == "positive" else y.var(correction=0)
        close(found[neuron].flatten(), covariance / size, 1e-9)


def _patches(layer: Any, x: Tensor, neuron: int) -> Tensor:
    """All that one neuron sees, ``[places, size of its weight]``."""
    if isinstance(layer, nn.Linear):
        return x
    each = layer.in_channels // layer.groups
    group = neuron // (layer.out_channels // layer.groups)
    x = x[:, group * each : (group + 1) * each]
    flat = layer.weight.ndim == 3
    x = x[:, :, None] if flat else x
    sizes = [(1, *s) if flat else s for s in (layer.kernel_size, layer.stride, layer.dilation)]
    columns = F.unfold(x, sizes[0], stride=sizes[1], dilation=sizes[2])
    return columns.transpose(1, 2).flatten(0, 1)


def test_pattern_attribution_sees_through_norms_and_pads() -> None:
    """A batch norm behind a layer changes nothing: ``w a`` is the same with both scaled."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
    for buffer in (norm.running_mean, norm.running_var):
        assert buffer is not None
        nn.init.uniform_(buffer, 0.5, 1.5)
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    tail = [nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)]
    net = nn.Sequential(conv, norm, *tail).double().eval()
    folded = nn.Sequential(torch.nn.utils.fuse_conv_bn_eval(conv, norm), *tail).double().eval()
    data = [torch.randn(16, 2, 4, 4).double() for _ in range(3)]
    x = data[0][:2]
    for name in ("pattern-attribution", "pattern-net"):
        one, other = (
            graphopt.explain(m, (x,), composite=name, data=data, target=1)(x) for m in (net, folded)
        )
        (a,), (b,) = one.relevance.values(), other.relevance.values()
        close(a, b, 1e-9)
        ledger = dict(one.ledger)
        output = ledger.pop("output")
        close(torch.stack([*ledger.values()]).sum(0), output, 1e-9)


# --- 8: views ---------------------------------------------------------------------------------


def _round_trip(x: Tensor, moves: list[str]) -> Tensor:
    """The same tensor by another way."""
    for move in moves:
        if move == "reshape":
            x = x.reshape(x.shape[0], -1).view(x.shape)
        elif move == "permute":
            x = x.permute(0, 2, 1).contiguous().transpose(1, 2)
        elif move == "cat":
            x = torch.cat([x[:, :1], x[:, 1:]], 1)
        elif move == "split":
            x = torch.cat(x.split([1, x.shape[-1] - 1], -1), -1)
        elif move == "stack":
            x = torch.stack(x.unbind(1), 1)
        elif move == "pad":
            x = F.pad(x, (1, 2))[..., 1:-2]
        elif move == "flip":
            x = x.flip(1).flip(1)
        elif move == "add":
            x = x + 0
        else:
            x = x * 1
    return x


MOVES = ["reshape", "permute", "cat", "split", "stack", "pad", "flip", "add", "times"]
VIEWED: list[Rule] = [Epsilon(1e-3), Gamma(), ZPlus(), AlphaBeta(), WSquare(), Flat()]


@settings(max_examples=15, deadline=None, report_multiple_bugs=False)
@given(
    st.lists(st.sampled_from(MOVES), min_size=1, max_size=4),
    st.lists(st.sampled_from(MOVES), max_size=3),
    st.sampled_from(VIEWED),
    st.booleans(),
)
def test_rules_commute_with_views(
    before: list[str], after: list[str], rule: Rule, explicit: bool
) -> None:
    layer, naive = drawn("linear of tokens")
    moved = Calls(lambda _, x: _round_trip(layer(_round_trip(x, before)), after))
    rules = composite_of("cp-lrp").before((Match(family=("linear",)), rule))
    found = handed_back(moved, naive.x, rules, naive.quotient, explicit=explicit)
    expected, _ = naive.rule(rule.name, **rule.options())
    close(found.relevance[0], expected, 1e-11)
    found.check(1e-12)


@pytest.mark.parametrize("name", ["cp-lrp", "attnlrp", "epsilon-plus", "epsilon-gamma-box"])
def test_samples_do_not_see_one_another(name: str) -> None:
    net, _, _ = everything(torch.double)
    torch.manual_seed(0)
    x = torch.randn(4, 4, 6).double()
    order = torch.tensor([2, 0, 3, 1])
    one, other = (handed_back(net, t, name, at_first(net, t)) for t in (x, x[order]))
    close(one.relevance[0][order], other.relevance[0], 1e-11)


def test_proportional_shares_are_the_same_for_any_order() -> None:
    x = torch.randn(2, 3).double()
    for rule in (Proportional(), Proportional("absolute")):
        one = handed_back(Calls(lambda _, a, b: a + b), [x, x + 1], rule, torch.ones(2, 3).double())
        other = handed_back(
            Calls(lambda _, b, a: a + b), [x + 1, x], rule, torch.ones(2, 3).double()
        )
        close(one.relevance[0], other.relevance[1])
