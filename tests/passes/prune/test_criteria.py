"""Criteria against closed forms, gates of the model's own code, and formulas by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt import errors
from graphopt.batches import Batch
from graphopt.passes.prune import Prune
from graphopt.passes.prune.analysis import analyse
from graphopt.passes.prune.criteria import CRITERIA, Calibration, DimensionView, score
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.sparsity import pq_index, retained
from graphopt.pipeline import Pipeline
from graphopt.registry import get

Loss = Callable[[Tensor], Tensor]


def scores_of(name: str, model: nn.Module, x: Tensor, loss: Loss) -> dict[str, np.ndarray]:
    """The scores of each dimension, by its name."""
    program = graphopt.capture(model.eval(), (x,))
    dimensions = Dimensions(analyse(program))
    batches = [Batch((x,), {}, loss)]
    found = score(CRITERIA[name], dimensions, Calibration(program, program, batches, 0))
    return {d.name.split(":")[0]: np.array([found[u] for u in d.units]) for d in dimensions.all}


def double(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


class Hidden(nn.Module):
    """One hidden layer, with a gate on it."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=bias), nn.Linear(6, 2, bias=bias)

    def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * gate)


class TwoReaders(nn.Module):
    """Units that two layers read, one of them after a function."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(6, 2)

    def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        h = self.up(x) * gate
        return self.one(h) + self.other(torch.relu(h)).sin()


class Gated(nn.Module):
    """A gated hidden layer, as in an expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = (
            nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False),
        )  # fmt: skip

    def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x) * gate)


class Products(nn.Module):
    """Units that end in a product of two values, both of which come from data."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key = nn.Linear(4, 6), nn.Linear(4, 6)

    def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        return (self.query(x) * gate @ self.key(x).transpose(1, 2)).tanh()


class Channels(nn.Module):
    """Two convolutions; a gate on the channels between them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(4, 6, 3, padding=1), nn.Conv1d(6, 2, 1)

    def forward(self, x: Tensor, gate: Tensor | float = 1.0) -> Tensor:
        return self.down(
            torch.tanh(self.up(x.transpose(1, 2)).transpose(1, 2) * gate).transpose(1, 2)
        )


def squared(y: Tensor) -> Tensor:
    return (y - 0.3).square().flatten(1).sum(1).mean()


@pytest.mark.parametrize("name", ["fisher", "heapr"])
def test_the_second_order_score_is_exact_for_least_squares(name: str) -> None:
    """Residuals whose covariance is the unit matrix, the Hessian of the squared error."""
    model = double(Hidden(bias=False))
    few = torch.randn(5, 4, dtype=torch.float64)
    x = few.repeat_interleave(4, 0)
    residuals = math.sqrt(2) * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]]).double()
    with torch.no_grad():
        targets = model(x) - residuals.repeat(5, 1)

    def loss(y: Tensor) -> Tensor:
        return 0.5 * (y - targets).square().sum(1).mean()

    got = scores_of(name, model, x, loss)["up.weight"]
    with torch.no_grad():
        gates = 1 - torch.eye(6, dtype=torch.float64)
        risen = [float(loss(model(x, gate)) - loss(model(x))) for gate in gates]
    assert got == pytest.approx(np.array(risen), rel=1e-10)


