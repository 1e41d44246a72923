"""Relevance per node as a pass reports it: against autograd, closed forms, and the ledger."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import errors
from graphopt.passes.relevance import Relevance
from graphopt.pipeline import PassContext
from tests.zoo import ZOO


class Net(nn.Module):
    """Without biases and with ReLU alone: relevance is value times gradient everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6, bias=False), nn.Linear(6, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().double().eval(), torch.randn(5, 4, dtype=torch.float64)


def section(model: nn.Module, args: tuple, kwargs: dict | None = None, spec: str = "") -> dict:
    found = graphopt.optimize(
        model, example_inputs=args, example_kwargs=kwargs, passes=f"canonicalize,relevance{spec}"
    )
    return found.report.sections["relevance"]


def test_each_node_has_value_times_gradient() -> None:
    model, x = net()
    x.requires_grad_()
    hidden = model.up(x)
    active = torch.relu(hidden)
    scores = model.down(active)
    score = scores.amax(1).sum()
    values = (x, hidden, active)
    grads = torch.autograd.grad(score, values)
    expected = [v.detach() * g for v, g in zip(values, grads, strict=True)]
    found = section(model, (x.detach(),))
    by_name = {each["node"]: each for each in found["nodes"]}
    assert list(by_name) == ["x", "linear", "relu", "linear_1"]
    for name, value in zip(("x", "linear", "relu"), expected, strict=True):
        assert by_name[name]["relevance"] == pytest.approx(float(value.sum()), rel=1e-9)
        assert by_name[name]["size"] == pytest.approx(float(value.abs().sum()), rel=1e-9)
    assert by_name["linear_1"]["relevance"] == pytest.approx(score.item())
    assert found["output"] == pytest.approx(score.item())


def test_a_class_and_a_composite_are_chosen_in_the_pipeline() -> None:
    model, x = net()
    found = section(model, (x,), spec="{composite=epsilon,target=1}")
    assert found["composite"] == "epsilon"
    assert found["output"] == pytest.approx(model(x)[:, 1].sum().item())
    rules = {each["node"]: each["rule"] for each in found["nodes"]}
    assert rules == {"x": "input", "linear": "epsilon", "relu": "secant", "linear_1": "epsilon"}


def test_nothing_is_changed() -> None:
    model, x = net()
    program = graphopt.capture(model, (x,))
    result = Relevance().run(program, PassContext((x,)))
    assert result.program is program
    assert not result.changed


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_facts_are_about_nodes_of_the_graph_and_agree_with_the_ledger(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    model = entry.model().eval()
    module = graphopt.optimize(
        model,
        example_inputs=args,
        example_kwargs=kwargs,
        passes="canonicalize,relevance",
        verify=False,
    )
    found = module.report.sections["relevance"]
    json.dumps(found, allow_nan=False)
    ledger = graphopt.explain(model, args, example_kwargs=kwargs)(*args, **kwargs).ledger
    assert found["output"] == pytest.approx(float(ledger["output"].sum()), rel=1e-5)
    inputs = sum(each["relevance"] for each in found["nodes"] if each["rule"] == "input")
    assert inputs == pytest.approx(float(ledger["inputs"].sum()), rel=1e-4)
    nodes = {node.name for node in module.program.module.graph.nodes}
    by_name = {overlay["name"]: overlay for overlay in found["overlays"]}
    assert set(by_name) == {"relevance", "size", "rule"}
    assert by_name["relevance"]["kind"] == "diverging"
    for overlay in by_name.values():
        assert overlay["values"]
        assert set(overlay["values"]) <= nodes
    for each in found["nodes"]:
        assert abs(each["relevance"]) <= each["size"] * (1 + 1e-6)


@pytest.mark.parametrize(
    ("spec", "error", "says"),
    [
        ("{composite=cp-lpr}", errors.UsageError, "cp-lrp"),
        ("{target=cat}", errors.UsageError, "argmax"),
    ],
)
def test_bad_options_are_refused(spec: str, error: type[Exception], says: str) -> None:
    model, x = net()
    with pytest.raises(error, match=says):
        section(model, (x,), spec=spec)


def test_a_class_out_of_range_is_refused() -> None:
    model, x = net()
    with pytest.raises(errors.UsageError, match="3 classes"):
        section(model, (x,), spec="{target=7}")


def test_an_infinite_output_is_refused() -> None:
    model, x = net()
    program = graphopt.capture(model, (x,))
    with pytest.raises(errors.NonFiniteError):
        Relevance().run(program, PassContext((x * float("inf"),)))
