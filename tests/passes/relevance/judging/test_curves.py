"""Perturbation curves: against loops by hand, and against all orders there are."""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import (
    GraphoptError,
    InputMismatch,
    NonFiniteError,
    UnsupportedError,
    UsageError,
)
from graphopt.passes.relevance.judging import (
    PerturbationCurves,
    Removal,
    blurred,
    perturbation_curves,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT = drawn(5, 3, seed=1)


def linear(x: Tensor) -> Tensor:
    return x @ WEIGHT.to(x.dtype)


def along(x: Tensor, order: tuple[int, ...], baseline: Tensor, target: int) -> list[float]:
    """y(k) by hand: one unit after the other."""
    x = x.clone()
    found = [float(linear(x[None])[0, target])]
    for unit in order:
        x[unit] = baseline[unit]
        found.append(float(linear(x[None])[0, target]))
    return found


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_exact_contributions_of_a_linear_model_beat_every_order(baseline: float) -> None:
    x = drawn(4, 5)
    base = torch.full_like(x, baseline)
    exact = (x - base) * WEIGHT[:, 1]
    curves = perturbation_curves(
        linear, x, exact, targets=1, removal=Removal(baseline=base if baseline else "zero")
    )
    for row in range(4):
        means = {
            order: sum(along(x[row], order, base[row], 1)) / 6
            for order in itertools.permutations(range(5))
        }
        areas = [means[order[::-1]] - means[order] for order in means]
        assert float(curves.areas[row]) == pytest.approx(max(areas), abs=1e-12)
        assert float(curves.morf[row].mean()) == pytest.approx(min(means.values()), abs=1e-12)
        best = min(means, key=lambda order: means[order])
        assert curves.morf[row].tolist() == pytest.approx(along(x[row], best, base[row], 1))
        assert curves.lerf[row].tolist() == pytest.approx(along(x[row], best[::-1], base[row], 1))
    assert curves.shares == (0, 0.2, 0.4, 0.6, 0.8, 1)


def test_random_relevance_is_at_zero_and_the_negative_at_the_negative() -> None:
    x = drawn(400, 5)
    exact = x * WEIGHT[:, 0]
    chance = perturbation_curves(linear, x, drawn(400, 5, seed=9), targets=0).abpc
    assert abs(chance.mean) < 2 * chance.standard_error
    good, bad = (perturbation_curves(linear, x, s * exact, targets=0).abpc for s in (1, -1))
    assert good.mean > 10 * good.standard_error
    assert bad.mean == pytest.approx(-good.mean)


def test_a_constant_relevance_gains_nothing_by_its_position() -> None:
    first = torch.ones(400, 6)
    found = perturbation_curves(lambda x: x[:, :1], first, torch.zeros(400, 6)).abpc
    assert abs(found.mean) < 2 * found.standard_error


def test_permuting_units_or_samples_permutes_nothing_else() -> None:
    x, relevance = drawn(6, 5), drawn(6, 5, seed=3)
    plain = perturbation_curves(linear, x, relevance, targets=2)
    units = torch.tensor([3, 0, 4, 1, 2])
    moved = perturbation_curves(
        lambda v: v @ WEIGHT[units], x[:, units], relevance[:, units], targets=2
    )
    torch.testing.assert_close(moved.morf, plain.morf)
    torch.testing.assert_close(moved.lerf, plain.lerf)
    rows = torch.tensor([5, 2, 0, 1, 4, 3])
    swapped = perturbation_curves(linear, x[rows], relevance[rows], targets=2)
    torch.testing.assert_close(swapped.morf, plain.morf[rows])


def test_removing_what_stands_there_already_changes_nothing() -> None:
    x = drawn(3, 5)
    curves = perturbation_curves(linear, x, drawn(3, 5, seed=2), removal=Removal(baseline=x))
    start = linear(x).max(1).values
    torch.testing.assert_close(curves.morf, start[:, None].expand(3, 6), rtol=0, atol=0)
    torch.testing.assert_close(curves.lerf, curves.morf, rtol=0, atol=0)
    assert curves.abpc.mean == 0


@pytest.mark.parametrize("baseline", ["zero", "mean", "blur", 0.5])
def test_patches_of_images_against_slices_by_hand(baseline: Any) -> None:
    x, weight = drawn(2, 3, 6, 7), drawn(3, 6, 7, seed=4)
    relevance = drawn(2, 3, 6, 7, seed=5)
    patches = [(slice(r, r + 2), slice(c, c + 3)) for r in (0, 2, 4) for c in (0, 3, 6)]
    base = {
        "zero": torch.zeros_like(x),
        "mean": x.mean((2, 3), keepdim=True).expand_as(x),
        "blur": blurred(x),
        0.5: torch.full_like(x, 0.5),
    }[baseline]

    def model(images: Tensor) -> Tensor:
        return (images * weight).sum((1, 2, 3)).tanh()

    curves = perturbation_curves(
        model, x, relevance, removal=Removal(units=(2, 3), baseline=baseline, batch_size=4)
    )
    for row in range(2):
        sums = [float(relevance[row][:, a, b].sum()) for a, b in patches]
        order = sorted(range(9), key=lambda i: -sums[i])
        image, expected = x[row].clone(), [float(model(x[row : row + 1]))]
        for unit in order:
            a, b = patches[unit]
            image[:, a, b] = base[row][:, a, b]
            expected.append(float(model(image[None])))
        assert curves.morf[row].tolist() == pytest.approx(expected, abs=1e-12)
    flat = perturbation_curves(
        model, x, relevance.sum(1), removal=Removal(units=(2, 3), baseline=baseline)
    )
    torch.testing.assert_close(flat.lerf, curves.lerf)


def test_blur_keeps_a_constant_and_mirrors() -> None:
    torch.testing.assert_close(
        blurred(torch.full((1, 2, 9, 9), 3.0)), torch.full((1, 2, 9, 9), 3.0)
    )
    x = drawn(1, 1, 12, 12)
    torch.testing.assert_close(blurred(x, 2.0).flip(-1), blurred(x.flip(-1), 2.0))
    assert float(blurred(x, 2.0).std()) < 0.5 * float(x.std())


def test_tokens_are_masked_and_padding_and_special_ones_never() -> None:
    table = drawn(20, seed=6)
    ids = torch.tensor([[1, 5, 9, 7, 2, 0], [1, 8, 3, 2, 0, 0]])
    allowed = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0]])
    seen: list[Tensor] = []

    def model(tokens: Tensor, scale: Tensor, name: str) -> Tensor:
        assert name == "kept"
        seen.append(tokens)
        return table[tokens].sum(1, keepdim=True) * scale[:, None]

    scale = torch.tensor([1.0, -2.0], dtype=torch.float64)
    exact = (table[ids] - table[4]) * scale[:, None]
    removal = Removal(baseline=4, allowed=allowed)
    curves = perturbation_curves(model, (ids, scale, "kept"), exact, removal=removal)
    for tokens in torch.cat(seen):
        row = 0 if tokens[4] == 2 else 1
        kept = allowed[row] == 0
        assert torch.equal(tokens[kept], ids[row][kept])
    assert curves.shares == (0, 1 / 3, 2 / 3, 1)
    left = ids.where(allowed == 0, 4)
    torch.testing.assert_close(curves.morf[:, -1], table[left].sum(1) * scale)
    ordered = exact[0, 1:4].sort(descending=True).values
    start = float(table[ids[0]].sum())
    expected = [start - float(ordered[:k].sum()) for k in range(4)]
    assert curves.morf[0].tolist() == pytest.approx(expected)
    # Two units over three steps: 0, 0.67, 1.33 and 2 of them, rounded.
    assert len(set(curves.morf[1].tolist())) == 3


