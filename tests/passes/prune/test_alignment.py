"""Widths that fill vector registers, where they cost next to nothing."""

from __future__ import annotations

import itertools

import torch
from torch import nn

import graphopt
from graphopt.passes.prune.alignment import aligned, is_cheap, is_near
from graphopt.solvers.widths import Cost, Dimension, Term, WidthProblem, by_rule


def problem(*widths: int, limit: float = 0.5, gains: float = 1.0) -> WidthProblem:
    """A chain of layers."""
    dimensions = tuple(Dimension(str(d), (gains,) * width) for d, width in enumerate(widths))
    terms = tuple(Term(1.0, ((d, 1), (d + 1, 1))) for d in range(len(widths) - 1))
    full = sum(a * b for a, b in itertools.pairwise(widths))
    return WidthProblem(dimensions, (Cost("flops", terms, limit * full),))


def test_wide_dimensions_have_a_step_and_narrow_ones_none() -> None:
    found = aligned(problem(16, 40, 100, 256), (16, 40, 100, 256))
    assert [d.step for d in found.dimensions] == [1, 8, 16, 16]
    assert found.dimensions[2].widths == (16, 32, 48, 64, 80, 96, 100)


def test_what_earlier_rounds_have_left_is_no_full_width() -> None:
    found = aligned(problem(57, 8, 90), (64, 64, 128))
    assert found.dimensions[0].widths == (16, 32, 48)
    assert found.dimensions[1].widths == tuple(range(1, 9)), "less than a register: any width"
    assert found.dimensions[2].widths == (16, 32, 48, 64, 80)


def test_it_is_cheap_where_widths_are_many_and_not_where_they_are_few() -> None:
    for widths, wanted in (((512, 512, 512), True), ((64, 64), False)):
        plain = problem(*widths)
        rounded = aligned(plain, widths)
        pair = by_rule(rounded, "uniform"), by_rule(plain, "uniform")
        assert (is_cheap(plain, *pair) and is_near(plain, *pair)) == wanted
    plain = problem(64, 64)
    assert by_rule(aligned(plain, (64, 64)), "uniform").widths in ((64, 32), (32, 64))


def test_a_wide_network_gets_aligned_widths_at_its_budget() -> None:
    torch.manual_seed(0)
    widths = (256, 320, 384, 512)
    layers = [nn.Linear(8, widths[0])]
    layers += [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    model = nn.Sequential(*layers, nn.Linear(widths[-1], 4)).eval()
    x = torch.randn(2, 8)
    found = graphopt.optimize(model, "flops=50%", (x,)).report.to_dict()["prune"]
    assert all(kept % 16 == 0 for _, _, kept in found["dimensions"])
    assert 0.97 <= found["flops_after"] / found["flops_before"] / 0.5 <= 1
    passes = "canonicalize,prune{flops=50%,round_to=1}"
    exact = graphopt.optimize(model, passes=passes, example_inputs=(x,)).report.to_dict()["prune"]
    assert any(kept % 16 for _, _, kept in exact["dimensions"])
    assert found["value"] >= 0.995 * exact["value"]
