"""The pass `sparsify`: counts, patterns and thresholds straight from the weights that come back."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import errors


class Reader(nn.Module):
    """A convolution, norms, and two linear layers; a table that is only looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 8)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.hidden = nn.Linear(16, 32)
        self.last = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x).permute(0, 3, 1, 2)
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.last(torch.relu(self.hidden(x)))


class Tied(nn.Module):
    """The output layer is the table of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 12, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.mix(self.table(x))))


WEIGHTS = ("conv.weight", "hidden.weight", "last.weight")


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    example = torch.zeros(2, 5, 5, dtype=torch.int64)
    return graphopt.capture(Reader().eval(), (example,)).emit()  # traced once


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randint(0, 4, (3, 5, 5), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def data() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [
        (torch.randint(0, 4, (8, 5, 5), generator=generator),
         torch.randint(0, 5, (8,), generator=generator))
        for _ in range(2)
    ]  # fmt: skip


def sparsify(model: nn.Module, x: Tensor, text: str, **options: object) -> graphopt.OptimizedModule:
    passes = f"sparsify{{{text}}}"
    return graphopt.optimize(
        model,
        passes=passes,
        example_inputs=(x,),
        verify=False,
        **options,  # type: ignore[arg-type]
    )


def section(module: graphopt.OptimizedModule) -> dict[str, object]:
    return module.report.to_dict()["sparsify"]


def nonzero(module: nn.Module, names: tuple[str, ...] = WEIGHTS) -> int:
    return sum(int((module.get_parameter(name) != 0).sum()) for name in names)


@pytest.mark.parametrize("method", ["uniform", "global", "layerwise", "icbs"])
def test_as_many_weights_stay_as_are_asked_for(
    model: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]], method: str
) -> None:
    sparse = sparsify(
        model, x, f"weights=40%,method={method},rounds=1", data=data, loss=F.cross_entropy
    )
    whole = sum(model.get_parameter(name).numel() for name in WEIGHTS)
    found = section(sparse)
    assert found["weights_before"] == whole
    assert found["weights_after"] == nonzero(sparse)
    assert 0.98 * 0.4 * whole <= nonzero(sparse) <= 0.4 * whole
    masks = sparse.report.masks()
    for name, parameter in model.named_parameters():
        got = sparse.get_parameter(name).detach()
        assert got.shape == parameter.shape
        kept = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        assert torch.equal(got, parameter.detach() * kept)
    assert found["dense"] == [["table.weight", "no product reads it"]]
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, mask in masks.items():
            by_hand.get_parameter(name).mul_(mask)
    assert torch.equal(sparse(x), by_hand(x))


def test_a_budget_chooses_the_pass(model: nn.Module, x: Tensor) -> None:
    sparse = graphopt.optimize(model, "weights=300", (x,))
    assert nonzero(sparse) == 300
    with pytest.raises(errors.UnsupportedError, match="nothing was pruned"):
        sparse.report.masked_module()


def test_one_threshold(model: nn.Module, x: Tensor) -> None:
    """Nothing that goes is larger than anything that stays."""
    sparse = sparsify(model, x, "weights=40%,floor=0,method=global,criterion=magnitude")
    masks = sparse.report.masks()
    kept = torch.cat([model.get_parameter(n).detach().abs()[masks[n]] for n in WEIGHTS])
    gone = torch.cat([model.get_parameter(n).detach().abs()[~masks[n]] for n in WEIGHTS])
    assert float(gone.max()) <= float(kept.min())


def test_every_matrix_keeps_its_floor(model: nn.Module, x: Tensor) -> None:
    small = copy.deepcopy(model)
    with torch.no_grad():
        small.get_parameter("hidden.weight").mul_(1e-4)
    sparse = sparsify(small, x, "weights=40%,floor=0.5,method=global,criterion=magnitude")
    assert nonzero(sparse, ("hidden.weight",)) == int(0.5 * 0.4 * 16 * 32)
    sparse = sparsify(small, x, "weights=40%,floor=0,method=global,criterion=magnitude")
    assert nonzero(sparse, ("hidden.weight",)) == 0


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 8), (1, 2), (4, 4)])
def test_patterns_group_by_group(model: nn.Module, x: Tensor, n: int, m: int) -> None:
    """By loops over the weights: the n largest of each m inputs, and nothing else."""
    sparse = sparsify(model, x, f"pattern={n}:{m}")
    for name in WEIGHTS:
        dense = model.get_parameter(name).detach().flatten(2) if "conv" in name else None
        pairs = (
            [(model.get_parameter(name), sparse.get_parameter(name))]
            if dense is None
            else [
                (dense[:, :, i], sparse.get_parameter(name).flatten(2)[:, :, i])
                for i in range(dense.shape[2])
            ]
        )
        for before, after in pairs:
            for row, got in zip(before.tolist(), after.tolist(), strict=True):
                for start in range(0, len(row), m):
                    group, left = row[start : start + m], got[start : start + m]
                    want = sorted(group, key=abs, reverse=True)[:n]
                    assert left == [w if w in want else 0.0 for w in group]


def test_a_pattern_lies_along_what_is_summed_over() -> None:
    """A weight that stands on the right of a product has its inputs on axis 0."""

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 6))
            self.turned = nn.Parameter(torch.randn(4, 6))

        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight) @ self.turned.t().contiguous().relu().t().t()[:, :4] + 0

    class Left(Right):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ self.weight) @ self.turned.t()

    sparse = sparsify(Left(), torch.randn(2, 8), "pattern=1:4")
    weight = sparse.get_parameter("weight")
    assert ((weight.reshape(2, 4, 6) != 0).sum(1) == 1).all()
    assert section(sparse)["dense"] == [["turned", "its 6 inputs are no multiple of 4"]]
    sparse = sparsify(Right(), torch.randn(2, 8), "weights=50%")  # a relu in between: no factor
    assert section(sparse)["dense"] == [["turned", "no product reads it"]]


def test_a_pattern_on_as_many_matrices_as_a_budget_needs(
    model: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]]
) -> None:
    """Of all sets of matrices that keep the budget, the one that loses least of the criterion."""
    text = "weights=75%,pattern=2:4,method=global,criterion=magnitude"
    sparse = sparsify(model, x, text)
    every = sparsify(model, x, "pattern=2:4,criterion=magnitude")
    sizes = {n: model.get_parameter(n).numel() for n in WEIGHTS}
    lost = {
        n: float((model.get_parameter(n) - every.get_parameter(n)).detach().abs().sum())
        for n in WEIGHTS
    }
    sets = [s for r in range(4) for s in itertools.combinations(WEIGHTS, r)]
    fits = [s for s in sets if sum(sizes[n] for n in s) / 2 >= sum(sizes.values()) / 4]
    best = min(fits, key=lambda s: sum(lost[n] for n in s))
    assert set(sparse.report.masks()) == set(best)
    assert section(sparse)["objective"] == pytest.approx(sum(lost[n] for n in best), rel=1e-4)
    measured = sparsify(model, x, "weights=75%,pattern=2:4", data=data, loss=F.cross_entropy)
    assert 0.5 <= nonzero(measured) / sum(sizes.values()) <= 0.75


def test_tied_weights_are_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Tied(), torch.randint(0, 12, (2, 3))
    sparse = sparsify(model, x, "weights=50%,method=uniform")
    assert section(sparse)["weights_before"] == 12 * 8 + 8 * 8
    assert sparse.get_parameter("head.weight") is sparse.get_parameter("table.weight")
    assert int((sparse.get_parameter("table.weight") != 0).sum()) == 48
    assert set(sparse.report.masks()) == {"table.weight", "mix.weight"}
    sparse.load_state_dict(model.state_dict())  # the second name doesn't bring masked weights back
    assert int((sparse.get_parameter("table.weight") != 0).sum()) == 48


def test_what_is_frozen_stays(model: nn.Module, x: Tensor) -> None:
    sparse = sparsify(model, x, 'weights=80%,freeze="conv.* norm.*"')
    assert torch.equal(sparse.get_parameter("conv.weight"), model.get_parameter("conv.weight"))
    assert ["conv.weight", "freeze=conv.*"] in section(sparse)["dense"]  # type: ignore[operator]
    whole = sum(model.get_parameter(name).numel() for name in WEIGHTS)
    assert nonzero(sparse) == int(0.8 * whole)


def test_too_small_a_budget_says_the_smallest(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(errors.BudgetInfeasible) as caught:
        sparsify(model, x, "weights=100,freeze=conv.*")
    smallest = caught.value.smallest
    assert smallest == 16 * 8 * 9 + 1
    assert nonzero(sparsify(model, x, f"weights={smallest},freeze=conv.*")) == smallest
    with pytest.raises(errors.BudgetInfeasible) as caught:
        sparsify(model, x, "weights=20%,pattern=2:4")
    smallest = caught.value.smallest
    assert nonzero(sparsify(model, x, f"weights={smallest},pattern=2:4")) == smallest


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("weights=0", errors.BudgetError),
        ("weights=0.5", errors.BudgetError),
        ("weights=120%", errors.BudgetError),
        ("method=global", errors.BudgetError),
        ("pattern=4:2", errors.PipelineError),
        ("pattern=2of4", errors.PipelineError),
        ("pattern=0:4", errors.PipelineError),
        ("weights=50%,floor=2", errors.PipelineError),
        ("weights=50%,rounds=0", errors.PipelineError),
        ("weights=50%,freeze=nothing", errors.PipelineError),
        ("weights=50%,method=best", errors.PipelineError),
        ("pattern=1:7", errors.UnsupportedError),
        ('weights=50%,freeze="*"', errors.UnsupportedError),
    ],
)
def test_bad_input(model: nn.Module, x: Tensor, text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        sparsify(model, x, text)


def test_bad_data(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(errors.InputMismatch):
        sparsify(model, x, "weights=50%", data=[torch.zeros(2, 5, 5)])
    with pytest.raises(errors.UsageError, match="no batches"):
        sparsify(model, x, "weights=50%", data=[])
    with pytest.raises(errors.NonFiniteError):
        sparsify(model, x, "weights=50%", data=[x], loss=lambda y: y.sum() * float("nan"))


def test_the_source_is_left_as_it_is(
    model: nn.Module, x: Tensor, data: list[tuple[Tensor, Tensor]]
) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    for method in ("layerwise", "icbs"):
        sparsify(model, x, f"weights=50%,method={method},rounds=1", data=data, loss=F.cross_entropy)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.training
