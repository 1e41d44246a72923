"""Explanations within a memory budget."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.cost.allocator import trace_memory
from graphopt.errors import BudgetError, BudgetInfeasible
from graphopt.passes.relevance.module import ExplainedModule, Explanation


class Deep(nn.Module):
    """Blocks whose activations add up."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(depth))
        self.head = nn.Linear(64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of eight classes."""
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = x + nn.functional.gelu(layer(norm(x)))
        return self.head(x)


def _model() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Deep().eval(), torch.randn(128, 64)


def _explained(budget: object = None, **options: object) -> ExplainedModule:
    model, x = _model()
    found = graphopt.explain(model, (x,), memory_budget=budget, **options)  # type: ignore[arg-type]
    assert isinstance(found, ExplainedModule)
    return found


@pytest.fixture(scope="module")
def budgeted() -> ExplainedModule:
    """An explanation within 70 % of its peak."""
    return _explained("70%")


def _peak(module: nn.Module, x: Tensor) -> int:
    module(x)
    return trace_memory(lambda: module(x)).peak


def _equal(first: Explanation, second: Explanation) -> None:
    assert first.relevance.keys() == second.relevance.keys()
    for found, wanted in zip(first.relevance.values(), second.relevance.values(), strict=True):
        assert torch.equal(found, wanted)
    for found, wanted in zip(first.ledger.values(), second.ledger.values(), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(first.output, second.output)


@pytest.mark.parametrize("composite", ["cp-lrp", "epsilon"])
def test_the_budget_is_kept_and_relevance_is_bit_equal(
    composite: str, budgeted: ExplainedModule
) -> None:
    _, x = _model()
    free = _explained(composite=composite)
    reference = _peak(free, x)
    module = budgeted if composite == "cp-lrp" else _explained("70%", composite=composite)
    assert _peak(module, x) <= 0.7 * reference
    _equal(module(x), free(x))
    memory, plan = module.memory, module.schedule
    assert memory is not None
    assert plan is not None
    assert memory.eager_peak == reference
    assert memory.measured_peak <= memory.budget
    assert memory.predicted_peak <= memory.budget
    assert plan.overhead > 0
    assert 0 <= plan.lower_bound <= plan.overhead
    assert plan.gap == pytest.approx(plan.overhead - plan.lower_bound)


def test_bytes_and_another_batch_size() -> None:
    _, x = _model()
    free = _explained()
    module = _explained(int(0.75 * _peak(free, x)))
    other = torch.randn(37, 64)
    _equal(module(other), free(other))
    assert _peak(module, other) < _peak(free, other)


def test_promises_say_what_is_recomputed(budgeted: ExplainedModule) -> None:
    kept = [p for p in _explained().promises() if p.policy == "recompute"]
    assert not kept
    found = [p for p in budgeted.promises() if p.policy == "recompute"]
    assert found
    assert all(p.bytes == 0 and p.arg_node for p in found)


def test_a_budget_of_all_recomputes_nothing() -> None:
    module = _explained("100%")
    assert module.schedule is not None
    assert module.schedule.recomputed_flops == 0
    assert module.schedule.overhead == 0


@pytest.mark.slow
def test_an_impossible_budget_names_the_smallest_possible() -> None:
    with pytest.raises(BudgetInfeasible) as caught:
        _explained("1%")
    smallest = caught.value.smallest
    assert smallest is not None
    module = _explained(int(smallest))
    assert module.memory is not None
    assert module.memory.measured_peak <= smallest
    # the smallest is no lame excuse: a tenth less isn't possible either
    with pytest.raises(BudgetInfeasible):
        _explained(int(0.9 * smallest))


def test_nonsense_is_refused() -> None:
    with pytest.raises(BudgetError):
        _explained("much")


def test_copies_keep_the_plan(budgeted: ExplainedModule) -> None:
    _, x = _model()
    module = budgeted
    peak, wanted = _peak(module, x), module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        _equal(twin(x), wanted)
        assert _peak(twin, x) == peak
        assert twin.memory == module.memory
