"""Values in few bits: the codec, the rewrite, the promise."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.share.quantise import GROUP, dequantise, memory_order, packed_bytes, quantise
from tests.passes.rematerialize.test_planned_step import gradients
from tests.passes.share.test_share import distance, saved

SHAPES = [(0, 3), (1,), (7, 5), (GROUP,), (3, 4, 5, 6), (300, 1000)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_element_is_within_half_a_step(
    shape: tuple[int, ...], dtype: torch.dtype, bits: int
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    order = memory_order(x)
    assert order is not None
    packed = quantise(x, bits, order)
    assert packed.nbytes == packed_bytes(x.numel(), bits) == -(-x.numel() // 256) * (8 + 32 * bits)
    back = dequantise(packed, bits, order, x.shape, dtype)
    assert back.dtype == dtype
    assert back.stride() == x.stride()
    flat, again = (t.as_strided((t.numel(),), (1,)).double() for t in (x, back))
    for group, got in zip(flat.split(GROUP), again.split(GROUP), strict=True):
        if group.numel():
            half = float(group.max() - group.min()) / (2**bits - 1) / 2
            slack = 0.01 * float(group.abs().max()) if dtype is torch.bfloat16 else 1e-6
            assert float((got - group).abs().max()) <= half + slack


def test_constants_are_exact() -> None:
    x = torch.full((1000,), 3.25)
    for bits in (8, 4):
        back = dequantise(quantise(x, bits, [0]), bits, [0], x.shape, x.dtype)
        assert torch.equal(back, x)


class Block(nn.Module):
    """Trainable layers around activations, a norm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


x = torch.randn(512, 64, generator=torch.Generator().manual_seed(0))


def blocks() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), Block(), Block())


def compressed(granted: str, **options: object) -> graphopt.OptimizedModule:
    passes = f"canonicalize,share{{gradient_error={granted}}}"
    return graphopt.optimize(blocks(), passes=passes, example_inputs=(x,), **options)  # type: ignore[arg-type]


def error(module: nn.Module, model: nn.Module) -> float:
    return distance(module, model, x)


@pytest.mark.parametrize(("granted", "most"), [("2%", 0.3), ("15%", 0.16)])
def test_a_granted_error_saves_bytes_and_is_kept(granted: str, most: float) -> None:
    model = blocks()
    module = compressed(granted, loss=lambda y: y.square().mean())
    section = module.report.to_dict()["share"]
    allowed = float(granted.removesuffix("%")) / 100
    assert section["gradient_error"] <= allowed
    assert error(module, model) == pytest.approx(section["gradient_error"], rel=1e-3)
    assert saved(copy.deepcopy(module), x) <= most * saved(copy.deepcopy(model), x)
    torch.testing.assert_close(module(x), model(x), rtol=0, atol=0)  # forward is untouched


def test_a_saved_module_and_another_batch(tmp_path) -> None:
    module = compressed("2%")
    module.save(tmp_path / "few_bits.pt2")
    loaded = graphopt.load(tmp_path / "few_bits.pt2")
    assert error(loaded, module) == 0.0
    y = x[:100]
    loss = lambda m: m(y).square().mean()  # noqa: E731
    got, want = gradients(loaded, loss), gradients(blocks(), loss)
    for name, gradient in want.items():
        assert float((got[name] - gradient).norm()) <= 0.05 * float(gradient.norm()), name


def test_calls_that_nothing_was_fitted_to_are_exact() -> None:
    """Other graphs have other values under the same names."""
    model, module = blocks(), compressed("2%")
    for m in (model, module):
        m.get_parameter("1.up.weight").requires_grad_(False)
    assert error(module, model) == 0.0


def test_statistics_are_updated_once() -> None:
    """What is made again in backward from few bits leaves BatchNorm's buffers alone."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Hardswish(), nn.Conv2d(16, 16, 3)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(16), nn.Tanh(), nn.Conv2d(16, 4, 3))
    images = torch.randn(8, 3, 24, 24)
    passes = "canonicalize,share{gradient_error=5%}"
    module = graphopt.optimize(model, passes=passes, example_inputs=(images,))
    section = module.report.to_dict()["share"]
    assert 0 < section["gradient_error"] <= 0.05
    assert section["saved_after"] < 0.4 * section["saved_before"]
    for m in (model, module):
        m(images).square().mean().backward()
    for (name, got), (_, want) in zip(module.named_buffers(), model.named_buffers(), strict=True):
        assert torch.equal(got, want), name


def granted(model: nn.Module, *inputs: Tensor, error: str = "5%") -> graphopt.OptimizedModule:
    passes = f"canonicalize,share{{gradient_error={error}}}"
    return graphopt.optimize(model, passes=passes, example_inputs=inputs, verify=False)


@pytest.mark.parametrize("of", ["input", "weights"])
def test_another_memory_format_than_the_one_that_was_traced(of: str) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh()]
    model = nn.Sequential(*layers, nn.Conv2d(16, 4, 3))
    images = torch.randn(8, 3, 24, 24)
    module = granted(model, images)
    if of == "input":
        images = images.to(memory_format=torch.channels_last)
    else:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert distance(module, model, images) < 0.06


class Looked(nn.Module):
    """Rows are looked up by what an activation rounds to."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.rows = nn.Linear(64, 64), nn.Linear(64, 64), nn.Embedding(11, 64)

    def forward(self, x: Tensor) -> Tensor:
        t = torch.tanh(self.a(x))
        index = (t.detach() * 4.9 + 5).long()
        return self.b(t + self.rows(index).sum(1))


