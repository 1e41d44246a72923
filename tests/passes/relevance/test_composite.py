"""Composites as text, and what is said of bad ones."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphopt
from graphopt.errors import GraphoptError, UnsupportedError, UsageError
from graphopt.passes.relevance.composite import Composite, Match
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.presets import PRESETS, composite_of
from graphopt.passes.relevance.rules import Epsilon, Flat, Gamma, Identity, Uniform, WSquare, ZBox


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_text(name: str) -> None:
    composite = PRESETS[name]()
    assert composite.name == name
    again = Composite.from_toml(composite.to_toml())
    assert again == composite
    assert composite_of(composite.to_toml()) == composite
    assert composite_of(name) == composite


_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
_NAMES = st.lists(_TEXT, max_size=2).map(tuple)
_MATCHES = st.builds(
    Match,
    family=st.lists(st.sampled_from([f.value for f in Family]), max_size=2).map(tuple),
    op=_NAMES,
    path=_NAMES,
    depth=st.sampled_from(["any", "first", "last"]),
    role=st.lists(st.sampled_from(["data x data", "data x param"]), max_size=2).map(tuple),
)
_SIZES = st.floats(0, 1e6)
_BOUNDS = st.lists(st.floats(0, 9), min_size=3, max_size=3).map(tuple)
_RULES = st.one_of(
    st.builds(Epsilon, _SIZES, st.sampled_from(["rms", "sign", "unsigned", "clip"])),
    st.builds(Gamma, _SIZES | st.just(math.inf)),
    st.builds(ZBox, st.floats(-9, 0) | _BOUNDS.map(lambda b: tuple(-v for v in b)), _BOUNDS),
    st.sampled_from([Identity(), Flat(), WSquare(bias=True)]),
    st.builds(Uniform, st.sampled_from([(), ("gate",), ("attention", "selection")])),
)


@settings(max_examples=60, deadline=None)
@given(_TEXT, st.lists(st.tuples(_MATCHES, _RULES), min_size=1, max_size=4))
def test_any_composite_survives_text(name: str, entries: list[tuple[Match, Any]]) -> None:
    composite = Composite(name, tuple(entries))
    assert Composite.from_toml(composite.to_toml()) == composite


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("name = ", "isn't TOML"),
        ("[[entry]]\nrule = 'epsilom'", "epsilon"),
        ("[[entry]]\nfamily = 'conv'", "without a rule"),
        ("[[entry]]\nrule = 3", "there is no rule 3"),
        ("[[entry]]\nrule = ['epsilon']", "there is no rule"),
        ("[[entry]]\nrule = 'epsilon'\nepsilon = 1", "eps"),
        ("[[entry]]\nrule = 'epsilon'\neps = 'much'", "eps"),
        ("[[entry]]\nrule = 'epsilon'\nstabiliser = 'sgn'", "sign"),
        ("[[entry]]\nrule = 'alpha-beta'\nalpha = 5", "alpha - beta = 1"),
        ("[[entry]]\nrule = 'epsilon'\nfamily = 'convolution'", "conv"),
        ("[[entry]]\nrule = 'epsilon'\nfamily = [1]", "family"),
        ("[[entry]]\nrule = 'epsilon'\npath = [1]", "path"),
        ("[[entry]]\nrule = 'epsilon'\ndepth = 'frist'", "first"),
        ("[[entry]]\nrule = 'epsilon'\ndepth = ['first']", "depth"),
        ("[[entry]]\nrule = 'epsilon'\nrole = 'data x dat'", "data x data"),
        ("entries = 1\n", "no 'entries'"),
        ("entry = 1\n", "list of tables"),
        ("name = 'empty'\n", "no rules"),
    ],
)
def test_bad_text_is_refused(text: str, word: str) -> None:
    with pytest.raises(UsageError) as error:
        Composite.from_toml(text)
    assert word in str(error.value)


def test_unknown_names_suggest() -> None:
    with pytest.raises(UsageError, match="attnlrp"):
        composite_of("attn-lrp")


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def test_an_operation_without_an_entry_is_named() -> None:
    rules = Composite("mine", ((Match(), Identity()),))
    with pytest.raises(UsageError, match="isn't for operations of the family 'conv'"):
        graphopt.explain(_net(), (torch.randn(2, 2, 4, 4),), composite=rules)
    rules = Composite("mine", composite_of("cp-lrp").entries[:2])
    with pytest.raises(UnsupportedError, match="'mine' has no rule"):
        graphopt.explain(_net(), (torch.randn(2, 2, 4, 4),), composite=rules)


def test_entries_match_path_depth_and_operands() -> None:
    rules = composite_of("cp-lrp").before(
        (Match(path=("3",)), Epsilon(0.5)),
        (Match(depth="first"), Flat()),
        (Match(family=("scale",), role=("data x param",)), Identity()),
    )
    explained = graphopt.explain(_net(), (torch.randn(2, 2, 4, 4),), composite=rules)
    found = {each["family"]: each["rule"] for each in explained.rules()}  # type: ignore[operator]
    assert found["linear"] == "epsilon(eps=0.5)"
    assert found["conv"] == "flat"


def test_text_explains_as_its_composite() -> None:
    torch.manual_seed(0)
    net, x = _net(), torch.randn(2, 2, 4, 4)
    rules = composite_of("epsilon-gamma-box")
    one = graphopt.explain(net, (x,), composite="epsilon-gamma-box")(x)
    other = graphopt.explain(net, (x,), composite=rules.to_toml())(x)
    assert [*one.relevance] == [*other.relevance]
    assert all(torch.equal(one.relevance[n], other.relevance[n]) for n in one.relevance)


def test_another_stabiliser_everywhere() -> None:
    rules = composite_of("epsilon-plus-flat").stabilised(1e-6, "sign")
    found = {r.name: r.options() for _, r in rules.entries}
    for name in ("epsilon", "z-plus", "flat", "proportional"):
        assert found[name] == {"eps": 1e-6, "stabiliser": "sign"}
    assert found["uniform"] == {"stop": ("attention", "gate", "selection")}


@pytest.mark.parametrize("name", ["pattern-attribution", "pattern-net"])
def test_patterns_need_data(name: str) -> None:
    with pytest.raises(GraphoptError, match="data"):
        graphopt.explain(_net(), (torch.randn(2, 2, 4, 4),), composite=name)
    with pytest.raises(UsageError, match="no batches"):
        graphopt.explain(_net(), (torch.randn(2, 2, 4, 4),), composite=name, data=[])
