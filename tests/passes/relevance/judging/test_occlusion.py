"""Leave-one-out, sensitivity-n and infidelity: closed forms of linear and quadratic models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graphopt.errors import GraphoptError, InputMismatch, NonFiniteError, UsageError
from graphopt.passes.relevance.judging import (
    Removal,
    infidelity,
    leave_one_out,
    leave_one_out_correlation,
    sensitivity_n,
    spearman,
)
from tests.passes.relevance.judging.test_curves import WEIGHT, drawn, linear

X = drawn(6, 5)
EXACT = X * WEIGHT[:, 1]


def pairwise(x: Tensor) -> Tensor:
    """x0 x1 + x2 x3 + x4: what one unit gives depends on another."""
    return x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3] + x[:, 4]


def test_leave_one_out_of_a_linear_model_is_its_contributions() -> None:
    torch.testing.assert_close(leave_one_out(linear, X, targets=1), EXACT)
    base = drawn(5, seed=8)
    found = leave_one_out(linear, X, targets=1, removal=Removal(baseline=base, batch_size=7))
    torch.testing.assert_close(found, (X - base) * WEIGHT[:, 1])


def test_leave_one_out_counts_a_product_for_both_factors() -> None:
    p, q = X[:, 0] * X[:, 1], X[:, 2] * X[:, 3]
    found = leave_one_out(pairwise, X)
    torch.testing.assert_close(found, torch.stack([p, p, q, q, X[:, 4]], 1))


def test_units_that_may_not_be_removed_are_zero_and_patches_are_summed() -> None:
    allowed = torch.tensor([1, 0, 1, 1, 0]).expand(6, 5)
    found = leave_one_out(linear, X, targets=1, removal=Removal(allowed=allowed))
    torch.testing.assert_close(found, EXACT * allowed)
    images, weight = drawn(2, 3, 4, 4), drawn(3, 4, 4, seed=2)
    patches = leave_one_out(lambda v: (v * weight).sum((1, 2, 3)), images, removal=Removal(units=2))
    expected = torch.nn.functional.avg_pool2d(images * weight, 2) * 4
    torch.testing.assert_close(patches, expected.sum(1).flatten(1))


def test_the_correlation_is_of_ranks_alone() -> None:
    def correlation(relevance: Tensor, **options: Any) -> float:
        removal = Removal(**options)
        return leave_one_out_correlation(linear, X, relevance, targets=1, removal=removal).mean

    assert correlation(EXACT) == pytest.approx(1)
    assert correlation(EXACT**3 + 5) == pytest.approx(1)
    assert correlation(-EXACT) == pytest.approx(-1)
    assert correlation(torch.ones_like(EXACT)) == 0
    wrong = EXACT.clone()
    wrong[:, 0] = 1e6 * torch.arange(6) - 2.5e6  # counts only where the unit is compared
    allowed = torch.tensor([0, 1, 1, 1, 1]).expand(6, 5)
    assert correlation(wrong, allowed=allowed) == pytest.approx(1)
    assert correlation(wrong) < 1


def test_spearman_against_scipy_with_ties() -> None:
    stats = pytest.importorskip("scipy.stats")
    a = torch.randint(0, 4, (20, 9), generator=torch.Generator().manual_seed(0))
    b = torch.randint(0, 4, (20, 9), generator=torch.Generator().manual_seed(1))
    expected = [float(stats.spearmanr(p, q).statistic) for p, q in zip(a, b, strict=True)]
    assert spearman(a, b).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("n", [1, 3])
def test_a_linear_model_is_foretold_for_every_n(n: int) -> None:
    assert sensitivity_n(linear, X, EXACT, n, targets=1).mean == pytest.approx(1)
    assert sensitivity_n(linear, X, -EXACT, n, targets=1).mean == pytest.approx(-1)
    chance = sensitivity_n(linear, drawn(300, 5), drawn(300, 5, seed=3), n, targets=1)
    assert abs(chance.mean) < 2 * chance.standard_error


def test_all_units_at_once_leave_nothing_to_correlate() -> None:
    assert sensitivity_n(linear, X, EXACT, 5, targets=1).mean == 0


def test_infidelity_is_none_for_exact_contributions_and_one_for_nothing() -> None:
    assert infidelity(linear, X, EXACT, targets=1).mean == pytest.approx(0, abs=1e-20)
    assert infidelity(linear, X, 7 * EXACT, targets=1).mean == pytest.approx(0, abs=1e-20)
    assert infidelity(linear, X, torch.zeros_like(X), targets=1).mean == 1
    # Half a product for each factor is the best an additive relevance can say about this model.
    p, q = X[:, 0] * X[:, 1] / 2, X[:, 2] * X[:, 3] / 2
    half = torch.stack([p, p, q, q, X[:, 4]], 1)
    found = infidelity(pairwise, X, half, subsets=400).mean
    assert 0 < found < infidelity(pairwise, X, leave_one_out(pairwise, X), subsets=400).mean < 1


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (UsageError, "n=0", lambda: sensitivity_n(linear, X, EXACT, 0)),
        (UsageError, "n=6", lambda: sensitivity_n(linear, X, EXACT, 6)),
        (UsageError, "subsets=1", lambda: sensitivity_n(linear, X, EXACT, 2, subsets=1)),
        (UsageError, "subsets=0", lambda: infidelity(linear, X, EXACT, subsets=0)),
        (NonFiniteError, "NaN", lambda: infidelity(linear, X, EXACT.log())),
        (InputMismatch, "shape", lambda: leave_one_out_correlation(linear, X, EXACT[:, :3])),
    ],
)
def test_what_makes_no_sense_is_refused(error: type[GraphoptError], match: str, call: Any) -> None:
    with pytest.raises(error, match=match):
        call()
