"""Operators of graph, frequency, metric and pointwise networks, against gradients where linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import UsageError

EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 0, 2, 3]])


class Function(nn.Module):
    """A function with a matrix behind it."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(3, 4, dtype=torch.float64))

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(self, *args)


def explained(model: nn.Module, *args: Tensor, **options: Any) -> Any:
    module: Any = graphopt.explain(model, args, **options)
    assert max(each["residual"] for each in module.conservation()) < 1e-12
    result = module(*args)
    ledger = dict(result.ledger)
    torch.testing.assert_close(ledger.pop("output"), sum(ledger.values()))
    return result


def scattered(how: str) -> Callable[..., Tensor]:
    def run(self: Any, x: Tensor, edges: Tensor) -> Tensor:
        index = edges[1][:, None].expand(-1, 4)
        near = torch.zeros_like(x).scatter_reduce(0, index, x[edges[0]], how, include_self=False)
        return F.linear(near + x, self.weight)

    return run


def added_in_place(self: Any, x: Tensor, edges: Tensor) -> Tensor:
    index = edges[1][:, None].expand(-1, 4)
    found = torch.zeros_like(x).scatter_add_(0, index, x[edges[0]])
    found[edges[1, :3]] = x[edges[0, :3]] * 2
    return F.linear(found, self.weight)


def unpooled(self: Any, x: Tensor, edges: Tensor) -> Tensor:
    wide = torch.cat([x, x.flip(1)], 1)
    found, index = F.max_pool1d(wide[:, None], 2, return_indices=True)
    return F.linear(nn.MaxUnpool1d(2)(found, index)[:, 0, 2:6], self.weight)


def filtered(self: Any, x: Tensor, edges: Tensor) -> Tensor:
    found = torch.zeros(x.shape[0], 3, dtype=torch.complex128)
    found[:, :2] = torch.einsum("bi,io->bo", torch.fft.rfft(x), self.weight[:, :2] * (1 + 2j))
    return F.linear(torch.fft.irfft(found, n=4), self.weight)


@pytest.mark.parametrize(
    "function",
    [scattered("sum"), scattered("mean"), scattered("amax"), added_in_place, unpooled, filtered],
)
def test_where_a_model_is_piecewise_linear_it_is_gradient_times_input(function: Any) -> None:
    model = Function(function)
    x = torch.randn(4, 4, dtype=torch.float64)
    result = explained(model, x, EDGES, target=1)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf, EDGES)[:, 1].sum(), leaf)
    (found,) = result.relevance.values()  # edges have none
    torch.testing.assert_close(found, x * grad)


