"""Sites that choose alike since the user says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import UsageError
from tests.passes.linearize.nets import drawn, linearized, section

vectors = drawn(20, 6)


class Stream(nn.Module):
    """A residual stream of blocks, and a head that is wider."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.head = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def kept(module: Any) -> list[Any]:
    own = module._graphopt
    return [
        getattr(own, s["node"]).kept.tolist() if 0 < s["kept"] < s["total"] else s["kept"]
        for s in section(module)["sites"]
    ]


def test_one_mask_for_a_stream() -> None:
    apart = kept(linearized(Stream().eval(), vectors, spec="relus=14"))
    assert not apart[0] == apart[1] == apart[2]
    module = linearized(Stream().eval(), vectors, spec="relus=14,couple=blocks.*")
    together = kept(module)
    assert together[0] == together[1] == together[2]
    choices = {site["choice"] for site in section(module)["sites"][:3]}
    assert len(choices) == 1
    assert section(module)["relus_after"] <= 14


def test_stages_go_as_a_whole() -> None:
    spec = "relus=27,granularity=site,couple=blocks.0.*|blocks.[12].*"
    first, second, third, _ = kept(linearized(Stream().eval(), vectors, spec=spec))
    assert second == third
    assert (first, second) != (6, 6)


def test_by_the_names_of_calls() -> None:
    found = kept(linearized(Stream().eval(), vectors, spec="relus=14,couple=relu|relu_[12]"))
    assert found[1] == found[2]


@pytest.mark.parametrize("select", ["random", "fisher"])
def test_at_random_too(select: str) -> None:
    spec = f"relus=14,couple=blocks.*,select={select}"
    found = kept(linearized(Stream().eval(), vectors, spec=spec))
    assert found[0] == found[1] == found[2]


def test_what_can_not_choose_alike() -> None:
    with pytest.raises(UsageError, match="relu_3 has 10"):
        linearized(Stream().eval(), vectors, spec="relus=14,couple=*")
    module = linearized(Stream().eval(), vectors, spec="relus=14,couple=*,granularity=site")
    assert section(module)["relus_after"] == 0
    with pytest.raises(UsageError, match="names no non-linearity"):
        linearized(Stream().eval(), vectors, spec="relus=14,couple=stem")
