"""Hit rates on masks made by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from graphopt.errors import GraphoptError, InputMismatch, NonFiniteError, UsageError
from graphopt.passes.relevance.judging import localisation

RELEVANCE = torch.tensor([[5.0, 4.0, 3.0, -9.0], [1.0, 2.0, 8.0, 5.0]])
TRUTH = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1]]).bool()


@pytest.mark.parametrize(
    ("k", "hits", "top"), [(1, (1, 0), (1, 0)), (2, (0.5, 0.5), (1, 1)), (4, (0.5, 0.25), (1, 1))]
)
def test_the_highest_positions_are_counted(
    k: int, hits: tuple[float, float], top: tuple[float, float]
) -> None:
    found = localisation(RELEVANCE, TRUTH, k=k)
    assert found.hit_rate.mean == pytest.approx(sum(hits) / 2)
    assert found.top_k_accuracy.mean == pytest.approx(sum(top) / 2)
    # Standard error of two values: half their distance.
    assert found.hit_rate.standard_error == pytest.approx(abs(hits[0] - hits[1]) / 2)


def test_rank_and_mass_accuracy_and_chance() -> None:
    found = localisation(RELEVANCE, TRUTH)
    assert found.rank_accuracy.mean == pytest.approx((0.5 + 0) / 2)
    assert found.mass_accuracy.mean == pytest.approx((8 / 12 + 5 / 16) / 2)
    assert found.chance == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert json.loads(json.dumps(found.to_dict()))["k"] == 1


def test_padding_does_not_count() -> None:
    allowed = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]).bool()
    found = localisation(RELEVANCE, TRUTH, allowed=allowed)
    assert found.hit_rate.mean == 1
    assert found.mass_accuracy.mean == pytest.approx((8 / 12 + 5 / 8) / 2)
    assert found.chance == pytest.approx((2 / 4 + 1 / 3) / 2)


def test_maps_and_their_flattened_form_agree() -> None:
    maps = torch.randn(8, 5, 6, generator=torch.Generator().manual_seed(0))
    truth = torch.rand(8, 5, 6, generator=torch.Generator().manual_seed(1)) < 0.3
    assert localisation(maps, truth, k=4) == localisation(maps.flatten(1), truth.flatten(1), k=4)


def test_chance_is_what_random_and_constant_relevance_reach() -> None:
    truth = torch.zeros(500, 20, dtype=torch.bool)
    truth[:, :4] = True
    random = torch.rand(500, 20, generator=torch.Generator().manual_seed(2))
    for relevance in (random, torch.ones(500, 20)):
        found = localisation(relevance, truth, k=3)
        for estimate in (found.hit_rate, found.rank_accuracy):
            assert abs(estimate.mean - found.chance) < 2 * estimate.standard_error
    assert found.mass_accuracy.mean == pytest.approx(0.2)


def test_no_positive_relevance_is_no_mass() -> None:
    assert localisation(-RELEVANCE.abs(), TRUTH).mass_accuracy.mean == 0


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (UsageError, "k=0", {"k": 0}),
        (UsageError, "k=5", {"k": 5}),
        (UsageError, "k=True", {"k": True}),
        (InputMismatch, "truth", {"truth": TRUTH[:, :3]}),
        (InputMismatch, "allowed", {"allowed": TRUTH[:1]}),
        (UsageError, r"samples \[1\]", {"truth": TRUTH & torch.tensor([[True], [False]])}),
        (NonFiniteError, "NaN", {"relevance": RELEVANCE.log()}),
    ],
)
def test_what_makes_no_sense_is_refused(
    error: type[GraphoptError], match: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        localisation(**{"relevance": RELEVANCE, "truth": TRUTH, **options})