@pytest.mark.parametrize("factors", [(), (1.5, 1.5, 1.5)], ids=["sizes", "factors"])
@pytest.mark.parametrize("aligned", [True, False])
def test_interpolation_by_the_operators_themselves(aligned: bool, factors: Any) -> None:
    aten: Any = torch.ops.aten

    def resized(self: Any, x: Tensor) -> Tensor:
        line = aten.upsample_linear1d(x[:, None], [6], aligned, *factors[:1])
        box = x[:, None, None, None] * torch.ones(2, 2, 1, dtype=x.dtype)
        box = aten.upsample_trilinear3d(box, [3, 3, 6], aligned, *factors)
        return F.linear(line[:, 0, 1:5] + box[:, 0, 1, 2, :4], self.weight)

    model, x = Function(resized), torch.randn(3, 4, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    (found,) = explained(model, x, target=1).relevance.values()
    torch.testing.assert_close(found, x * grad)


def correlated(self: Any, x: Tensor, y: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x) * torch.fft.rfft(y).conj()
    return F.linear(torch.fft.irfft(spectrum, n=4), self.weight)


def test_two_signals_share_their_correlation() -> None:
    model = Function(correlated)
    given = [torch.randn(2, 4, dtype=torch.float64) for _ in range(2)]
    result = explained(model, *given, target=1)
    leaves = [t.clone().requires_grad_() for t in given]
    grads = torch.autograd.grad(model(*leaves)[:, 1].sum(), leaves)
    found = result.relevance.values()
    for relevance, value, grad in zip(found, given, grads, strict=True):
        torch.testing.assert_close(relevance, value * grad / 2)


def test_a_signal_with_itself_has_half_its_gradient() -> None:
    model = Function(lambda self, x: correlated(self, x, x))
    x = torch.randn(2, 4, dtype=torch.float64)
    (found,) = explained(model, x, target=1).relevance.values()
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(model(leaf)[:, 1].sum(), leaf)
    torch.testing.assert_close(found, x * grad / 2)


def test_what_is_no_homogeneous_function_of_frequencies_is_refused() -> None:
    model = Function(lambda self, x: F.linear((torch.fft.fft(x) + 1j).abs(), self.weight))
    with pytest.raises(graphopt.errors.UnsupportedError, match="homogeneous"):
        graphopt.explain(model, (torch.randn(2, 4, dtype=torch.float64),))


def distances(self: Any, x: Tensor) -> Tensor:
    return torch.cdist(x, self.weight)


def test_a_distance_is_the_share_of_what_is_far_apart() -> None:
    model = Function(distances)
    x = torch.randn(2, 4, dtype=torch.float64)
    result = explained(model, x, target=1)
    far = x - model.weight[1].detach()
    (found,) = result.relevance.values()
    torch.testing.assert_close(found, x * far / far.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.cosine_similarity(x[:, None], self.weight, dim=-1),
        lambda self, x: F.grid_sample(
            x[:, None, None] * torch.ones(4, 1, dtype=x.dtype),
            F.affine_grid(torch.stack([x[:, :3], x[:, 1:]], 1), [x.shape[0], 1, 2, 3]),
        ).flatten(1),
    ],
    ids=["cosine", "transformer"],
)
def test_nothing_is_lost(function: Any) -> None:
    explained(Function(function), torch.randn(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("mode", ["mean", "max"])
def test_tokens_of_a_bag(mode: str) -> None:
    bag, layer = nn.EmbeddingBag(9, 4, mode=mode).double(), nn.Linear(4, 2).double()
    ids = torch.stack([torch.randperm(9)[:5] for _ in range(3)])
    result = explained(nn.Sequential(bag, layer), ids, target=0)
    weight = layer.weight[0].detach()
    rows = bag.weight.detach()[ids]
    (found,) = result.relevance.values()
    if mode == "mean":
        want = rows @ weight / 5
    else:  # each component of the row that has the largest one
        want = (rows * (rows == rows.amax(1, keepdim=True)) * weight).sum(-1)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(result.ledger["inputs"], found.sum(1))


class Checked(nn.Module):
    """As in DETR: training checks values, which no graph can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if self.training and not torch.isfinite(x).all():
            x = x.clamp(-1, 1)
        return x


def test_eval_mode_is_enough() -> None:
    model = Checked()
    x = torch.randn(2, 4, dtype=torch.float64)
    result = explained(model, x, target=0)
    torch.testing.assert_close(result.relevance["x"], x * model.layer.weight[0].detach())
    assert model.training
    with pytest.raises(graphopt.errors.CaptureError):
        graphopt.capture(model, (x,))


def test_a_function_as_target_of_two_batches() -> None:
    """Scores of all pairs, of which those of matching ones are explained, as in CLIP."""
    model = Function(lambda self, x, y: x @ y.T)
    x, y = (torch.randn(n, 4, dtype=torch.float64) for n in (3, 2))
    result = explained(model, x, y, target=lambda scores: scores.diagonal())
    torch.testing.assert_close(result.ledger["output"].sum(), (x[:2] * y).sum())


class Transposed(nn.Module):
    """A batch norm over channels that come last: its kernel gives other strides than a fake one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x.transpose(1, 2)).transpose(1, 2)).mean(1)


def test_a_view_of_a_batch_norm_with_channels_last() -> None:
    explained(Transposed().double().eval(), torch.randn(2, 5, 4, dtype=torch.float64))


def test_a_class_of_what_many_rows_are_read_out_to() -> None:
    """The output has a row for a graph, not for each of its nodes."""

    class ReadOut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, bias=False)

        def forward(self, nodes: Tensor) -> Tensor:
            return self.layer(nodes).sum(0, keepdim=True)

    model, nodes = ReadOut(), torch.randn(5, 4)
    one: Any = graphopt.explain(model, (nodes,), target=2)
    want = nodes * model.layer.weight[2].detach()
    torch.testing.assert_close(one(nodes).relevance["nodes"], want)
    torch.testing.assert_close(one(nodes[:3]).relevance["nodes"], want[:3])
    both: Any = graphopt.explain(model, (nodes,), target=[[2], [0]])
    torch.testing.assert_close(both(nodes).relevance["nodes"][0], want)
    with pytest.raises(UsageError, match="5 targets for a batch of 1"):
        graphopt.explain(model, (nodes,), target=[0, 1, 2, 0, 1])(nodes)


class ChannelsLast(nn.Module):
    """Linear layers on channels between convolutions, as in ConvNeXt; gradients cross them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 2, 2), nn.Conv2d(4, 4, 2, 2)
        self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        self.scale = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(self.first(x).permute(0, 2, 3, 1)) * self.scale
        return self.second(self.norm(x).permute(0, 3, 1, 2)).mean((2, 3))


def test_a_view_of_what_a_convolution_hands_back() -> None:
    explained(ChannelsLast().double(), torch.randn(2, 3, 8, 8, dtype=torch.float64))
