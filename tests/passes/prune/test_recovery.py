"""Brief recovery: it trains what it says, and finds the head in the graph."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
import graphopt.training
from graphopt import errors
from graphopt.passes.prune import recover
from graphopt.passes.prune.recovery import trained_parameters


class Network(nn.Module):
    """Convolutions with norms and a bare scale, two linear layers, logits and features."""

    def __init__(self, *, both: bool = False) -> None:
        super().__init__()
        self.both = both
        self.conv = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.scale = nn.Parameter(torch.ones(16, 1, 1))
        self.hidden = nn.Linear(16, 64)
        self.out = nn.Linear(64, 2)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.norm(self.conv(x)) * self.scale).mean((2, 3))
        hidden = self.hidden(x)
        logits = self.out(F.relu(hidden))
        return (logits, hidden) if self.both else logits


def network(**options: bool) -> nn.Module:
    torch.manual_seed(0)
    return Network(**options)


def pairs() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    x = torch.randn(96, 1, 6, 6)
    y = (x[:, 0, 0, 0] > 0).long()
    return list(zip(x.split(32), y.split(32), strict=True))


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    named = dict(before.named_parameters())
    return {name for name, p in after.named_parameters() if not p.equal(named[name])}


@pytest.fixture(scope="module")
def before() -> nn.Module:
    return graphopt.optimize(network(), "flops=60%", (pairs()[0][0],))


VECTORS = {"norm.weight", "norm.bias", "scale", "hidden.bias", "out.bias"}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, VECTORS),  # the head holds more than a hundredth
        ({"head_limit": 0.2}, VECTORS | {"out.weight"}),
        ({"parameters": ["biases"]}, {"norm.bias", "hidden.bias", "out.bias"}),
        ({"parameters": ["norms"]}, {"norm.weight", "scale"}),
        ({"parameters": ["head"], "head_limit": 1.0}, {"out.weight"}),
    ],
)
def test_it_trains_what_it_says(
    before: nn.Module, options: dict[str, Any], expected: set[str]
) -> None:
    small = copy.deepcopy(before)
    report = recover(small, pairs(), loss=F.cross_entropy, **options)
    assert changed(before, small) == set(report.trained) == expected
    named = dict(small.named_parameters())
    assert report.trained_count == sum(named[name].numel() for name in expected)
    assert report.total_count == sum(p.numel() for p in named.values())


def test_an_inner_output_is_no_head() -> None:
    model = network(both=True)
    program = graphopt.capture(model, (pairs()[0][0],))
    assert trained_parameters(model, program, ["head"], 1.0) == ["out.weight"]


def test_a_transposed_bare_matrix_is_a_head() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.table = nn.Linear(4, 8), nn.Parameter(torch.randn(5, 8))

        def forward(self, x: Tensor) -> Tensor:
            return (self.first(x).relu() @ self.table.t()).log_softmax(-1)

    model = Bare()
    program = graphopt.capture(model, (torch.randn(2, 4),))
    assert trained_parameters(model, program, ["head"], 1.0) == ["table"]


def test_it_recovers_from_a_teacher_alone() -> None:
    model, data = network(), pairs()
    graphopt.training.train(model, data, loss=F.cross_entropy, epochs=15, lr=0.02)
    small = graphopt.optimize(model, "flops=40%", (data[0][0],), verify=False)
    report = recover(small, data, teacher=model, epochs=15, lr=0.02, validation=data)
    assert report.validation_losses[-1] < 0.8 * report.validation_losses[0]
    assert changed(network(), model)  # trained, above
    assert report.accuracy_after is not None


def test_adapters_change_their_matrices_by_a_matrix_of_their_rank() -> None:
    model, data = network(), pairs()
    before = copy.deepcopy(model)
    report = recover(model, data, loss=F.cross_entropy, adapter_rank=1, epochs=3, lr=0.02)
    assert {"conv.weight", "hidden.weight", "out.weight"} <= set(report.trained)
    named = dict(before.named_parameters())
    for name in ("conv.weight", "hidden.weight", "out.weight"):
        moved = (model.get_parameter(name) - named[name]).detach().flatten(1).double()
        first, second = torch.linalg.svdvals(moved)[:2]
        assert first > 1e-3
        assert second < 1e-4 * first
    assert list(model.state_dict()) == list(before.state_dict())
    assert report.losses[-1] < report.losses[0]


def test_statistics_are_those_of_the_data_at_the_end() -> None:
    model, data = network(), pairs()
    report = recover(model, data, loss=F.cross_entropy, recalibrated=True, validation=data)
    inner = [model.conv(x).detach() for x, _ in data]
    means = torch.stack([x.mean((0, 2, 3)) for x in inner]).mean(0)
    torch.testing.assert_close(model.norm.running_mean, means, atol=1e-5, rtol=1e-4)
    assert report.accuracy_after == graphopt.training.accuracy_of(model, data)


def test_bad_requests_are_refused() -> None:
    with pytest.raises(errors.UsageError, match="matrices"):
        recover(network(), pairs(), loss=F.cross_entropy, parameters=["matrices"])
    with pytest.raises(errors.UsageError, match="read"):
        recover(network(), iter(pairs()), loss=F.cross_entropy, recalibrated=True)
    with pytest.raises(errors.UsageError, match="no batch"):
        recover(network(), [], loss=F.cross_entropy)
