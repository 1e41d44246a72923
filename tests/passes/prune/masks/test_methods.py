"""Methods against each other and against closed forms, on a network that has learnt something."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.passes.prune.masks.criteria import score
from graphopt.passes.prune.masks.matrices import matrices
from graphopt.passes.prune.masks.patterns import above_threshold, best, uniform
from graphopt.passes.prune.masks.surgeon import operate
from graphopt.passes.prune.masks.trial import Trial
from graphopt.pipeline import PassContext, silent

Data = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def data() -> Data:
    """Classes of points by the sign of products: nothing linear."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(4, 64, 6, generator=generator)
    return [(p, (p[:, 0] * p[:, 1] > 0).long() * 2 + (p[:, 2] > 0).long()) for p in points]


@pytest.fixture(scope="module")
def model(data: Data) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(),
        nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4),
    )  # fmt: skip
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _, (points, classes) in itertools.product(range(60), data):
        optimizer.zero_grad()
        F.cross_entropy(net(points), classes).backward()
        optimizer.step()
    return graphopt.capture(net.eval(), (data[0][0][:2],)).emit()  # traced once


def sparsify(model: nn.Module, data: Data, text: str) -> graphopt.OptimizedModule:
    return graphopt.optimize(
        model,
        passes=f"sparsify{{{text}}}",
        example_inputs=(data[0][0][:2],),
        data=data,
        loss=F.cross_entropy,
        verify=False,
    )


def moved(model: nn.Module, other: nn.Module, data: Data) -> float:
    """The mean squared distance of outputs, relative to their spread."""
    total = 0.0
    with torch.no_grad():
        for points, _ in data:
            exact, got = model(points).double(), other(points).double()
            spread = (exact - exact.mean()).square().sum()
            total += float((exact - got).square().sum() / spread)
    return total / len(data)


def loss(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return sum(float(F.cross_entropy(model(p), c)) for p, c in data) / len(data)


@pytest.mark.parametrize("share", [30, 50, 60])
def test_curves_are_no_worse_than_a_threshold(model: nn.Module, data: Data, share: int) -> None:
    found = {
        method: sparsify(model, data, f"weights={share}%,criterion=magnitude,method={method}")
        for method in ("uniform", "global", "layerwise")
    }
    distortion = {name: moved(model, module, data) for name, module in found.items()}
    for name, module in found.items():
        assert module.report["sparsify"]["distortion"] == pytest.approx(distortion[name], rel=1e-4)
    plain = min(distortion["uniform"], distortion["global"])
    assert distortion["layerwise"] <= plain * (1 + 1e-6)
    section = found["layerwise"].report["sparsify"]
    if share == 50:  # at the others single distortions don't add up well enough to win
        assert distortion["layerwise"] < plain
        assert 0 <= section["gap"] <= 1e-6
        assert section["bound"] == pytest.approx(section["objective"])


@pytest.mark.slow
def test_exchanges_lower_the_loss(model: nn.Module, data: Data) -> None:
    start = sparsify(model, data, "weights=25%,method=global")
    exchanged = sparsify(model, data, "weights=25%,method=icbs,rounds=1")
    section = exchanged.report["sparsify"]
    assert section["bound"] <= section["objective"] <= 0
    assert section["matrices"] == start.report["sparsify"]["matrices"]
    assert loss(exchanged, data) < loss(start, data)
    pattern = sparsify(model, data, "pattern=1:2,criterion=magnitude")
    exchanged = sparsify(model, data, "pattern=1:2,criterion=magnitude,method=icbs,rounds=1")
    assert loss(exchanged, data) < loss(pattern, data)
    for name, mask in exchanged.report.masks().items():
        assert (mask.reshape(*mask.shape[:-1], -1, 2).sum(-1) == 1).all(), name


def test_a_quadratic_loss_is_solved(data: Data) -> None:
    """With one example and a linear model the squared gradient is the whole of the curvature.

    By hand: of all masks of four weights of eight the one of the least
    ``g.d + (g.d)^2 / 2 + ridge |d|^2 / 2``, from the dense weights.
    """
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(8, 1, bias=False)).double()
    x = torch.randn(1, 8, dtype=torch.float64)
    program = capture(net, (torch.randn(2, 8, dtype=torch.float64),), {})
    context = PassContext(args=(x,), data=[x], data_loss=lambda y: y.sum())
    found = matrices(program)
    trial = Trial(program, found, context)
    w, g = net[0].weight.detach()[0], x[0]
    ridge = float(g.square().mean())
    first = torch.tensor([[True] * 4 + [False] * 4])
    groups = {"0.weight": torch.zeros(1, 8, dtype=torch.int64)}
    done = operate(found, {"0.weight": first}, groups, {}, trial, 1, 10.0, silent)

    def cost(kept: Tensor) -> float:
        d = w * (kept.double() - first[0].double())
        return float(g @ d + (g @ d) ** 2 / 2 + ridge * (d @ d) / 2)

    masks = [
        torch.tensor([i in chosen for i in range(8)])
        for chosen in itertools.combinations(range(8), 4)
    ]
    least = min(map(cost, masks))
    (selection,) = done.selections
    assert selection.cost - selection.start == pytest.approx(least, rel=1e-5)
    assert selection.status == "optimal"


def test_scores_by_hand(model: nn.Module, data: Data) -> None:
    """Gradients of single examples, taken one after the other by autograd on the model itself."""
    few = [(data[0][0][:5], data[0][1][:5])]
    program = graphopt.capture(copy.deepcopy(model))
    context = PassContext(args=(few[0][0],), data=few, data_loss=F.cross_entropy)
    found = matrices(program)
    scores = score("taylor2", found, Trial(program, found, context), {}, 0)
    want = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.dim() > 1}
    for point, label in zip(few[0][0], few[0][1], strict=True):
        value = F.cross_entropy(model(point[None]), label[None])
        for (name, total), g in zip(
            want.items(),
            torch.autograd.grad(value, [model.get_parameter(n) for n in want]),
            strict=True,
        ):
            total += (model.get_parameter(name).detach() * g).square() / 5
    assert set(scores) == set(want)
    for name, values in want.items():
        torch.testing.assert_close(scores[name], values)


def test_a_threshold_counts_floors_and_ties() -> None:
    scores = {"a": torch.tensor([[5.0, 4.0], [3.0, 3.0]]), "b": torch.tensor([[3.0, 0.1, 0.2]])}
    assert above_threshold(scores, 3, {"a": 0, "b": 0}) == {"a": 3, "b": 0}
    assert above_threshold(scores, 3, {"a": 0, "b": 2}) == {"a": 1, "b": 2}
    assert above_threshold(scores, 7, {"a": 0, "b": 0}) == {"a": 4, "b": 3}
    assert best(scores["a"], 3).tolist() == [[True, True], [True, False]]
    assert uniform([10, 20, 31], 30) == [5, 10, 15]
    assert sum(uniform([7, 7, 7], 10)) == 10
