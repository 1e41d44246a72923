"""What text models are made of, in modules of a few lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import CaptureError


class Doubled(torch.autograd.Function):
    """Twice the hyperbolic tangent; backward is another function's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x.tanh()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 0


def test_an_autograd_function_is_what_its_forward_computes() -> None:
    """Bloom's GELU is one: relevance asks for no backward of the user's."""
    first, last = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

    class Net(nn.Module):
        def __init__(self, activation: Any) -> None:
            super().__init__()
            self.first, self.last, self.activation = first, last, activation

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.activation(self.first(x)))

    x = torch.randn(3, 4).double()
    with_function = graphopt.explain(Net(Doubled.apply), (x,))(x)
    plain = graphopt.explain(Net(lambda t: 2 * t.tanh()), (x,))(x)
    torch.testing.assert_close(with_function.relevance, plain.relevance, rtol=0, atol=0)
    assert float(plain.relevance["x"].abs().min()) > 0


class Experts(nn.Module):
    """Three experts, each for some tokens, in one call or one by one."""

    ends: Tensor

    def __init__(self, call: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 8, 16))
        self.register_buffer("ends", torch.tensor([2, 2, 5], dtype=torch.int32))
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if self.call is None:
            y = torch.cat([x[:2] @ self.weight[0], x[2:] @ self.weight[2]])
        else:
            rows, ends = x.reshape(-1, 8), self.ends * x.shape[1]
            y = self.call(rows, self.weight, offs=ends).unflatten(0, (5, x.shape[1]))
        return y.relu().sum(0)


def experts(name: str) -> Any:
    """The call that multiplies groups of rows: torch's, and what stands for it in other types."""
    if name == "_grouped_mm":
        return F.grouped_mm
    pytest.importorskip("transformers.integrations.moe")
    return torch.ops.transformers.grouped_mm_fallback


@pytest.mark.parametrize("composite", ["cp-lrp", "excitation", "epsilon-alpha2-beta1"])
@pytest.mark.parametrize(
    ("name", "dtype", "bar"),
    [("_grouped_mm", torch.bfloat16, 0.03), ("grouped_mm_fallback", torch.float64, 1e-12)],
)
def test_experts_in_one_call_are_experts_one_by_one(
    name: str, dtype: torch.dtype, bar: float, composite: str
) -> None:
    x = torch.randn(3, 5, 8, dtype=dtype)
    explained: list[Any] = [
        graphopt.explain(Experts(call).to(dtype), (x,), composite=composite, target=4)
        for call in (experts(name), None)
    ]
    assert name in {each["op"] for each in explained[0].rules()}
    for batch in (x, x[:1]):
        one, other = (e(batch) for e in explained)
        torch.testing.assert_close(one.relevance, other.relevance, rtol=bar, atol=bar)
        torch.testing.assert_close(one.ledger, other.ledger, rtol=bar, atol=bar)


def test_experts_whose_results_are_read_by_columns() -> None:
    """Their gradient has the strides of a transposed matrix, which the operator doesn't take."""

    class Columns(Experts):
        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            columns = self.call(x.reshape(-1, 8), self.weight, offs=self.ends * x.shape[1]).t()
            return (columns * torch.arange(1, 17)[:, None]).unflatten(1, (5, -1)).sum(1).t()

    x = torch.randn(3, 5, 8, dtype=torch.bfloat16)
    model = Columns(F.grouped_mm).bfloat16()
    explained: Any = graphopt.explain(model, (x,), target=2)
    weight = model.weight.detach()[[0, 0, 2, 2, 2], :, 2]
    for batch in (x, x[:1]):
        found = explained(batch).relevance["x"]
        torch.testing.assert_close(found, batch * weight * 3, rtol=0.02, atol=0.02)


class Sorted(nn.Module):
    """Tokens sorted by the expert that a router sends them to, and put back, or left in place."""

    def __init__(self, *, ordered: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.head = nn.Linear(4, 3), nn.Linear(6, 2)
        self.up, self.bias = nn.Parameter(torch.randn(3, 4, 6)), nn.Parameter(torch.randn(3, 6))
        self.ordered = ordered

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weight, expert = self.router(rows).softmax(-1).max(-1)
        order = expert.argsort() if self.ordered else torch.arange(rows.shape[0])
        expert = expert[order]
        y = (rows[order][:, None] @ self.up[expert])[:, 0] + self.bias[expert]
        y = y.relu() * weight[order][:, None]
        return self.head(y[order.argsort()].unflatten(0, (-1, 5)).sum(1))


@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp", "excitation"])
def test_the_ledger_of_each_sample_where_tokens_are_sorted(composite: str) -> None:
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    explained: list[Any] = [
        graphopt.explain(Sorted(ordered=ordered).double(), (x,), composite=composite)
        for ordered in (True, False)
    ]
    for batch in (x, x[:2].flip(1), x[:1] + 1):
        one, other = (e(batch) for e in explained)
        assert one.ledger["output"].shape == (len(batch),)
        torch.testing.assert_close(one.ledger, other.ledger, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(one.relevance, other.relevance, rtol=1e-9, atol=1e-11)


class Pooled(nn.Module):
    """The state at the place of a token, found by a mask or given: BART's way to a class."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)
        self.way = way

    def forward(self, ids: Tensor, last: Tensor) -> Tensor:
        states = self.table(ids).cumsum(1)
        if self.way == "mask":
            pooled = states[ids == 2].view(states.shape[0], -1, 4)[:, -1]
        elif self.way == "place":
            pooled = states.flatten(0, 1)[last]
        else:
            pooled = states[:, -1]
        return self.head(pooled)


@pytest.mark.parametrize("way", ["mask", "place"])
def test_states_that_are_selected_are_no_table(way: str) -> None:
    ids = torch.randint(3, 9, (3, 5))
    ids[:, -1] = 2
    last = torch.arange(3) * 5 + 4
    one, other = (graphopt.explain(Pooled(w).double(), (ids, last))(ids, last) for w in (way, ""))
    torch.testing.assert_close(one.relevance["ids"], other.relevance["ids"])
    torch.testing.assert_close(one.ledger["output"].sum(), other.ledger["output"].sum())


def test_layers_that_are_left_out_at_random_in_training() -> None:
    """M2M-100's; only the eval mode is explained, so only that has to be captured."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                if self.training and torch.rand([]) < 0.5:
                    continue
                x = layer(x)
            return x

    model, x = Dropping(), torch.randn(3, 4)
    with pytest.raises(CaptureError):
        graphopt.capture(model, (x,))
    explained: Any = graphopt.explain(model, (x,))
    assert model.training
    torch.testing.assert_close(explained(x).output, model.eval()(x), rtol=0, atol=0)
    assert [each["op"] for each in explained.rules()] == ["linear", "linear"]


def test_a_function_of_one_place_of_the_output() -> None:
    """A class of each token: the target says of which one, and each operation is accounted for."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.GELU(), nn.Linear(4, 3)).double()
    ids = torch.randint(0, 9, (2, 5))
    explained: Any = graphopt.explain(model, (ids,), target=lambda scores: scores[:, 1].amax(-1))
    (relevance,) = explained(ids).relevance.values()
    assert relevance[:, 1].all()
    assert not relevance[:, [0, 2, 3, 4]].any()
    assert max(each["residual"] for each in explained.conservation()) < 1e-12
