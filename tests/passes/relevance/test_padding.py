"""Leaving zeros out of a graph leaves its results as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import graphopt
from graphopt.passes.relevance.cropping import crop
from graphopt.passes.relevance.marks import is_backward

aten = torch.ops.aten

BATCH, PLACES, WIDTH = 3, 7, 8

Call = Callable[..., Any]


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


def _heads(t: Tensor) -> Tensor:
    return t.view(t.shape[0], t.shape[1], 2, -1).transpose(1, 2)


def _attention(t: Tensor, other: Tensor, causal: bool, mask: Tensor | None = None) -> Any:
    q, k, v = (_heads(a) for a in (other, other + 1, other * 2))
    run = aten._scaled_dot_product_flash_attention_for_cpu
    result, sizes = run(q, k, v, 0.0, causal, attn_mask=mask)
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(_heads(t), q, k, v, result, sizes, 0.0, causal, attn_mask=mask)


CROPPED: dict[str, Call] = {
    "weights": lambda t, o, w, m: t * w[:, 0],
    "values": lambda t, o, w, m: o * t * 2 - t / o,
    "norm": lambda t, o, w, m: (t - t.mean(-1, keepdim=True)) * o[..., :1],
    "masked": lambda t, o, w, m: t * aten.threshold_backward(o, t.abs(), 0),
    "where": lambda t, o, w, m: torch.where(o > 0, t, 0) + torch.where(o > 1, 0, t),
    "linear": lambda t, o, w, m: (_rows(t) @ w).view(t.shape[0], PLACES, 5) * o[..., :5],
    "linear twice": lambda t, o, w, m: _rows((_rows(t) @ w).view(t.shape[0], -1, 5)) @ w.t(),
    "bias": lambda t, o, w, m: (_rows(t).mv(w[:, 0])).view(t.shape[0], -1),
    "heads": lambda t, o, w, m: (_heads(t) * 2).transpose(1, 2).reshape(t.shape),
    "permuted": lambda t, o, w, m: t.permute(2, 0, 1) * o.permute(2, 0, 1),
    "unsqueezed": lambda t, o, w, m: (t.unsqueeze(0) * 2).unsqueeze(-1).squeeze(0) * 3,
    "channels": lambda t, o, w, m: torch.cat([t[..., :3] * 2, -t[..., 3:]], -1),
    "batched left": lambda t, o, w, m: torch.bmm(t, o.transpose(1, 2)),
    "softmax": lambda t, o, w, m: aten._softmax_backward_data(t, o.softmax(-1), -1, torch.float32),
    "attention": lambda t, o, w, m: _attention(t, o, False, m)[0],
}
SUMMED: dict[str, Call] = {
    "sum": lambda t, o, w, m: (t * o).sum([1, 2]),
    "batched contraction": lambda t, o, w, m: torch.bmm(o.transpose(1, 2), t),
    "keys and values": lambda t, o, w, m: _attention(t, o, False, m)[1:],
    "no mask": lambda t, o, w, m: _attention(t, o, False)[1:],
}
LEFT: dict[str, Call] = {
    "added": lambda t, o, w, m: t + o,
    "one more": lambda t, o, w, m: t + 1,
    "divided by": lambda t, o, w, m: o / t,
    "mean": lambda t, o, w, m: t.mean(1),
    "exponential": lambda t, o, w, m: t.exp(),
    "concatenated": lambda t, o, w, m: torch.cat([t, o], 1),
    "two places": lambda t, o, w, m: t * t.flip(1),
    "causal": lambda t, o, w, m: _attention(t, o, True),
    "broadcast": lambda t, o, w, m: t[:, :1] * o,
    "product with itself": lambda t, o, w, m: _rows(t).t() @ _rows(t),
}


def _padded(call: Call, index: int) -> Call:
    def run(x: Tensor, other: Tensor, *more: Tensor) -> Any:
        return call(aten.select_backward(x, other.shape, 1, index), other, *more)

    return run


def _sliced(call: Call) -> Call:
    def run(x: Tensor, other: Tensor, *more: Tensor) -> Any:
        part = torch.stack([x, 2 * x], 1)
        return call(aten.slice_backward(part, other.shape, 1, 3, 5, 1), other, *more)

    return run


def _cropped(call: Call, mode: Any = "fake") -> torch.fx.GraphModule:
    """The graph without zeros; its results are those of the call."""
    torch.manual_seed(0)
    shapes = ((BATCH, WIDTH), (BATCH, PLACES, WIDTH), (WIDTH, 5), (1, 1, PLACES, PLACES))
    given = [torch.randn(shape) for shape in shapes]
    graph: Any = make_fx(call, tracing_mode=mode)(*given)
    crop(graph.graph)
    graph.graph.lint()
    graph.recompile()
    wanted = call(*given)
    torch.testing.assert_close(graph(*given), wanted, equal_nan=True)
    return graph


def _made(graph: torch.fx.GraphModule) -> list[Any]:
    return [n.target for n in graph.graph.nodes if n.op == "call_function"]


@pytest.mark.parametrize(("index", "mode"), [(4, "fake"), (-1, "fake"), (0, "symbolic")])
@pytest.mark.parametrize("name", [*CROPPED, *SUMMED, *LEFT])
def test_one_place(name: str, index: int, mode: str) -> None:
    _cropped(_padded((CROPPED | SUMMED | LEFT)[name], index), mode)


@pytest.mark.parametrize("name", [*CROPPED, *SUMMED, *LEFT])
def test_two_places(name: str) -> None:
    _cropped(_sliced((CROPPED | SUMMED | LEFT)[name]))


@pytest.mark.parametrize("name", [*CROPPED, *SUMMED])
def test_zeros_are_added_last_or_never(name: str) -> None:
    graph = _cropped(_padded((CROPPED | SUMMED)[name], 4))
    made = _made(graph)
    assert aten.select_backward.default not in made
    assert made.count(aten.slice_backward.default) == (name in CROPPED)
    (output,) = graph.graph.find_nodes(op="output")
    for value in graph.graph.find_nodes(op="call_function", target=aten.slice_backward.default):
        readers = list(value.users)
        while readers and readers != [output]:  # views at most
            assert {n.target for n in readers} <= {aten.view.default}
            readers = [u for n in readers for u in n.users]


def test_the_last_query_of_a_causal_attention_looks_at_all_keys() -> None:
    graph = _cropped(_padded(lambda t, o, w, m: _attention(t, o, True)[1:], -1))
    assert aten.slice_backward.default not in _made(graph)
    graph = _cropped(_padded(lambda t, o, w, m: _attention(t, o, True)[1:], 0))
    made = [t for t in _made(graph) if "slice_backward" in str(t) or "select_backward" in str(t)]
    assert made


def _backward(explained: Any) -> list[torch.fx.Node]:
    made = [n for n in explained.graph.graph.nodes if is_backward(n)]
    return [n for n in made if isinstance(n.meta["val"], Tensor)]


class Reader(nn.Module):
    """A layer of a transformer without attention, of which one place is read."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.norm, self.head, self.place = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4), place

    def forward(self, x: Tensor) -> Tensor:
        """Scores of four classes."""
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.head(x[:, self.place])


@pytest.mark.parametrize("place", [0, 2, -1])
def test_an_explanation_runs_at_the_place_that_is_read(place: int) -> None:
    torch.manual_seed(0)
    model, x = Reader(place).eval(), torch.randn(BATCH, PLACES, WIDTH)
    explained: Any = graphopt.explain(model, (x,))
    found = explained(x)
    relevance = found.relevance["x"]
    assert relevance[:, place].abs().amin(-1).gt(0).all()
    relevance[:, place] = 0
    assert not relevance.any()
    parts = [v for k, v in found.ledger.items() if k != "output"]
    torch.testing.assert_close(sum(parts), found.ledger["output"])
    runs_all = [n for n in _backward(explained) if PLACES in n.meta["val"].shape]
    assert [n.target for n in runs_all] == [aten.slice_backward.default]
