"""Rules for sums, averages, products, norms and activations, against formulas written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import GraphoptError, UnsupportedError, UsageError
from graphopt.passes.relevance.composite import Match
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import (
    RULES,
    AsGradient,
    Epsilon,
    Proportional,
    Rule,
    StopGradient,
    Uniform,
    ZBox,
)
from tests.passes.relevance.rules.naive import Calls, Handed, handed_back

EMITTERS = pytest.mark.parametrize("explicit", [False, True], ids=["auto", "explicit"])


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(5)
    return [torch.randn(s, dtype=torch.double) for s in shapes]


def run(
    function: Callable[..., Tensor], inputs: list[Tensor], rule: Any, explicit: bool, seed: int = 0
) -> tuple[Handed, Tensor]:
    """Ours, and the relevance at the result."""
    model = Calls(lambda _, *given: function(*given))
    torch.manual_seed(seed)
    quotient = torch.randn_like(function(*inputs))
    found = handed_back(model, inputs, rule, quotient, explicit=explicit)
    return found, quotient * function(*inputs)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@EMITTERS
@pytest.mark.parametrize("alpha", [1.0, -2.0])
def test_summands_take_their_share(explicit: bool, alpha: float) -> None:
    a, b = drawn((2, 3, 4), (2, 1, 4))
    found, r = run(lambda a, b: torch.add(a, b, alpha=alpha), [a, b], Proportional(), explicit)
    z = a + alpha * b
    close(found.relevance[0], a / z * r)
    close(found.relevance[1], (alpha * b / z * r).sum(1, keepdim=True))
    found.check(1e-12)

    found, r = run(
        lambda a, b: torch.add(a, b, alpha=alpha), [a, b], Proportional("absolute"), explicit
    )
    size = a.abs() + abs(alpha) * b.abs()
    close(found.relevance[0], a.abs() / size * r)
    close(found.relevance[1], (abs(alpha) * b.abs() / size * r).sum(1, keepdim=True))
    found.check(1e-12)


@EMITTERS
@pytest.mark.parametrize("mode", ["signed", "absolute"])
def test_a_constant_summand_is_booked(mode: Any, explicit: bool) -> None:
    (a,) = drawn((2, 3))
    found, r = run(lambda a: 1.5 - a, [a], Proportional(mode), explicit)
    share = 1.5 / (a.abs() + 1.5) if mode == "absolute" else 1.5 / (1.5 - a)
    close(found.ledger["constants"], (share * r).sum(1))
    found.check(1e-12)


@EMITTERS
@pytest.mark.parametrize("stabiliser", ["rms", "sign", "unsigned", "clip"])
def test_stabilised_sums(stabiliser: Any, explicit: bool) -> None:
    a, b = drawn((3, 5), (3, 5))
    rule = Proportional(eps=0.2, stabiliser=stabiliser)
    found, r = run(torch.add, [a, b], rule, explicit)
    z = a + b
    sign = torch.where(z >= 0, 1.0, -1.0).to(z)
    moved = {
        "rms": z + 0.2 * sign * z.square().mean(1, keepdim=True).sqrt(),
        "sign": z + 0.2 * sign,
        "unsigned": z + 0.2,
        "clip": sign * z.abs().clamp(min=0.2),
    }[stabiliser]
    close(found.relevance[0], a / moved * r)
    close(found.ledger["epsilon"], ((1 - z / moved) * r).sum(1))
    found.check(1e-12)


@EMITTERS
def test_a_mask_that_is_added_has_no_size(explicit: bool) -> None:
    """A row with -inf or the smallest float, as attention masks its scores."""
    (a,) = drawn((3, 4))
    for hidden in (-torch.inf, torch.finfo(torch.double).min, -1e9):
        mask = torch.tensor([0.0, hidden, 0.0, 0.0]).double()

        def scores(a: Tensor, mask: Tensor = mask) -> Tensor:
            return F.softmax(a + mask, -1)

        found = handed_back(
            Calls(lambda _, a: scores(a)),
            a,
            composite_of("epsilon"),
            torch.randn(3, 4).double(),
            explicit=explicit,
        )
        assert bool(torch.isfinite(found.relevance[0]).all())
        assert bool((found.relevance[0][:, 1] == 0).all())
        assert float(found.ledger["epsilon"].abs().max()) < 1e-4
        found.check(1e-10)


@EMITTERS
@pytest.mark.parametrize(
    ("function", "sizes"),
    [
        (lambda x: x.sum(1), lambda x: x / x.sum(1, keepdim=True)),
        (lambda x: x.mean((1, 2)), lambda x: x / x.sum((1, 2), keepdim=True)),
    ],
    ids=["sum", "mean"],
)
def test_reductions(function: Any, sizes: Any, explicit: bool) -> None:
    (x,) = drawn((2, 3, 4))
    for rule, value in ((Proportional(), x), (Epsilon(), x), (Proportional("absolute"), x.abs())):
        found, r = run(function, [x], rule, explicit)
        share = sizes(value)
        r = r.reshape(r.shape[0], 1, -1).expand(-1, 3, -1)
        close(found.relevance[0], (share * r).expand_as(x) if r.shape[-1] > 1 else share * r)
        found.check(1e-12)


@EMITTERS
def test_average_pooling_is_a_sum_over_windows(explicit: bool) -> None:
    """Zennit's Norm, with any of the three names of it."""
    (x,) = drawn((2, 2, 4, 6))
    found = [
        run(lambda x: F.avg_pool2d(x, 2), [x], rule, explicit)
        for rule in (Proportional(eps=1e-6, stabiliser="sign"), Epsilon(1e-6, "sign"))
    ]
    z = F.avg_pool2d(x, 2)
    moved = z + 1e-6 * torch.where(z >= 0, 1.0, -1.0).to(z)
    for each, r in found:
        spread = (r / moved).repeat_interleave(2, 2).repeat_interleave(2, 3) / 4
        close(each.relevance[0], x * spread)
        each.check(1e-12)