@pytest.mark.parametrize("make", [Hidden, TwoReaders, Gated, Products])
def test_fisher_is_the_square_of_a_gates_gradient_in_each_row(make: type[nn.Module]) -> None:
    model, x = double(make()), torch.randn(5, 3, 4, dtype=torch.float64)
    gate = torch.ones(5, 1, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(squared(model(x, gate)), gate)
    by_hand = 0.5 * (5 * gradient[:, 0]).square().mean(0)
    (got,) = scores_of("fisher", model, x, squared).values()
    assert got == pytest.approx(by_hand.numpy(), rel=1e-10)


def test_fisher_of_channels() -> None:
    model, x = double(Channels()), torch.randn(5, 7, 4, dtype=torch.float64)
    gate = torch.ones(5, 1, 6, dtype=torch.float64, requires_grad=True)
    pre = model.up(x.transpose(1, 2)).tanh() * gate.transpose(1, 2)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad(squared(model.down(pre)), gate)  # type: ignore[operator]
    got = scores_of("fisher", model, x, squared)["up.weight"]
    assert got == pytest.approx((0.5 * (5 * gradient[:, 0]).square().mean(0)).numpy(), rel=1e-10)


@pytest.mark.parametrize("make", [Hidden, Gated])
def test_heapr_is_the_square_of_a_gates_gradient_at_each_position(make: type[nn.Module]) -> None:
    model, x = double(make()), torch.randn(5, 3, 4, dtype=torch.float64)
    gate = torch.ones(5, 3, 6, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(squared(model(x, gate)), gate)
    by_hand = 0.5 * (5 * gradient).square().sum(1).mean(0)
    (got,) = scores_of("heapr", model, x, squared).values()
    assert got == pytest.approx(by_hand.numpy(), rel=1e-10)


def test_fisher_of_a_batch_of_one_is_half_of_taylor2() -> None:
    model, x = double(TwoReaders()), torch.randn(1, 3, 4, dtype=torch.float64)
    (fisher,) = scores_of("fisher", model, x, squared).values()
    (taylor2,) = scores_of("taylor2", model, x, squared).values()
    assert fisher == pytest.approx(0.5 * taylor2, rel=1e-10)


def test_hesso_by_hand() -> None:
    model, x = double(Hidden()), torch.randn(5, 4, dtype=torch.float64)
    squared(model(x)).backward()
    rows = []
    for unit in range(6):
        parts = [(p, p.grad) for p in model.parameters()]
        (up_w, up_g), (bias_w, bias_g), (down_w, down_g), _ = parts
        weights = torch.cat([up_w[unit], bias_w[unit : unit + 1], down_w[:, unit]])
        slopes = torch.cat([up_g[unit], bias_g[unit : unit + 1], down_g[:, unit]])  # type: ignore[index]
        product = float((weights @ slopes).detach())
        rows.append(
            [
                float(weights.norm()),
                float(weights.norm()) / 7,
                1 + product / float(weights.norm() * slopes.norm()),
                abs(product),
                product**2 / 2,
            ]
        )
    columns = np.array(rows)
    by_hand = (0.2 * columns / np.linalg.norm(columns, axis=0)).sum(1)
    (got,) = scores_of("hesso", model, x, squared).values()
    assert got == pytest.approx(by_hand, rel=1e-10)


def test_the_pq_index_by_hand() -> None:
    assert pq_index([1, 1, 1, 1]) == 0
    assert pq_index([3, 0, 0, 0]) == pytest.approx(1 - 4 ** (1 - 2))
    assert pq_index([4, 1], p=1, q=2) == pytest.approx(1 - 5 / math.sqrt(17) / math.sqrt(2))
    assert retained([3, 0, 0, 0]) == pytest.approx(1)
    assert retained([1, 1, 1, 1], eta=1) == pytest.approx(4 / 2**2)
    assert pq_index([0, 0]) == 0


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=30), st.integers(0, 29))
def test_no_choice_of_units_falls_below_what_the_pq_index_says(
    values: list[float], count: int
) -> None:
    ordered = sorted(values, reverse=True)
    stay = min(count + 1, len(values))
    kept = sum(math.sqrt(v) for v in ordered[:stay])
    lost = sum(math.sqrt(v) for v in ordered[stay:])
    assert stay >= retained(values, eta=lost / kept) * (1 - 1e-9)


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture
def chain() -> nn.Module:
    return double(Chain()).float()


def run(model: nn.Module, options: str | Prune, **more: Any) -> graphopt.OptimizedModule:
    passes = [options] if isinstance(options, Prune) else f"prune{{{options}}}"
    return graphopt.optimize(model, passes=passes, example_inputs=(torch.randn(6, 8),), **more)


def widths(module: graphopt.OptimizedModule) -> dict[str, int]:
    found: Sequence[Any] = module.report.to_dict()["prune"]["dimensions"]
    return {name.split(".")[0]: kept for name, _, kept in found}


def test_the_pq_index_takes_more_where_few_units_hold_everything(chain: nn.Module) -> None:
    with torch.no_grad():
        chain.a.weight[3:] *= 1e-3  # type: ignore[index,operator]
        chain.a.bias[3:] = 0  # type: ignore[index,operator]
        chain.b.weight[:, 3:] *= 1e-3  # type: ignore[index,operator]
    small = run(chain, "params=50%,criterion=l2,allocation=pq")
    found = widths(small)
    assert 2 * found["a"] < found["b"]


def keeps_the_last(view: DimensionView) -> list[float]:
    assert all(part.of(0).shape[part.axis] == len(part.places[0]) for part in view.parts)
    return [float(unit) for unit in range(view.width)]


def test_a_function_ranks_units(chain: nn.Module) -> None:
    chosen = Prune(params="50%", criterion=keeps_the_last)  # type: ignore[arg-type]
    assert str(chosen) == f"prune{{params=50%,criterion={__name__}:keeps_the_last}}"
    report = run(chain, chosen).report.to_dict()["prune"]
    assert report["criterion"] == "keeps_the_last"
    for name in ("a", "b"):
        kept = report["kept"][f"{name}.weight"]["0"]
        assert list(kept) == list(range(16 - len(kept), 16))


def test_a_function_sees_the_weights_of_its_units(chain: nn.Module) -> None:
    def largest(view: DimensionView) -> Tensor:
        parts = [p for p in view.parts if p.parameter.endswith("weight")]
        return torch.stack([
            sum((p.of(u).square().sum() for p in parts), torch.zeros(())) for u in range(view.width)
        ])  # fmt: skip

    kept = run(chain, Prune(params="50%", criterion=largest)).report.to_dict()["prune"]["kept"]  # type: ignore[arg-type]
    both = chain.a.weight.square().sum(1) + chain.b.weight.square().sum(0)  # type: ignore[operator,union-attr]
    count = len(kept["a.weight"]["0"])
    assert set(kept["a.weight"]["0"]) == set(both.topk(count).indices.tolist())


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda view: [math.nan] * view.width, errors.NonFiniteError),
        (lambda view: [1.0], errors.UnsupportedError),
        (lambda view: [-1.0] * view.width, errors.UnsupportedError),
        (lambda view: None, errors.UnsupportedError),
    ],
)
def test_scores_that_make_no_sense_are_refused(
    chain: nn.Module, function: Any, error: type[Exception]
) -> None:
    with pytest.raises(error, match="criterion"):
        run(chain, Prune(params="50%", criterion=function))  # type: ignore[arg-type]


