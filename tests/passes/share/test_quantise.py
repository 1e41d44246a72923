"""Values in few bits: the codec, the rewrite, the promise."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.share.quantise import GROUP, dequantise, packed_bytes, quantise
from tests.passes.rematerialize.test_planned_step import gradients
from tests.passes.share.test_share import saved

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
    packed = quantise(x, bits)
    assert packed.nbytes == packed_bytes(x.numel(), bits) == -(-x.numel() // 256) * (8 + 32 * bits)
    back = dequantise(packed, bits, x.shape, x.stride(), dtype)
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
        torch.testing.assert_close(dequantise(quantise(x, bits), bits, (1000,), (1,), x.dtype), x,
                                   rtol=0, atol=0)  # fmt: skip


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


def mean_square(module: nn.Module) -> Tensor:
    return module(x).square().mean()


def error(module: nn.Module, model: nn.Module) -> float:
    got, want = (
        torch.cat([g.flatten() for g in gradients(m, mean_square).values()])
        for m in (module, model)
    )
    return float((got - want).norm() / want.norm())


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


def test_a_memory_budget_takes_bits_before_recomputation() -> None:
    """Within what is granted, no FLOP is done twice where it would have to be otherwise."""

    def planned(budget: str) -> dict:
        module = graphopt.optimize(
            nn.Sequential(*(Block() for _ in range(6))), budget, (x,), time_limit=3.0
        )
        return module.report.to_dict()

    exact, granted = planned("memory=25%"), planned("memory=25%,gradient_error=2%")
    assert granted["plan"]["recomputed_flops"] < exact["plan"]["recomputed_flops"]
    assert 0 < granted["share"]["gradient_error"] <= 0.02
    assert granted["memory"]["measured_peak"] <= granted["memory"]["budget"]
