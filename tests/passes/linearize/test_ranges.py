"""Choices made anew where activations' ranges grow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from graphopt.errors import BudgetInfeasible
from graphopt.private import comparisons
from tests.passes.linearize.nets import drawn, linearized, section

vectors = torch.cat([drawn(200, 6), 6 * drawn(4, 6, seed=9)])


def deep(*gains: float, act: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential()
    for number, gain in enumerate(gains):
        layer = nn.Linear(12 if number else 6, 12)
        with torch.no_grad():
            layer.weight.mul_(gain)
        model.extend([layer, act()])
    return model.append(nn.Linear(12, 3)).eval()


def grown(module: Any) -> float:
    return max(site["range_growth"] for site in section(module)["sites"])


def choices(module: Any) -> list[str]:
    return [site["choice"] for site in section(module)["sites"]]


def test_what_grows_is_withdrawn() -> None:
    """Three levels for four sites: one gets the identity, and the last one alone feeds no other."""
    model = deep(3.0, 3.0, 3.0, 9.0, act=nn.Tanh)
    free = linearized(model, vectors, spec="levels=8,max_growth=1e9")
    held = linearized(model, vectors, spec="levels=8,max_growth=3")
    assert "identity" in choices(free)[:-1]
    assert grown(free) > 3 >= grown(held)
    assert (section(free)["avoided"], section(free)["warnings"]) == ([], [])
    told = section(held)["avoided"]
    assert told
    assert all("at tanh" in each and "grew too far" in each for each in told)
    assert choices(held) == ["affine"] * 3 + ["identity"]
    assert section(held)["levels_after"] == 8


@pytest.mark.parametrize("spec", ["relus=0", "relus=50%,replacement=poly2", "relus=50%"])
def test_never_further_than_before(spec: str) -> None:
    """A limit that nothing may reach: what comes out is the best of what was tried."""
    with pytest.warns(UserWarning, match="grew to"):
        held = linearized(deep(2.2, 2.2, 2.2, 2.2), vectors, spec=f"{spec},max_growth=0.5")
    free = linearized(deep(2.2, 2.2, 2.2, 2.2), vectors, spec=f"{spec},max_growth=1e9")
    assert grown(held) <= grown(free)
    assert sum(comparisons(held, vectors).values()) <= section(held)["relus_before"] // 2
    assert len(section(held)["warnings"]) == 4


def test_nothing_is_tried_within_the_limit() -> None:
    module = linearized(deep(2.2, 2.2, 2.2, 2.2), vectors, spec="relus=25%")
    assert grown(module) <= 10
    assert (section(module)["avoided"], section(module)["warnings"]) == ([], [])


def test_where_nothing_else_is_within_the_budget() -> None:
    """Linear layers leave nothing: the identity stays, and the report warns."""
    with pytest.warns(UserWarning, match="grew to"):
        module = linearized(
            deep(4.0, 4.0, 4.0, 4.0, act=nn.Tanh), vectors, spec="levels=5,max_growth=3"
        )
    assert choices(module) == ["identity"] * 4
    with pytest.raises(BudgetInfeasible):
        linearized(deep(4.0, 4.0, 4.0, 4.0, act=nn.Tanh), vectors, spec="levels=4,max_growth=3")
