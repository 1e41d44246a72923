"""Promises: what is kept between forward and backward, against what the allocator sees."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.cost.allocator import trace_memory
from graphopt.ir.graphs import lookup
from graphopt.passes.relevance.marks import is_backward
from graphopt.passes.relevance.module import ExplainedModule
from graphopt.passes.relevance.promises import kept_bytes
from tests.zoo import ZOO


class Block(nn.Module):
    """A residual block: linear, normalised, activated."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up = nn.Linear(16, 32)
        self.activation = activation
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Shape as it came."""
        return x + self.down(self.activation(self.up(self.norm(x))))


def _explained(model: nn.Module, *args: Tensor, **options: object) -> ExplainedModule:
    found = graphopt.explain(model, args, **options)  # type: ignore[arg-type]
    assert isinstance(found, ExplainedModule)
    return found


class _Walk(fx.Interpreter):
    """Runs a flat graph and marks the moment at which backward begins."""

    def __init__(self, module: fx.GraphModule, mark: object) -> None:
        super().__init__(module)
        self.mark, self.turned = mark, False

    def run_node(self, n: fx.Node) -> object:
        if is_backward(n) and not self.turned:
            self.turned = True
            self.mark("turn")  # type: ignore[operator]
        return super().run_node(n)


def _live_at_the_turn(module: ExplainedModule, inputs: list[Tensor]) -> int:
    """Allocator bytes that live when the forward phase is over."""
    tensors = [lookup(module.model, name) for name in module.tensors]

    def run(mark: object) -> object:
        walk = _Walk(module.graph, mark)
        with torch.no_grad():
            return walk.run(tensors, inputs, None)

    run(lambda name: None)
    return trace_memory(run).live_at("turn")


def _output_bytes(module: ExplainedModule, inputs: list[Tensor]) -> int:
    with torch.no_grad():
        output = module.model(*inputs)
    return sum(t.nbytes for t in pytree.tree_leaves(output))


@pytest.mark.parametrize("composite", ["cp-lrp", "epsilon"])
@pytest.mark.parametrize("activation", [nn.ReLU(), nn.GELU()])
def test_promises_are_what_lives_at_the_turn(composite: str, activation: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Block(activation), Block(activation), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 16)
    module = _explained(model, x, composite=composite)
    live = _live_at_the_turn(module, [x])
    kept = kept_bytes(module.promises())
    # the output is alive as well, and counted where a rule needs it too
    assert kept <= live <= kept + _output_bytes(module, [x])


@pytest.mark.parametrize("name", ["cnn", "bert", "llama"])
def test_promises_of_the_zoo_are_what_lives_at_the_turn(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    kwargs = {k: v for k, v in kwargs.items() if k != "labels"}
    module = graphopt.explain(entry.model().eval(), args, example_kwargs=kwargs)
    assert isinstance(module, ExplainedModule)
    inputs = [*args, *kwargs.values()]
    live = _live_at_the_turn(module, inputs)
    kept = kept_bytes(module.promises())
    slack = sum(t.nbytes for t in pytree.tree_leaves(module.model(*args, **kwargs)))
    assert kept <= live <= kept + slack


def _nodes(module: ExplainedModule) -> Iterator[str]:
    return (entry["node"] for entry in module.rules())


def test_a_network_without_activations_needs_nothing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5)).eval()
    module = _explained(model, torch.randn(2, 3, 8, 8), target=0)
    found = module.promises()
    kept = [p for p in found if p.policy == "keep"]
    # the score that is explained, and nothing else
    assert {p.operand for p in kept} <= {"linear"}
    cancelled = {(p.origin, p.operand) for p in found if p.policy == "cancel"}
    assert {("conv2d", "conv2d"), ("linear", "flatten"), ("conv2d", "input")} <= {
        (origin, "input" if operand.startswith("input") else operand)
        for origin, operand in cancelled
    }
    assert all(p.bytes == 0 for p in found if p.policy != "keep")


def test_every_operand_has_a_promise() -> None:
    model = nn.Sequential(Block(nn.GELU()), nn.Linear(16, 4)).eval()
    module = _explained(model, torch.randn(4, 16))
    origins = {promise.origin for promise in module.promises()}
    assert origins >= set(_nodes(module))


def test_a_view_of_something_kept_is_an_alias() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = torch.exp(x)
            return (y.reshape(-1, 2, 4).transpose(1, 2) @ y.reshape(-1, 2, 4)).flatten(1)

    module = _explained(Twice(), torch.randn(3, 8), composite="attnlrp")
    found = [p for p in module.promises() if p.origin == "matmul" and p.policy != "cancel"]
    # both factors are views of one value
    assert [p.policy for p in found].count("keep") == 1
    assert {p.policy for p in found} == {"alias", "keep"}
    assert len({p.arg_node for p in found}) == 1
    assert any(p.chain for p in found)
    assert sum(p.bytes for p in found) == 3 * 8 * 4


def test_rules_that_need_values_keep_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    x = torch.randn(16, 8)
    cheap = kept_bytes(_explained(model, x).promises())
    dear = kept_bytes(_explained(model, x, composite="excitation").promises())
    assert cheap < dear
