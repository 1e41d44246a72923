"""The criterion `relevance` of pruning: closed forms, labels, and digits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import errors, registry
from graphopt.batches import Batch
from graphopt.passes.prune.analysis import analyse
from graphopt.passes.prune.criteria import CRITERIA, Calibration, score
from graphopt.passes.prune.dimensions import Dimensions
from tests.benchmarks.digits import Data, accuracy, digits, epoch, trained


def scores_of(model: nn.Module, batches: list[Batch]) -> dict[str, np.ndarray]:
    """The scores of each dimension, by its name."""
    program = graphopt.capture(model.eval(), batches[0].args)
    dimensions = Dimensions(analyse(program))
    found = score(CRITERIA["relevance"], dimensions, Calibration(program, program, batches, 0))
    return {d.name.split(":")[0]: np.array([found[u] for u in d.units]) for d in dimensions.all}


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Convolutional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 5, 3, bias=False), nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


@pytest.fixture
def hidden() -> tuple[Hidden, Tensor]:
    torch.manual_seed(0)
    return Hidden().double(), torch.randn(7, 4, dtype=torch.float64)


def test_a_unit_has_what_it_contributes_to_the_score(hidden: tuple[Hidden, Tensor]) -> None:
    model, x = hidden
    values = torch.relu(model.up(x))
    largest = model.down.weight[model(x).argmax(1)]  # (rows, units)
    expected = (values * largest).abs().sum(0)
    (found,) = scores_of(model, [Batch((x,), {})]).values()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-9)


def test_with_labels_their_scores_are_explained(hidden: tuple[Hidden, Tensor]) -> None:
    model, x = hidden
    labels = torch.arange(7) % 3
    expected = (torch.relu(model.up(x)) * model.down.weight[labels]).abs().sum(0)
    batches = [
        Batch((x[:4],), {}, nn.functional.cross_entropy, labels[:4]),
        Batch((x[4:],), {}, nn.functional.cross_entropy, labels[4:]),
    ]
    (found,) = scores_of(model, batches).values()
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-9)


def test_a_channel_is_the_sum_over_its_positions() -> None:
    torch.manual_seed(0)
    model = Convolutional().double()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    means = torch.relu(model.conv(x)).mean((2, 3))
    expected = (means * model.head.weight[model(x).argmax(1)]).abs().sum(0)
    found = scores_of(model, [Batch((x,), {})])
    (channels,) = found.values()
    # They end twice, in what the mean reads and in what the head reads, with the same relevance.
    np.testing.assert_allclose(channels / channels.sum(), (expected / expected.sum()).detach())


def test_without_a_pass_that_explains_it_says_so(
    hidden: tuple[Hidden, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "serving", lambda purpose: [])
    model, x = hidden
    with pytest.raises(errors.UnsupportedError, match="relevance"):
        scores_of(model, [Batch((x,), {})])


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, list[Data], Data]:
    train_data, test_data = digits(0)
    batches = list(epoch(train_data, torch.Generator().manual_seed(100)))[:2]
    return trained(0, train_data, epochs=2), batches, test_data


def test_it_beats_random_on_digits(net: Any) -> None:
    model, batches, test_data = net

    def kept(criterion: str) -> float:
        module = graphopt.optimize(
            model,
            passes=f"canonicalize,prune{{flops=70%,criterion={criterion},rounds=1}}",
            example_inputs=(batches[0][0],),
            data=batches,
            loss=nn.functional.cross_entropy,
            verify=False,
        )
        return accuracy(module, test_data)

    assert kept("relevance") > kept("random") + 0.1
