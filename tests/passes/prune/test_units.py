"""Units: whatever is coupled, masks of what is kept obey it for every choice of removed units."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.passes.prune.units import Labels, Reason, Units

WHY = Reason("a test")


def masks(units: Units, *axes: Labels, seed: int = 0) -> list[list[np.ndarray]]:
    """Masks of all axes for several sets of removed units."""
    free = sorted(set().union(*(units.units_of(labels) for labels in axes)))
    choices = [{u for u in free if random.Random(seed + i).random() < i / 6} for i in range(7)]
    singles = [{unit} for unit in free]
    return [[units.kept(labels, gone) for labels in axes] for gone in (*choices, *singles)]


def test_coupled_axes_keep_the_same_places() -> None:
    units = Units()
    a, b = units.fresh(5), units.fresh(5)
    units.unify(a, b[::-1], WHY)
    assert all((x == y[::-1]).all() for x, y in masks(units, a, b))
    assert len(units.units_of(a)) == 5


def test_a_flat_axis_is_made_of_heads_and_places() -> None:
    units = Units()
    flat = units.fresh(12)
    heads, places = units.split(flat, 3, 4, WHY)
    assert len(units.units_of(flat)) == 3 + 4
    for whole, head, place in masks(units, flat, heads, places):
        assert (whole.reshape(3, 4) == head[:, None] & place[None]).all()


@pytest.mark.parametrize(
    ("first", "second"), [((4, 6), (2, 12)), ((4, 6), (8, 3)), ((2, 12), (4, 6))]
)
def test_two_nested_ways_to_take_an_axis_apart(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    units = Units()
    flat = units.fresh(24)
    parts = [*units.split(flat, *first, WHY), *units.split(flat, *second, WHY)]
    assert units.is_free(flat), "nested factors have a common refinement"
    for whole, a, b, c, d in masks(units, flat, *parts):
        assert (whole.reshape(first) == a[:, None] & b[None]).all()
        assert (whole.reshape(second) == c[:, None] & d[None]).all()


def test_ways_without_a_common_refinement_freeze() -> None:
    units = Units()
    flat = units.fresh(12)
    units.split(flat, 3, 4, WHY)
    units.split(flat, 4, 3, WHY)
    assert units.reason(flat) == WHY


def test_a_place_that_stays_keeps_what_it_is_made_of() -> None:
    units = Units()
    heads, places = units.fresh(2), units.fresh(3)
    flat = units.merge(heads, places)
    units.freeze(flat[:1], WHY)
    assert units.kept(heads, units.units_of(heads)).tolist() == [True, False]
    assert units.kept(places, units.units_of(places)).tolist() == [True, False, False]


AXES = 6


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 99), st.integers(0, 99)), max_size=9))
def test_everything_that_was_said_holds_in_the_end(steps: list[tuple[int, int, int]]) -> None:
    units = Units()
    axes = [units.fresh(n) for n in (4, 6, 6, 12, 12, 4)]
    facts = []
    for kind, i, j in steps:
        one, other = axes[i % len(axes)], axes[j % len(axes)]
        if kind == 0 and len(one) == len(other):
            units.unify(one, other, WHY)
            facts.append(("equal", one, other, None))
        elif kind == 1 and len(one) * len(other) <= 48:
            axes.append(units.merge(one, other))
            facts.append(("merged", axes[-1], one, other))
        elif kind == 2:
            divisors = [d for d in range(1, len(one) + 1) if len(one) % d == 0]
            outer = divisors[j % len(divisors)]
            parts = units.split(one, outer, len(one) // outer, WHY)
            axes += parts
            facts.append(("merged", one, *parts))
        elif kind == 3:
            axes.append(np.concatenate([one, other])[: 12 + j % 5])
        else:
            units.freeze(one[j % len(one) :][:1], WHY)
            facts.append(("stays", one[j % len(one) :][:1], one, None))
    for fact, a, b, c in facts:
        for x, y, z in masks(units, a, b, b if c is None else c):
            if fact == "equal":
                assert (x == y).all()
            elif fact == "stays":
                assert x.all()
            else:
                assert (x == (y[:, None] & z[None]).ravel()).all()