@EMITTERS
def test_statistics_are_homogeneous(explicit: bool) -> None:
    """Euler: ``x f'(x)`` sums to the degree times ``f``."""
    (x,) = drawn((2, 5))
    found, r = run(lambda x: torch.linalg.vector_norm(x, dim=1), [x], Proportional(), explicit)
    close(found.relevance[0], x.square() / x.square().sum(1, keepdim=True) * r[:, None])
    found, r = run(lambda x: x.var(1), [x], Proportional(), explicit)
    centred = x - x.mean(1, keepdim=True)
    share = x * centred / centred.square().sum(1, keepdim=True)
    close(found.relevance[0], share * r[:, None])
    found.check(1e-12)


# --- products ---------------------------------------------------------------------------------


@EMITTERS
def test_factors_take_half_each(explicit: bool) -> None:
    """Golden test 4: exactly half of the relevance, for matrices too."""
    a, b = drawn((2, 3, 4), (2, 4, 5))
    found, r = run(torch.matmul, [a, b], Uniform(), explicit)
    halves = r.sum((1, 2)) / 2
    close(found.relevance[0].sum((1, 2)), halves)
    close(found.relevance[1].sum((1, 2)), halves)
    zs = a[..., None] * b[:, None]  # contributions, [samples, rows, inner, columns]
    shares = zs / zs.sum(2, keepdim=True) * r[:, :, None] / 2
    close(found.relevance[0], shares.sum(3))
    close(found.relevance[1], shares.sum(1))
    found.check(1e-12)


@EMITTERS
@pytest.mark.parametrize(
    "product",
    [
        lambda a, b, c: (a * b) * c,
        lambda a, b, c: a * (b * c),
        lambda a, b, c: (c * a).reshape(1, 1) * b,
        lambda a, b, c: (2 * (a * b)).view(1) * (c / 2),
    ],
)
def test_products_are_shared_whatever_the_brackets(product: Any, explicit: bool) -> None:
    """2 * 3 * 4 gives 8, 8, 8; halves at each product give 6, 6, 12 or 12, 6, 6."""
    numbers = [torch.tensor([[v]], dtype=torch.double) for v in (2.0, 3.0, 4.0)]
    model = Calls(lambda _, a, b, c: product(a, b, c).reshape(1, 1))
    found = handed_back(
        model, numbers, Uniform(), torch.ones(1, 1, dtype=torch.double), explicit=explicit
    )
    assert [float(r) for r in found.relevance] == pytest.approx([8.0, 8.0, 8.0], rel=1e-14)


@EMITTERS
def test_factors_by_size(explicit: bool) -> None:
    a, b = drawn((2, 3), (2, 3))
    found, r = run(torch.mul, [a, b], Proportional("absolute"), explicit)
    close(found.relevance[0], a.abs() / (a.abs() + b.abs()) * r)
    found.check(1e-12)
    found, r = run(torch.div, [a, b], Proportional("absolute"), explicit)
    close(found.relevance[1], (1 / b).abs() / (a.abs() + (1 / b).abs()) * r)
    found.check(1e-12)
    for function, rule in ((torch.mul, Proportional()), (torch.bmm, Proportional("absolute"))):
        inputs = [a, b] if function is torch.mul else drawn((2, 3, 4), (2, 4, 3))
        with pytest.raises(UnsupportedError, match="uniform"):
            run(function, inputs, rule, explicit)


