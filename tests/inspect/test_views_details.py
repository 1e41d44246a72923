"""What overlays and drawings make of models that are out of the ordinary."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn

import graphopt
from graphopt import inspect
from graphopt.inspect import drawing
from graphopt.ir.capture import capture


class Nested(nn.Module):
    """Modules within modules."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.inner = Nested(depth - 1) if depth else nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(torch.relu(self.inner(x))) + x


class Identity(nn.Module):
    """No operation at all."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_relevance_stands_at_the_operation_and_at_the_input():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5, bias=False), nn.ReLU(), nn.Linear(5, 3, bias=False))
    x = torch.randn(1, 6)
    recorder = inspect.Recorder()
    module = graphopt.optimize(
        model,
        None,
        (x,),
        passes="canonicalize,relevance{composite=lrp-0}",
        instruments=[recorder],
        verify=False,
    )
    data = inspect.inspection(recorder.programs[0], module, recorded=recorder, seconds=False)
    (overlay,) = [o for o in data["overlays"] if o["name"] == "relevance"]
    assert overlay["kind"] == "diverging"
    nodes = {n["name"]: n for n in data["nodes"]}
    placed = {name: nodes[name].get("target") for name in overlay["values"]}
    assert set(placed.values()) == {None, "aten.mm", "aten.relu"}  # never the weights' transposes
    assert [n for n in placed if nodes[n]["op"] == "input"] == ["input"]  # FX calls it input_1
    # Without biases, stabilisers or weights that are explained nothing is lost on the way (LRP-0):
    # at each operator arrives the output that is explained, which is the largest.
    wanted = model(x).max().item()
    assert list(overlay["values"].values()) == pytest.approx([wanted] * 4, rel=1e-4)
    assert data["summary"]["warnings"] == []


def test_a_model_without_operations_has_its_name():
    program = capture(Identity(), (torch.rand(2, 3),))
    assert inspect.document(program).title == "Identity"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_deeply_nested_modules_can_be_drawn(monkeypatch):
    # Without a limit on network simplex, Graphviz takes minutes over this one.
    monkeypatch.setattr(drawing, "_DOT_SECONDS", 60)
    program = capture(Nested(25), (torch.rand(4, 8),))
    assert inspect.dump(program, "svg", view="joint").count('class="cluster"') > 50


def test_a_peak_of_nothing_is_nowhere():
    told = inspect.table(capture(Identity(), (torch.rand(2, 3),))).caption
    assert str(told) == "peak of forward: 0 B; saved for backward: 0 B"
