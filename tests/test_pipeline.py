"""Passes and pipelines: text both ways, options, running, the registry."""

from __future__ import annotations

import contextlib
import sys
import types
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import registry
from graphopt.budget import Budget, Quantity
from graphopt.errors import BudgetError, PipelineError, UnsupportedError
from graphopt.pipeline import Pass, PassContext, PassResult, Pipeline, Position


@dataclass(frozen=True)
class Slim(Pass):
    """A pass with one option of every kind."""

    name: ClassVar[str] = "slim"
    serves: ClassVar[tuple[str, ...]] = ("memory",)
    position: ClassVar[int] = Position.PLAN

    memory: Quantity | None = None
    scope: Literal["activations", "step"] = "activations"
    rounds: int = 3
    share: float | None = None
    fast: bool = False
    only: tuple[str, ...] = ()
    label: str = ""

    def run(self, program: Any, context: PassContext) -> PassResult:
        """Return the program as it is."""
        return PassResult(program, False, {"slim": {"rounds": self.rounds}})


def lookup(name: str) -> type[Pass]:
    return {"slim": Slim}[name]


def parse(text: str) -> Pipeline:
    return Pipeline.parse(text, lookup)


def test_options_read_by_their_types() -> None:
    text = 'slim{memory=50%,scope=step,rounds=7,share=0.5,fast=true,only=[a,"b, c"],label="x=1"}'
    (made,) = parse(text).passes
    assert made == Slim(
        memory=Quantity(50, "%"),
        scope="step",
        rounds=7,
        share=0.5,
        fast=True,
        only=("a", "b, c"),
        label="x=1",
    )
    assert str(made) == text


def test_defaults_are_left_out_of_the_text() -> None:
    assert str(parse("slim{rounds=3}")) == "slim"
    assert str(parse(" slim , slim{ rounds = 4 } ")) == "slim,slim{rounds=4}"
    assert str(parse("slim{share=none}")) == "slim"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty pipeline"),
        ("slim,,slim", "empty part"),
        ("slim{memory=50%", "missing '}'"),
        ("slim}", "unbalanced"),
        ("slim{rounds}", "option=value"),
        ("slim{round=3}", "did you mean 'rounds'"),
        ("slim{rounds=3,rounds=4}", "given twice"),
        ("slim{rounds=many}", "expected int"),
        ("slim{fast=1}", "expected bool"),
        ("slim{scope=stp}", "did you mean 'step'"),
        ("slim{rounds=3}x", "malformed pass"),
    ],
)
def test_malformed_pipelines_are_refused_with_advice(text: str, says: str) -> None:
    with pytest.raises(PipelineError) as caught:
        parse(text)
    assert says in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_senseless_quantity_in_a_pipeline_is_a_budget_error() -> None:
    with pytest.raises(BudgetError, match="at most 100%"):
        parse("slim{memory=150%}")


LABELS = st.text(alphabet=st.characters(codec="ascii"), max_size=12)


@given(
    st.builds(
        Slim,
        memory=st.none() | st.integers(1, 10**9).map(lambda n: Quantity(n, "B")),
        scope=st.sampled_from(["activations", "step"]),
        rounds=st.integers(-5, 5),
        share=st.none() | st.floats(-10, 10),
        fast=st.booleans(),
        only=st.lists(LABELS, max_size=3).map(tuple),
        label=LABELS,
    )
)
def test_every_pass_reads_back_from_its_text(made: Slim) -> None:
    assert parse(str(made)).passes == (made,)


@given(st.text(max_size=30))
def test_any_text_reads_or_is_refused(text: str) -> None:
    def find(name: str) -> type[Pass]:
        if name != "slim":
            raise PipelineError(name)
        return Slim

    with contextlib.suppress(PipelineError, BudgetError):
        Pipeline.parse(text, find)


def test_a_budget_fills_options_and_its_modifiers() -> None:
    budget = Budget.parse("memory=2GiB,memory_scope=step")
    assert Slim.from_budget(budget) == Slim(memory=Quantity(2 * 2**30, "B"), scope="step")


class FakeProgram:
    """Just enough of a program for the runner."""

    def __init__(self, history: tuple[Any, ...] = ()) -> None:
        self.history = history

    def replace(self, **changes: Any) -> FakeProgram:
        return FakeProgram(**changes)


def test_running_records_each_pass_and_tells_progress() -> None:
    said: list[str] = []
    context = PassContext(progress=lambda text, fraction=None: said.append(text))
    program: Any = parse("slim{rounds=1},slim").run(FakeProgram(), context)  # type: ignore[arg-type]
    assert [r.spec for r in program.history] == ["slim{rounds=1}", "slim"]
    assert program.history[0].report == {"slim": {"rounds": 1}}
    assert any("slim{rounds=1}" in text for text in said)


class TestRegistry:
    def test_the_built_in_passes_are_found(self) -> None:
        found = registry.passes()
        assert "canonicalize" in found
        positions = [cls.position for cls in found.values()]
        assert positions == sorted(positions)

    def test_an_unknown_pass_gets_a_suggestion(self) -> None:
        with pytest.raises(PipelineError, match="did you mean 'canonicalize'"):
            registry.get("canonicalise")

    def test_a_budget_that_nothing_serves_is_refused(self, monkeypatch: Any) -> None:
        monkeypatch.setattr(registry, "serving", lambda field: ())
        with pytest.raises(UnsupportedError, match=r"no pass serves.*pi_latency"):
            registry.choose(Budget.parse("pi_latency=5ms"))

    def test_third_parties_are_found_in_the_same_way(self, monkeypatch: Any) -> None:
        module = types.ModuleType("thirdparty")
        module.Slim = Slim  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "thirdparty", module)
        entries = [
            EntryPoint("slim", "thirdparty:Slim", registry.GROUP),
            EntryPoint("gone", "notinstalled:Pass", registry.GROUP),
        ]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        registry.refresh()
        try:
            assert registry.get("slim") is Slim
            assert Slim in registry.serving("memory")
            assert any("notinstalled" in origin for origin in registry.catalogue().broken)
            with pytest.raises(PipelineError, match="could not be imported"):
                registry.get("gone")
        finally:
            monkeypatch.undo()
            registry.refresh()

    def test_two_passes_of_one_name_are_refused(self, monkeypatch: Any) -> None:
        class Other(Slim):
            name: ClassVar[str] = "canonicalize"

        module = types.ModuleType("thirdparty")
        module.Other = Other  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "thirdparty", module)
        entries = [EntryPoint("other", "thirdparty:Other", registry.GROUP)]
        monkeypatch.setattr(registry, "entry_points", lambda group: entries)
        registry.refresh()
        try:
            with pytest.raises(PipelineError, match="two passes are called 'canonicalize'"):
                registry.passes()
        finally:
            monkeypatch.undo()
            registry.refresh()