@EMITTERS
def test_gates_may_be_constants(explicit: bool) -> None:
    x, y = drawn((2, 4), (2, 4))

    def gated(x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(x) * y

    stopped, r = run(gated, [x, y], Uniform(("gate",)), explicit)
    close(stopped.relevance[1], r)
    assert float(stopped.relevance[0].abs().max()) == 0
    shared, r = run(gated, [x, y], Uniform(), explicit)
    close(shared.relevance[1], r / 2)

    def swiglu(x: Tensor, y: Tensor) -> Tensor:
        return F.silu(x) * y

    shared, r = run(swiglu, [x, y], Uniform(("gate",)), explicit)
    close(shared.relevance[0], r / 2)
    stopped, r = run(swiglu, [x, y], Uniform(("activated",)), explicit)
    close(stopped.relevance[1], r)
    stopped.check(1e-12)


@EMITTERS
def test_a_gate_on_an_activation_is_the_constant(explicit: bool) -> None:
    """``o * tanh(c)`` of an LSTM: both are activations, one of them weighs."""
    x, y = drawn((2, 4), (2, 4))

    def cell(x: Tensor, y: Tensor) -> Tensor:
        return torch.sigmoid(x) * torch.tanh(y)

    found, r = run(cell, [x, y], Uniform(("gate", "activated")), explicit)
    close(found.relevance[1], r)
    found.check(1e-12)


@EMITTERS
def test_what_is_added_to_a_product_takes_its_share(explicit: bool) -> None:
    b, q, k = drawn((2, 3, 5), (2, 3, 4), (2, 4, 5))
    found, r = run(
        lambda b, q, k: torch.baddbmm(b, q, k, beta=0.5, alpha=2.0), [b, q, k], Uniform(), explicit
    )
    z = 0.5 * b + 2 * q @ k
    close(found.relevance[0], 0.5 * b / z * r)
    rest = (2 * q @ k / z * r).sum((1, 2)) / 2
    close(found.relevance[1].sum((1, 2)), rest)
    close(found.relevance[2].sum((1, 2)), rest)
    found.check(1e-12)


# --- gradients --------------------------------------------------------------------------------


@EMITTERS
def test_gradient_times_input(explicit: bool) -> None:
    x, w = drawn((2, 4), (4, 4))

    def function(x: Tensor) -> Tensor:
        return F.softmax(torch.tanh(x @ w) + 1, -1) * x.exp()

    found, _ = run(function, [x], composite_of("gradient-x-input"), explicit)
    torch.manual_seed(0)
    cotangent = torch.randn_like(function(x))
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(function(leaf), leaf, cotangent)
    close(found.relevance[0], expected * x)
    found.check(1e-12)


@EMITTERS
def test_relevance_as_a_gradient(explicit: bool) -> None:
    (x,) = drawn((2, 4))
    rules = composite_of("cp-lrp").before((Match(), AsGradient()))
    found, r = run(lambda x: torch.tanh(x), [x], rules, explicit)
    close(found.relevance[0], (1 - torch.tanh(x) ** 2) * r)
    close(found.ledger["gradient"], (torch.tanh(x) ** 2 * r).sum(1))
    found.check(1e-12)


@EMITTERS
def test_nothing_passes_a_stop(explicit: bool) -> None:
    x, y = drawn((2, 4), (2, 4))
    rules = composite_of("cp-lrp").before((Match(op=("tanh",)), StopGradient("head")))
    found, r = run(lambda x, y: torch.tanh(x) + y, [x, y], rules, explicit)
    close(found.ledger["head"], (r * torch.tanh(x) / (torch.tanh(x) + y)).sum(1))
    close(found.relevance[1], r * y / (torch.tanh(x) + y))
    found.check(1e-12)


def test_gradients_end_where_relevance_is_handed_on() -> None:
    (x,) = drawn((2, 4))
    weights = torch.randn(4, 3).double()
    rules = composite_of("gradient-x-input").before((Match(family=("linear",)), RULES["flat"]()))
    with pytest.raises(UnsupportedError, match="as-gradient"):
        run(lambda x: torch.tanh(x) @ weights, [x], rules, False)


# --- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "options", "word"),
    [
        ("epsilon", {"eps": -1.0}, "eps"),
        ("epsilon", {"eps": "small"}, "eps"),
        ("epsilon", {"stabiliser": "sgn"}, "sign"),
        ("gamma", {"gamma": float("nan")}, "gamma"),
        ("alpha-beta", {"alpha": 3.0}, "alpha - beta = 1"),
        ("alpha-beta", {"missing": "drop"}, "other"),
        ("z-box", {"low": 1.0, "high": -1.0}, "low <= high"),
        ("z-box", {"low": (0.0, 0.0), "high": (1.0, 1.0, 1.0)}, "channel"),
        ("uniform", {"stop": ("gates",)}, "gate"),
        ("proportional", {"mode": "abs"}, "absolute"),
        ("w-square", {"bias": 1}, "bias"),
    ],
)
def test_options_that_can_not_be(rule: str, options: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as error:
        RULES[rule](**options)
    assert word in str(error.value)


def test_a_rule_in_the_wrong_place_is_named() -> None:
    (x,) = drawn((2, 4))
    rules = composite_of("cp-lrp").before((Match(family=("activation",)), Uniform()))
    with pytest.raises(UsageError) as error:
        run(torch.tanh, [x], rules, False)
    assert "'activation'" in str(error.value)
    assert "tanh" in str(error.value)
    assert error.value.hint == "it is for product"


def test_bounds_for_other_channels_are_refused() -> None:
    (x,) = drawn((2, 3, 4, 4))
    weights = torch.randn(2, 3, 2, 2).double()
    rule: Rule = ZBox(low=(-1.0, -1.0), high=(1.0, 1.0))
    with pytest.raises(GraphoptError, match="2 bounds for 3 channels"):
        run(lambda x: F.conv2d(x, weights), [x], rule, False)