def test_weights_that_are_not_numbers_are_refused(chain: nn.Module) -> None:
    with torch.no_grad():
        chain.a.weight[2, 3] = math.nan  # type: ignore[index,operator]
    with pytest.raises(errors.GraphoptError, match=r"nan|NaN|finite"):
        run(chain, "params=50%,criterion=l2")


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_keeps_the_budget(chain: nn.Module, name: str) -> None:
    data = [torch.randn(6, 8) for _ in range(3)]
    small = run(chain, f"params=60%,criterion={name},rounds=2", data=data)
    report = small.report.to_dict()["prune"]
    assert 0.9 * 0.6 < report["params_after"] / report["params_before"] <= 0.6


@pytest.mark.parametrize(
    ("caps", "low", "high"),
    [
        ("b.bias:75%..", {"b": 12}, {}),
        ("a.weight:0:..25%", {}, {"a": 4}),
        ("a.bias:50% c.bias:100%", {"a": 8}, {"a": 8}),
        ("c.weight:1:60%..90% b.bias:..80%", {"b": 10}, {"b": 12}),
    ],
)
def test_caps_hold(chain: nn.Module, caps: str, low: dict[str, int], high: dict[str, int]) -> None:
    data = [torch.ones(6, 8)] if high else None
    refine = 8 if data else 0
    found = widths(run(chain, f"params=55%,caps={caps},rounds=2,refine={refine}", data=data))
    assert all(found[name] >= least for name, least in low.items())
    assert all(found[name] <= most for name, most in high.items())


def test_caps_read_back_from_text() -> None:
    chosen = Prune(params="50%", caps="a.*:25%..75% c.*:100%")  # type: ignore[arg-type]
    assert Pipeline.parse(str(chosen), get).passes == (chosen,)


@pytest.mark.parametrize(
    ("caps", "said"),
    [
        ("d.*:50%", "no parameter matches"),
        ("a.*", "malformed"),
        ("a.*:80%..20%", "rise"),
        ("a.*:..20% a.bias:80%..", "no width"),
        ("c.bias:..50%", "can be pruned"),
    ],
)
def test_caps_that_make_no_sense_are_refused(chain: nn.Module, caps: str, said: str) -> None:
    with pytest.raises(errors.PipelineError, match=said):
        run(chain, f"params=50%,caps={caps}")


def test_refinement_is_never_worse_never_over_and_repeats_itself(chain: nn.Module) -> None:
    torch.manual_seed(3)
    inputs = [torch.randn(6, 8) for _ in range(4)]
    with torch.no_grad():
        data = [(x, chain(x).argmax(1)) for x in inputs]
    loss = nn.functional.cross_entropy
    start = run(chain, "flops=50%,criterion=random,allocation=uniform", data=data, loss=loss)
    options = "flops=50%,criterion=random,allocation=uniform,refine=10"
    small = run(chain, options, data=data, loss=loss)
    report = small.report.to_dict()["prune"]
    assert report["flops_after"] <= 0.5 * report["flops_before"]

    @torch.no_grad()
    def measured(module: nn.Module) -> float:
        return sum(float(loss(module(x), t)) for x, t in data) / len(data)

    gained = report["refinement"]
    assert gained["measure"] == "loss"
    assert gained["evaluations"] <= 10
    assert gained["before"] == pytest.approx(measured(start), rel=1e-4)
    assert gained["after"] == pytest.approx(measured(small), rel=1e-4)
    assert gained["after"] < gained["before"]
    again = run(chain, options, data=data, loss=loss).report.to_dict()["prune"]
    assert again["kept"] == report["kept"]


def test_refinement_without_data_is_refused(chain: nn.Module) -> None:
    with pytest.raises(errors.UsageError, match="data"):
        run(chain, "flops=50%,refine=5")


def test_rounds_between_do_not_round(chain: nn.Module) -> None:
    data = [torch.randn(6, 8) for _ in range(3)]
    found = widths(run(chain, "params=52%,round_to=5,rounds=3", data=data))
    assert all(kept % 5 == 0 or kept == 16 for kept in found.values())


def test_example_inputs_may_have_more_rows_than_the_first_targets(chain: nn.Module) -> None:
    data = [(torch.randn(4, 8), torch.zeros(4, dtype=torch.int64)) for _ in range(2)]
    small = run(chain, "params=50%", data=data, loss=nn.functional.cross_entropy)
    assert small(torch.randn(6, 8)).shape == (6, 4)