def test_embedded_tokens_are_removed_as_a_whole() -> None:
    x, weight = drawn(2, 4, 3), drawn(4, 3, seed=2)
    exact = x * weight
    one = perturbation_curves(lambda v: (v * weight).sum((1, 2)), x, exact)
    two = perturbation_curves(lambda v: (v * weight).sum((1, 2)), x, exact.sum(2))
    assert one.morf.shape == (2, 5)
    torch.testing.assert_close(one.morf, two.morf)
    torch.testing.assert_close(one.morf[:, 1], exact.sum((1, 2)) - exact.sum(2).max(1).values)


def test_segments_by_label_and_what_is_never_perturbed() -> None:
    x = drawn(2, 5)
    labels = torch.tensor([0, 1, 0, -1, 1])
    exact = x * WEIGHT[:, 0]
    curves = perturbation_curves(linear, x, exact, targets=0, removal=Removal(units=labels))
    assert curves.morf.shape == (2, 3)
    torch.testing.assert_close(curves.morf[:, -1], exact[:, 3])
    halves = torch.stack([exact[:, 0] + exact[:, 2], exact[:, 1] + exact[:, 4]], 1)
    torch.testing.assert_close(curves.morf[:, 1], exact.sum(1) - halves.max(1).values)


def test_the_probability_is_that_of_softmax_and_steps_skip() -> None:
    x, relevance = drawn(3, 5), drawn(3, 5, seed=7)
    every = perturbation_curves(linear, x, relevance, removal=Removal(output="probability"))
    target = linear(x).argmax(1)
    expected = linear(x).softmax(1)[torch.arange(3), target]
    torch.testing.assert_close(every.morf[:, 0], expected)
    torch.testing.assert_close(every.morf[:, -1], torch.full((3,), 1 / 3, dtype=torch.float64))
    few = perturbation_curves(
        linear, x, relevance, removal=Removal(output="probability", batch_size=1), steps=2
    )
    torch.testing.assert_close(few.morf, every.morf[:, [0, 3, 5]])


