"""Ranges on inputs beyond those of calibration."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.passes.linearize.calibration import reference
from graphopt.passes.linearize.probing import BEYOND, probed
from graphopt.passes.linearize.refit import refit, survey
from graphopt.passes.linearize.replacements import Replacement
from graphopt.passes.linearize.sites import sites
from graphopt.pipeline import PassContext
from tests.passes.linearize.nets import drawn, linearized, section

vectors = drawn(40, 6)


def two_sites() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.ReLU(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers)
    for _ in range(30):
        model(drawn(40, 6, seed=1))
    return model.eval()


def test_growth_by_hand() -> None:
    """The second site reads a norm of a layer of the first one's polynomial."""
    model = two_sites()
    context = PassContext(args=(vectors[:2],), kwargs={}, source=model, data=[vectors])
    program = graphopt.capture(model, (vectors[:2],))
    given = reference(program, context, 1000)
    found = survey(given, dict.fromkeys(sites(program), ("poly2",)))
    none = torch.zeros(0, dtype=torch.int64)
    chosen = {site: Replacement(site, none, "poly2", None) for site in found.options}
    refitted = refit(given, chosen)
    growth = probed(given, refitted)
    first, second = refitted.replacements.values()
    assert first.coefficients is not None

    x = BEYOND * vectors
    c = first.coefficients.float().view(3, -1)
    layer, norm = model[1], model[2]
    assert isinstance(norm, nn.BatchNorm1d)
    mean, variance = (refitted.here[path] for path in ("2.running_mean", "2.running_var"))
    replaced = F.batch_norm(
        layer(c[0] + c[1] * x + c[2] * x * x), mean, variance, norm.weight, norm.bias, eps=norm.eps
    )
    want = replaced.abs().max() / norm(layer(x.relu())).abs().max()
    assert growth[first.site] == 1.0
    assert growth[second.site] == pytest.approx(float(want.detach()), rel=1e-4)


def test_integers_are_not_scaled() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    ids = torch.arange(8).view(4, 2)
    context = PassContext(args=(ids,), kwargs={}, source=model, data=[ids])
    program = graphopt.capture(model, (ids,))
    given = reference(program, context, 1000)
    found = survey(given, dict.fromkeys(sites(program), ("affine",)))
    none = torch.zeros(0, dtype=torch.int64)
    chosen = {site: Replacement(site, none, "affine", None) for site in found.options}
    assert probed(given, refit(given, chosen)) == {}


class Tent(nn.Module):
    """Maps [-1, 1] onto itself again and again; parabolas in its place square what is outside."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(6):
            x = 2 * x.abs() - 1
        return x


inside = torch.linspace(-1, 1, 400).view(100, 4)


@torch.no_grad()
def magnitude(module: nn.Module, x: Tensor) -> float:
    return float(module(x).abs().max())


def test_what_escapes_a_little_further_out_is_said() -> None:
    with pytest.warns(UserWarning, match="grows to .* a quarter larger than the calibration"):
        module = linearized(Tent(), inside, spec="relus=0,replacement=poly2")
    assert magnitude(module, inside) < 2
    assert magnitude(module, BEYOND * inside) > 1e6
    assert all(site["range_growth"] < 2 for site in section(module)["sites"])


def test_it_is_withdrawn_where_something_else_is_offered() -> None:
    module = linearized(Tent(), inside, spec="relus=0,rounds=1")
    assert any("poly2 at abs" in text for text in section(module)["avoided"])
    assert section(module)["warnings"] == []
    assert magnitude(module, BEYOND * inside) < 40 * magnitude(Tent(), BEYOND * inside)
