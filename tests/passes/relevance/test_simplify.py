"""A run's graph computes the same after it was made smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Maxout(nn.Module):
    def __init__(self, choose: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.choose = nn.Linear(6, 8, bias=False), choose

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.layer(x).chunk(2, 1)
        return self.choose(first, second)


def _calls(explained: Any) -> list[Any]:
    return [n.target for n in explained.graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize("emitter", ["auto", "explicit"])
@pytest.mark.parametrize("choose", [torch.maximum, torch.minimum, torch.max, torch.fmax])
def test_the_larger_of_two_values_takes_all(
    choose: Callable[[Tensor, Tensor], Tensor], emitter: str
) -> None:
    """Its derivative is written in place: zero times the gradient where the other one won."""
    torch.manual_seed(0)
    model, x = Maxout(choose).double(), torch.randn(3, 6).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
    explained: Any = graphopt.explain(model, (x,), composite="lrp-0", emitter=emitter)
    found = explained(x)
    torch.testing.assert_close(found.relevance["x"], gradient * x)
    torch.testing.assert_close(found.ledger["inputs"], found.ledger["output"])


def test_no_write_is_left_in_a_run() -> None:
    x = torch.randn(3, 6)
    explained: Any = graphopt.explain(Maxout(torch.maximum), (x,))
    calls = _calls(explained)
    assert not any(getattr(t, "_schema", None) and t._schema.is_mutable for t in calls)


class Rotated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.cat([-x[:, 3:], x[:, :3]], 1))


def test_halves_of_a_gradient_are_joined() -> None:
    torch.manual_seed(0)
    model, x = Rotated().double(), torch.randn(3, 6).double()
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(leaf).amax(1).sum(), leaf)
    explained: Any = graphopt.explain(model, (x,), composite="lrp-0")
    torch.testing.assert_close(explained(x).relevance["x"], gradient * x)
    assert torch.ops.aten.slice_backward.default not in _calls(explained)


class Activated(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(6, 8), nn.Linear(8, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(self.up(x)))


@pytest.mark.parametrize(
    ("written", "fused"),
    [
        (lambda x: x * x.sigmoid(), nn.functional.silu),
        (lambda x: x * 0.5 * (1 + (x / 2**0.5).erf()), nn.functional.gelu),
        (lambda x: (1 + (x / 2**0.5).erf()) * (0.5 * x), nn.functional.gelu),
    ],
)
def test_a_written_out_activation_is_not_divided_by_its_input(
    written: Callable[[Tensor], Tensor], fused: Callable[[Tensor], Tensor]
) -> None:
    torch.manual_seed(0)
    models = [Activated(f).double().eval() for f in (written, fused)]
    with torch.no_grad():
        models[0].up.bias[0] = 0
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(3, 6).double()
    x[0] = 0  # there the slope is a limit
    first, second = (graphopt.explain(m, (x,)) for m in models)
    torch.testing.assert_close(first(x).relevance["x"], second(x).relevance["x"])
    assert torch.ops.aten.nan_to_num.default not in _calls(first)


class Told(nn.Module):
    """Returns scores, and beside them a quotient of a product by its factor."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), torch.nan_to_num(x * x.cos() / x, 7.0)


def test_what_a_model_says_of_zero_by_zero_stays() -> None:
    x = torch.zeros(2, 6)
    explained: Any = graphopt.explain(Told(), (x,))
    assert explained(x).output[1].eq(7).all()
