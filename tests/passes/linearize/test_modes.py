"""Models that branch on ``self.training``: both graphs are rewritten, with the same tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.private import comparisons
from tests.passes.linearize.nets import drawn, linearized, section

aten = torch.ops.aten


class Doubling(nn.Module):
    """Twice as much in training; a residual block that is dropped by chance, as a rule."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.block = nn.Linear(8, 8)
        self.other = other

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = torch.flip(x, (0,)).flip(0)
        x = F.relu(self.stem(x))
        y = F.gelu(self.block(x)) if self.training and self.other else F.relu6(self.block(x))
        y = self.head(x + y)
        return 2 * y if self.training else y


@pytest.mark.parametrize("spec", ["relus=25%", "relus=0", "relus=50%,granularity=channel"])
def test_both_modes_evaluate_the_same_replacements(spec: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = drawn(64, 6)
    model = Doubling().eval()
    module = linearized(model, x, spec=spec)
    assert module.program.eval_module is not None
    assert sum(comparisons(module, x).values()) == section(module)["relus_after"]
    module.save(tmp_path / "saved.pt2")
    for each in (module, graphopt.load(tmp_path / "saved.pt2")):
        evaluated = each.eval()(x)
        assert torch.allclose(each.train()(x), 2 * evaluated, atol=1e-6)
    assert not torch.allclose(evaluated, model(x), atol=1e-3)


def test_training_trains_what_inference_uses() -> None:
    torch.manual_seed(0)
    x = drawn(64, 6)
    module = linearized(Doubling().eval(), x, spec="relus=25%,replacement=poly2").train()
    module(x).square().mean().backward()
    added = {n: p for n, p in module.named_parameters() if n.startswith("_graphopt.")}
    assert len(added) == 2
    before = module.eval()(x)
    for parameter in added.values():
        assert float(parameter.grad.abs().max()) > 0
        parameter.data.mul_(1.5)
    assert not torch.allclose(module(x), before, atol=1e-3)
    assert torch.allclose(module.train()(x), 2 * module.eval()(x), atol=1e-6)


def test_other_non_linearities_in_training_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"relu6.*gelu") as caught:
        linearized(Doubling(other=True).eval(), drawn(16, 6))
    assert "test_modes.py" in str(caught.value)
