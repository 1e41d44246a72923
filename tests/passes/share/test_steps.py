"""Step functions for derivatives: the fit, the published constants, the codes, the promise."""

from __future__ import annotations

import copy
from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.share.fit import REGELU2, RESILU2, Steps, fit_steps
from graphopt.passes.share.steps import pack_steps, unpack_steps
from tests.passes.share.test_share import distance, saved


def normal() -> np.ndarray:
    """Quantiles of N(0, 1)."""
    places = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    return torch.special.ndtri(places).numpy()


def slopes(act: str, x: np.ndarray) -> np.ndarray:
    """The derivative by its closed form."""
    t = torch.from_numpy(x)
    if act == "gelu":
        density = torch.exp(-(t**2) / 2) / (2 * torch.pi) ** 0.5
        return (torch.special.ndtr(t) + t * density).numpy()
    s = torch.sigmoid(t)
    return (s * (1 + t * (1 - s))).numpy()


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("act", "published", "theirs", "ours"),
    [("gelu", REGELU2, 0.947, 0.991), ("silu", RESILU2, 0.924, 0.9895)],
)
def test_cosines_on_a_normal_input(act: str, published: Steps, theirs: float, ours: float) -> None:
    """The figures that are known for the published constants and for the optimum."""
    x = normal()
    y = slopes(act, x)
    # gradients that are independent of x leave the cosine of the derivatives themselves
    assert cosine(published(x), y) == pytest.approx(theirs, abs=2e-3)
    assert cosine(fit_steps(x, y)(x), y) == pytest.approx(ours, abs=2e-3)


def test_the_fit_is_optimal() -> None:
    """Against every way to cut a few samples into segments."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        x = np.sort(rng.normal(size=9))
        y = rng.normal(size=9)
        found = fit_steps(x, y, 3)(x)
        best = min(
            sum(float(((part - part.mean()) ** 2).sum()) for part in np.split(y, cuts))
            for cuts in combinations(range(1, 9), 2)
        )
        assert float(((found - y) ** 2).sum()) == pytest.approx(best)


@pytest.mark.parametrize("published", [REGELU2, RESILU2])
@pytest.mark.parametrize("n", [0, 1, 5, 64])
def test_codes_are_those_of_the_formula(published: Steps, n: int) -> None:
    x = torch.linspace(-8, 8, n)
    packed = pack_steps(x, published.thresholds)
    assert packed.numel() == -(-n // 4)
    for index, value in enumerate(x.tolist()):
        code = sum(value > threshold for threshold in published.thresholds)
        assert (int(packed[index // 4]) >> (2 * (index % 4))) & 3 == code
    back = unpack_steps(packed, published.levels, x.shape, torch.float64)
    np.testing.assert_array_equal(back.numpy(), published(x.numpy().astype(np.float64)))


def test_few_samples_and_a_constant_slope() -> None:
    found = fit_steps(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    np.testing.assert_array_equal(found(np.array([-5.0, 1.5, 50.0])), 3.0)


class Adapted(nn.Module):
    """A frozen block with something to train in front of it: nothing but GELU keeps its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.up = nn.Linear(32, 256).requires_grad_(False)
        self.down = nn.Linear(256, 32).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(self.first(x))))


x = torch.randn(512, 32, generator=torch.Generator().manual_seed(0))


def approximate(granted: str) -> tuple[nn.Module, graphopt.OptimizedModule]:
    torch.manual_seed(0)
    model = Adapted()
    passes = f"canonicalize,share{{gradient_error={granted}}}"
    return model, graphopt.optimize(model, passes=passes, example_inputs=(x,))


def error(module: nn.Module, model: nn.Module) -> float:
    return distance(module, model, x)


def test_what_is_granted_is_used_and_kept() -> None:
    model, module = approximate("20%")
    section = module.report.to_dict()["share"]
    assert 0 < section["gradient_error"] <= 0.2
    assert section["gradient_cosine"] > 0.98
    assert saved(copy.deepcopy(module), x) < 0.3 * saved(copy.deepcopy(model), x)
    assert "2-bit derivative" in {site["rule"] for site in section["sites"]}
    assert error(module, model) < 0.3  # another loss than the one that was measured


def test_what_would_be_too_much_is_not_done() -> None:
    model, module = approximate("0.1%")
    assert module.report.to_dict()["share"]["gradient_error"] == 0.0
    assert error(module, model) < 1e-6


def test_a_trainable_layer_behind_refuses() -> None:
    """Code and output, 4.25 bytes an element, are more than the input alone."""
    model = Adapted().requires_grad_(True)
    passes = "canonicalize,share{gradient_error=50%}"
    module = graphopt.optimize(model, passes=passes, example_inputs=(x,))
    section = module.report.to_dict()["share"]
    assert "2-bit derivative" not in {site["rule"] for site in section["sites"]}
    (refused,) = section["refused"]
    assert refused["rule"] == "2-bit derivative"
    assert "to keep the input alone is less" in refused["reason"]


def test_a_saved_module_keeps_its_steps(tmp_path) -> None:
    _, module = approximate("20%")
    module.save(tmp_path / "steps.pt2")
    assert error(graphopt.load(tmp_path / "steps.pt2"), module) == 0.0
