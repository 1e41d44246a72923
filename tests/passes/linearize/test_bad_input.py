"""What `linearize` refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.errors import (
    BudgetError,
    BudgetInfeasible,
    GraphoptError,
    InputMismatch,
    NonFiniteError,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from graphopt.passes.linearize import sweep
from graphopt.private import comparisons
from tests.passes.linearize.nets import Net, cnn, drawn, linearized, mlp, section

images, vectors = drawn(12, 3, 8, 8), drawn(20, 6)


def refusal(kind: type[GraphoptError], model: nn.Module, *args: Any, **options: Any) -> Any:
    with pytest.raises(kind) as caught:
        linearized(model, *args, **options)
    return caught.value


def test_neither_data_nor_norms() -> None:
    error = refusal(UnsupportedError, mlp(), vectors, data=None)
    assert "data=" in str(error)


def test_norms_stand_in_for_data() -> None:
    """Noise in place of data: nearer to the source than the identity is."""
    model = cnn()
    module = linearized(model, images, data=None, spec="relus=25%,rounds=2")
    naive = linearized(model, images, data=None, spec="relus=25%,rounds=1,replacement=identity")
    assert sum(comparisons(module, images).values()) == section(module)["relus_before"] // 4
    with torch.no_grad():
        want = model(images)
        error, worst = (float((m(images) - want).norm() / want.norm()) for m in (module, naive))
    assert error < worst


@pytest.mark.parametrize(
    "data", [[drawn(12, 4, 8, 8)], [drawn(12, 3, 9, 9)], [drawn(3, 8, 8)], [drawn(4, 5)]]
)
def test_data_of_another_shape(data: list[Tensor]) -> None:
    assert "input" in str(refusal(InputMismatch, cnn(), images, data=data))


@pytest.mark.parametrize("data", [[], iter(()), [vectors[:0]]])
def test_no_batch(data: Any) -> None:
    refusal(InputMismatch, mlp(), vectors, data=data)


def test_a_batch_without_samples_counts_for_nothing() -> None:
    model = mlp()
    module, twin = (linearized(model, vectors, data=d) for d in ([vectors[:0], vectors], [vectors]))
    assert torch.equal(module(vectors), twin(vectors))


def test_a_shuffling_loader_leaves_the_generator_alone() -> None:
    loader = DataLoader(TensorDataset(vectors, torch.zeros(20)), batch_size=5, shuffle=True)
    model = mlp()
    before = torch.get_rng_state()
    linearized(model, vectors, data=loader)
    sweep(model, (vectors,), data=loader, budgets=("50%",), options=("replacement=affine",))
    assert torch.equal(torch.get_rng_state(), before)


def test_data_that_is_none() -> None:
    data: Any = 5
    assert "int" in str(refusal(UsageError, mlp(), vectors, data=data))
    with pytest.raises(UsageError, match="int"):
        sweep(mlp(), (vectors,), data=data)


def test_data_of_another_type() -> None:
    error = refusal(InputMismatch, mlp(), vectors, data=[vectors.double()])
    assert "float64" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_data_that_is_not_finite(value: float) -> None:
    spoiled = vectors.clone()
    spoiled[3, 2] = value
    error = refusal(NonFiniteError, mlp(), vectors, data=[vectors, spoiled])
    assert "calibration data" in str(error)


def test_batches_of_other_sizes_and_with_targets() -> None:
    data = [(vectors[:7], torch.zeros(7)), (vectors, torch.zeros(20))]
    module = linearized(
        mlp(), vectors, spec="relus=50%,rounds=1", data=data,
        loss=lambda y, t: (y.sum(1) - t).square().mean(),
    )  # fmt: skip
    assert section(module)["relus_after"] == 8


def test_what_must_stay_is_over_the_budget() -> None:
    """A selection of two values can't be replaced: 8 of 16 elements."""
    model = Net(
        lambda s, x: s.b(torch.maximum(torch.relu(s.a(x)), s.c(x))),
        a=nn.Linear(6, 8), b=nn.Linear(8, 3), c=nn.Linear(6, 8),
    ).eval()  # fmt: skip
    error = refusal(BudgetInfeasible, model, vectors, spec="relus=7")
    assert (error.field, error.requested, error.smallest) == ("relus", 7, 8)
    assert "maximum" in str(error)
    module = linearized(model, vectors, spec=f"relus={error.smallest},rounds=1")
    assert section(module)["relus_after"] == 8
    assert sum(comparisons(module, vectors).values()) == 8
    error = refusal(BudgetInfeasible, model, vectors, spec="relu_sites=0")
    assert (error.field, error.smallest) == ("relu_sites", 1)


def test_nothing_left_to_replace() -> None:
    model = Net(lambda s, x: torch.maximum(s.a(x), s.b(x)), a=nn.Linear(6, 3), b=nn.Linear(6, 3))
    refusal(BudgetInfeasible, model.eval(), vectors, spec="relus=0")
    module = linearized(model.eval(), vectors, spec="relus=3")
    assert torch.equal(module(vectors), model(vectors))


def test_no_budget() -> None:
    with pytest.raises(BudgetError, match="budget"):
        graphopt.optimize(mlp(), None, (vectors,), passes="canonicalize,linearize", data=[vectors])


def test_after_a_plan() -> None:
    model, x = mlp(*[nn.Tanh()] * 6).train(), drawn(64, 6)
    with pytest.raises(UnsupportedError, match="plan"):
        graphopt.optimize(
            model, "memory=80%", (x,), data=[x], time_limit=5.0,
            passes="canonicalize,rematerialize,linearize{relus=25%}",
        )  # fmt: skip


@pytest.mark.parametrize(
    "spec",
    ["relus=25%,replacement=poly9", "relus=25%,select=best", "relus=-1", "relus=25%,rounds=x"],
)
def test_options_that_do_not_exist(spec: str) -> None:
    with pytest.raises(GraphoptError):
        linearized(mlp(), vectors, spec=spec)


def test_ids_as_inputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(11, 6), nn.Linear(6, 8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    ).eval()
    ids = torch.randint(11, (9, 4), generator=torch.Generator().manual_seed(1))
    module = linearized(model, ids, spec="relus=25%,rounds=2")
    assert sum(comparisons(module, ids).values()) == 8
    assert bool(module(ids[:2]).isfinite().all())


def test_a_model_without_non_linearities() -> None:
    model = nn.Linear(6, 3).eval()
    module = linearized(model, vectors)
    assert torch.equal(module(vectors), model(vectors))


def loud(depth: int) -> nn.Module:
    """Large weights, and bounds behind each layer."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Hardtanh())]
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(60.0)
    return model


IDENTITY = "relus=0,rounds=1,replacement=identity"


def test_activations_that_escape() -> None:
    """Without its bounds each layer multiplies what the one before it gives."""
    error = refusal(VerificationError, loud(8), vectors, spec=IDENTITY)
    assert "escape" in str(error)


def test_activations_that_grow() -> None:
    with pytest.warns(UserWarning, match="grew to"):
        module = linearized(loud(2), vectors, spec=IDENTITY)
    growth = [s["range_growth"] for s in section(module)["sites"]]
    assert growth[0] == 1.0
    assert 10 < growth[1] < 1e4
    assert len(section(module)["warnings"]) == 1


def test_fits_hold_the_range() -> None:
    module = linearized(loud(8), vectors, spec="relus=0,rounds=1,replacement=poly3")
    assert all(s["range_growth"] < 10 for s in section(module)["sites"])