def test_indices_are_never_made_from_rounded_values() -> None:
    torch.manual_seed(0)
    model = Looked()
    module = granted(model, x, error="15%")
    loss = lambda m: m(x).square().mean()  # noqa: E731
    got, want = (gradients(m, loss)["rows.weight"] for m in (module, model))
    assert float((got - want).norm() / want.norm()) < 0.02


def test_log_sigmoid_and_a_frozen_tail() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.LogSigmoid(), nn.Linear(64, 64))
    for layer in model[1:]:
        layer.requires_grad_(False)
    assert distance(granted(model, x), model, x) < 0.06


def test_an_error_is_told_by_a_later_plan_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(6)))
    first = granted(model, x)
    found = first.report.to_dict()["share"]
    assert found["gradient_error"] > 0
    budget = f"memory={int(0.97 * found['peak_after'])}"
    again = graphopt.optimize(first, budget, (x,), passes="rematerialize", time_limit=2.0)
    assert again.report.to_dict()["share"]["gradient_error"] == found["gradient_error"]


class MadeAgain(nn.Module):
    """GELU's input is made again from what is kept in any case."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t, self.f = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.f.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.t(h) + self.f(F.gelu(h * 2))


def test_no_steps_where_they_save_nothing() -> None:
    torch.manual_seed(0)
    section = granted(MadeAgain(), x, error="6%").report.to_dict()["share"]
    assert "2-bit derivative" not in {site["rule"] for site in section["sites"]}


def test_steps_before_a_frozen_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.GELU(), nn.Conv2d(16, 4, 3))
    model[2].requires_grad_(False)
    images = torch.randn(8, 3, 24, 24)
    section = granted(model, images, error="30%").report.to_dict()["share"]
    assert "2-bit derivative" in {site["rule"] for site in section["sites"]}
    assert section["saved_after"] < 0.1 * section["saved_before"]


def test_a_memory_budget_takes_bits_before_recomputation() -> None:
    """Within what is granted, no FLOP is done twice where it would have to be otherwise."""

    def planned(budget: str) -> dict:
        module = graphopt.optimize(
            nn.Sequential(*(Block() for _ in range(6))), budget, (x,), time_limit=2.0, verify=False
        )
        return module.report.to_dict()

    exact, granted = planned("memory=25%"), planned("memory=25%,gradient_error=2%")
    assert granted["plan"]["recomputed_flops"] < exact["plan"]["recomputed_flops"]
    assert 0 < granted["share"]["gradient_error"] <= 0.02
    assert granted["memory"]["measured_peak"] <= granted["memory"]["budget"]


class Masked(nn.Module):
    """Reads a second input, broadcast by a new last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, a: Tensor, mask: Tensor) -> Tensor:
        h = self.first(a).exp() * mask[..., None]
        return self.second(h.softmax(-1)).square()


def test_a_file_of_a_model_with_two_inputs_keeps_what_was_fitted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Masked(), (torch.randn(4, 10, 32), torch.rand(4, 10) > 0.3)
    small = granted(model, *inputs)
    small.save(tmp_path / "small.gopt")
    loaded = graphopt.load(tmp_path / "small.gopt")
    assert saved(loaded, *inputs) == saved(small, *inputs)
    assert distance(loaded, model, *inputs) == distance(small, model, *inputs) > 0


class Clamped(nn.Module):
    """Backward reads where the clamp cut, which needs the value as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, a: Tensor) -> Tensor:
        z = self.linear(a).clamp(min=-0.5)
        return (z @ z.transpose(1, 2)).tanh() @ z


def test_what_saves_nothing_is_not_approximated() -> None:
    torch.manual_seed(0)
    small = granted(Clamped(), torch.randn(4, 10, 32))
    share = small.report.to_dict()["share"]
    few = [site for site in share["sites"] if site["rule"].endswith("bits")]
    assert few, "something is approximated"
    assert all(site["bytes_after"] < site["bytes_before"] for site in few)
    assert "saves nothing" in " ".join(refusal["reason"] for refusal in share["refused"])
