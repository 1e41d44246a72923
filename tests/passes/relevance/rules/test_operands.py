"""Operands that stand at several places, are broadcast, or set what an operation does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import graphopt
from graphopt.errors import UnsupportedError, UsageError
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.rules import (
    AlphaBeta,
    CPAttention,
    DetachedNorm,
    Epsilon,
    Identity,
    Proportional,
    Uniform,
    WinnerTakesAll,
    ZPlus,
)
from tests.passes.relevance.rules.naive import Calls, handed_back
from tests.passes.relevance.rules.test_sums import EMITTERS, close, drawn, run


@EMITTERS
@pytest.mark.parametrize(
    "gram", [lambda x: x @ x, torch.bmm, F.linear], ids=["matmul", "bmm", "linear"]
)
def test_a_value_that_is_both_factors_takes_all_once(gram: Any, explicit: bool) -> None:
    (x,) = drawn((4, 4) if gram is F.linear else (2, 4, 4))
    both = gram if gram not in (torch.bmm, F.linear) else lambda x: gram(x, x)
    model = Calls(lambda _, x: both(x))
    found = handed_back(model, x, Uniform(), torch.randn_like(both(x)), explicit=explicit)
    found_sum = found.relevance[0].sum()
    close(found_sum, found.ledger["output"].sum())


@EMITTERS
@pytest.mark.parametrize("rule", [Proportional(), Epsilon()], ids=str)
def test_a_statistic_is_shared_by_its_degree(rule: Any, explicit: bool) -> None:
    (x,) = drawn((3, 5))
    found, r = run(lambda x: x.var(1, keepdim=True), [x], rule, explicit)
    centred = x - x.mean(1, keepdim=True)
    close(found.relevance[0], x * centred / (x * centred).sum(1, keepdim=True) * r)
    found.check(1e-12)


@EMITTERS
@pytest.mark.parametrize("rule", [Proportional(), Epsilon(0.01)], ids=str)
def test_what_differences_and_sums_hold_besides_data_is_booked(rule: Any, explicit: bool) -> None:
    (x,) = drawn((3, 5))
    ahead = torch.ones(3, 1).double()
    for function in (lambda x: torch.diff(x, prepend=ahead), lambda x: x + ahead):
        found, _ = run(function, [x], rule, explicit)
        assert bool((found.ledger["constants"] != 0).all())
        found.check(1e-12)


@EMITTERS
def test_places_of_samples_take_nothing(explicit: bool) -> None:
    image, places = drawn((2, 1, 3, 3), (2, 4, 4, 2))
    found, r = run(
        lambda i, p: F.grid_sample(i, p.tanh(), align_corners=False), [image, places],
        Proportional(), explicit,
    )  # fmt: skip
    assert not bool(found.relevance[1].any())
    close(found.relevance[0].sum((1, 2, 3)), r.sum((1, 2, 3)))


@EMITTERS
def test_a_bound_of_several_places(explicit: bool) -> None:
    (x,) = drawn((3, 1))
    bounds = torch.tensor([-5.0, 0.1, 5.0]).double()
    found, r = run(lambda x: torch.maximum(x, bounds), [x], WinnerTakesAll(), explicit)
    close(found.relevance[0], (r * (x > bounds)).sum(1, keepdim=True))
    close(found.ledger["constants"], (r * (x < bounds)).sum(1))


@EMITTERS
def test_identity_of_a_value_that_is_broadcast(explicit: bool) -> None:
    (x,) = drawn((3, 1))
    factors = torch.tensor([1.0, -2.0, 3.0]).double()
    found, r = run(lambda x: x * factors, [x], Identity(), explicit)
    close(found.relevance[0], r.sum(1, keepdim=True))


def test_no_identity_from_many_values_to_one() -> None:
    (x,) = drawn((3, 4))
    with pytest.raises(UnsupportedError, match="another shape"):
        run(lambda x: x.logsumexp(1, keepdim=True), [x], Identity(), False)


SETTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pow": lambda x, y: x.abs() ** y,
    "clamp": lambda x, y: torch.clamp(x, min=y),
    "prelu": lambda x, y: F.prelu(x, y[0]),
    "layer_norm": lambda x, y: F.layer_norm(x, (4,), y[0], y[1]),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_sets_a_function_or_a_norm_is_no_input(name: str) -> None:
    x, y = drawn((3, 4), (3, 4))
    with pytest.raises(UnsupportedError, match=f"what sets '{name}'"):
        run(SETTINGS[name], [x, y], DetachedNorm(), False)


@EMITTERS
def test_scores_that_are_added_take_their_share(explicit: bool) -> None:
    """The fused attention and its parts agree about a mask that carries relevance."""
    q, k, v, mask = drawn((2, 3, 4), (2, 3, 4), (2, 3, 4), (2, 3, 3))

    def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return ((q * 0.5) @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    quotient = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double()
    composite = composite_of("attnlrp")
    one, two = (
        handed_back(
            Calls(lambda _, *a, f=f: f(*a)), [q, k, v, mask], composite, quotient,
            explicit=explicit,
        )
        for f in (fused, parts)
    )  # fmt: skip
    for ours, theirs in zip(one.relevance, two.relevance, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_attention_that_drops_weights_is_refused() -> None:
    (q,) = drawn((2, 3, 4))
    with pytest.raises(UnsupportedError, match="at random"):
        run(lambda q: F.scaled_dot_product_attention(q, q, q, None, 0.5), [q], CPAttention(), False)


def test_nothing_arrives_inside_of_an_operation() -> None:
    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(0.8 * (x + 0.04 * x**3)))

    model, x = Calls(lambda _, x: gelu(x)), torch.randn(2, 4)
    with pytest.raises(UsageError, match="part of an operation"):
        graphopt.explain(model, (x,), attribute=("node:tanh",))
    assert "tanh" not in graphopt.explain(model, (x,), attribute=("*",))(x).relevance


@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_large_values_of_half_precision(eps: float) -> None:
    """Squares of values beyond 256 are infinite in half precision."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            x = F.rms_norm(x, (4,), self.weight, 1e-6)
            return F.linear(1000 * x, torch.eye(4, dtype=x.dtype))

    x = torch.tensor([[1000.0, -2000.0, 500.0, 100.0]])
    composite = composite_of("epsilon" if eps else "cp-lrp")
    half = graphopt.explain(Model().half(), (x.half(),), composite=composite)(x.half())
    full = graphopt.explain(Model(), (x,), composite=composite)(x)
    torch.testing.assert_close(half.relevance["x"].float(), full.relevance["x"], rtol=5e-3, atol=1)


def test_one_value_as_factor_and_addend_is_refused() -> None:
    (x,) = drawn((4, 4))
    with pytest.raises(UnsupportedError, match="added to the product"):
        run(lambda x: torch.addmm(x, x, torch.eye(4).double()), [x], Epsilon(), False)


@EMITTERS
def test_without_positive_contributions_z_plus_absorbs_all(explicit: bool) -> None:
    """Alpha-beta with 1 and 0 is z-plus, and books what no positive contribution takes."""
    (x,) = drawn((3, 4))
    weight, bias = -torch.arange(1.0, 9.0).double().reshape(2, 4), -torch.ones(2).double()
    for rule in (AlphaBeta(1.0, 0.0), ZPlus()):
        found, r = run(lambda x: F.linear(x.abs(), weight, bias), [x], rule, explicit)
        assert not bool(found.relevance[0].any())
        close(found.ledger["epsilon"], r.sum(1))
        found.check(1e-12)