def test_sums_are_in_float64() -> None:
    """A mean over 1e7 steps of 1 +- 1e-8 in float32 would lose the difference."""
    curves = PerturbationCurves(
        (0.0, 1.0), torch.ones(2, 2).double() - 1e-9, torch.ones(2, 2).double(), "logit"
    )
    assert curves.abpc.mean == pytest.approx(1e-9, rel=1e-6)
    low = perturbation_curves(lambda x: x.sum(1), torch.ones(2, 3), torch.ones(2, 3))
    assert low.morf.dtype == torch.float64


def test_the_model_and_the_random_state_stay_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    model[2].eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    random = torch.get_rng_state()
    x = drawn(6, 5).float()
    first, second = (perturbation_curves(model, x, x, targets=0) for _ in range(2))
    assert torch.equal(first.morf, second.morf)  # no dropout
    assert [m.training for m in model] == [True, True, False]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())


def test_the_report_is_json_and_the_chart_a_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    curves = perturbation_curves(linear, drawn(3, 5), drawn(3, 5, seed=1))
    found = json.loads(json.dumps(curves.to_dict()))
    assert found["abpc"]["mean"] == pytest.approx(sum(found["lerf"]) / 6 - sum(found["morf"]) / 6)
    assert found["abpc"]["samples"] == 3
    (axis,) = curves.plot().axes
    drawn_lines = {line.get_label().split(":")[0]: line.get_ydata() for line in axis.get_lines()}
    assert list(drawn_lines["MoRF"]) == pytest.approx(found["morf"])
    assert list(drawn_lines["LeRF"]) == pytest.approx(found["lerf"])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UnsupportedError, match="pip install matplotlib"):
        curves.plot()


X, R = drawn(2, 5), drawn(2, 5, seed=1)
IMAGE = drawn(2, 3, 4, 4)
IDS = torch.ones(2, 5, dtype=torch.long)
BAD: list[tuple[type[GraphoptError], str, dict[str, Any]]] = [
    (NonFiniteError, "relevance holds NaN", {"relevance": R.log()}),
    (InputMismatch, "shape", {"relevance": R[:, :4]}),
    (InputMismatch, "shape", {"relevance": R[:1]}),
    (InputMismatch, "shape", {"inputs": IMAGE, "relevance": IMAGE[..., 0]}),
    (UsageError, "tensor", {"relevance": [1.0]}),
    (UsageError, "steps=0", {"steps": 0}),
    (UsageError, "steps=6", {"steps": 6}),
    (UsageError, "target 3 is out of range", {"targets": 3}),
    (UsageError, "out of range", {"targets": torch.tensor([0, -1])}),
    (InputMismatch, "3 targets for 2", {"targets": torch.tensor([0, 1, 2])}),
    (UsageError, "argmax", {"targets": "top"}),
    (UsageError, "classes", {"targets": torch.tensor([0.5, 1])}),
    (UsageError, "zero", {"removal": Removal(baseline="zeros")}),
    (UsageError, "images", {"removal": Removal(baseline="blur")}),
    (UsageError, "mask_token_id", {"inputs": IDS}),
    (UsageError, "integer", {"inputs": IDS, "removal": Removal(baseline=0.5)}),
    (InputMismatch, "baseline", {"removal": Removal(baseline=drawn(4))}),
    (NonFiniteError, "baseline", {"removal": Removal(baseline=float("nan"))}),
    (UsageError, "output", {"removal": Removal(output="loss")}),
    (UsageError, "batch_size", {"removal": Removal(batch_size=0)}),
    (UsageError, "argument=1", {"removal": Removal(argument=1)}),
    (UsageError, "no unit", {"removal": Removal(allowed=torch.tensor([[1] * 5, [0] * 5]))}),
    (UsageError, "units 2", {"removal": Removal(units=2)}),
    (UsageError, "5x5", {"inputs": IMAGE, "relevance": IMAGE, "removal": Removal(units=5)}),
    (UsageError, "gap", {"removal": Removal(units=torch.tensor([0, 2, 2, 0, 0]))}),
    (UsageError, "labels", {"removal": Removal(units=torch.tensor([0, 1]))}),
    (InputMismatch, "batch", {"inputs": (X, drawn(3, 1))}),
    (UsageError, "more axis", {"inputs": X[:, 0], "relevance": R[:, 0]}),
    (NonFiniteError, "the model gives NaN", {"model": lambda x: linear(x).log()}),
    (InputMismatch, "logits", {"model": lambda x: {"logits": linear(x)}}),
    (InputMismatch, "for 2 samples", {"model": lambda x: linear(x)[:1]}),
]


@pytest.mark.parametrize(("error", "match", "change"), BAD)
def test_what_makes_no_sense_is_refused(
    error: type[GraphoptError], match: str, change: dict[str, Any]
) -> None:
    request: dict[str, Any] = {"model": linear, "inputs": X, "relevance": R, **change}
    with pytest.raises(error, match=match):
        perturbation_curves(request.pop("model"), request.pop("inputs"), **request)
