"""Every operator that relevance knows, in a module of its own, against what it has to conserve."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

import graphopt
from graphopt.passes.relevance.families import TABLE
from graphopt.passes.relevance.planning import Plan, make_plan
from graphopt.passes.relevance.prepare import prepared
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.tracing import Explainer
from tests.passes.relevance.operators import SAMPLES, Net, random


def test_every_operator_has_a_sample() -> None:
    assert set(TABLE) - set(SAMPLES) == set()


LIBRARIES = {"grouped_mm_fallback": "transformers"}
NAMES = [n for n in sorted(SAMPLES) if n not in LIBRARIES or importlib.util.find_spec(LIBRARIES[n])]
ROUNDED = [n for n in NAMES if SAMPLES[n].bar]
EXACT = [n for n in NAMES if n not in ROUNDED]
GROUPS = [*(EXACT[i::12] for i in range(12)), *([n] for n in ROUNDED)]


def bars(names: list[str], size: Any, rtol: float, atol: float) -> dict[str, Any]:
    """How far results may be off: by a part of themselves and some more."""
    bar = SAMPLES[names[0]].bar
    return {"rtol": rtol, "atol": bar * float(size)} if bar else {"rtol": rtol, "atol": atol}


def planned(net: Net, x: Tensor) -> tuple[Plan, dict[str, Tensor]]:
    """A plan from one plain export, which is all that an operator needs; and its tensors."""
    program = torch.export.export(net, (x,), strict=False)
    module, signature = program.graph_module, program.graph_signature
    names = {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    tensors = {}
    for node in module.graph.find_nodes(op="placeholder"):
        if node.name not in names:
            continue
        name = names[node.name]
        tensors[node.name] = program.state_dict.get(name, program.constants.get(name))
        setattr(module, node.name, tensors[node.name])
        with module.graph.inserting_before(node):
            held = module.graph.create_node("get_attr", node.name)
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        module.graph.erase_node(node)
    graph, composite = prepared(module), composite_of("cp-lrp")
    return make_plan(graph, tensors, [x], composite, ("inputs",), lambda _: [0]), tensors


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_what_arrives_is_what_leaves_and_what_is_booked(names: list[str]) -> None:
    for name in names:
        x, bar = random(*SAMPLES[name].shape, seed=5), SAMPLES[name].bar
        plan, tensors = planned(Net([SAMPLES[name]]), x)
        assert name in {op.name for op in plan.ops.values()}
        found = []
        for explicit in (False, True):
            explainer = Explainer(plan, None, "argmax", explicit)  # type: ignore[arg-type]
            with torch.no_grad():
                run = explainer.run(tensors, [x], audit=True)
                _, relevance, ledger = explainer.results(run)
            assert run.accounts is not None
            for op, account in run.accounts.items():
                booked = sum(float(v.sum()) for v in run.ledger.entries.get(op, {}).values())
                lost = abs(account.arrived - account.left - booked)
                assert lost <= (bar or 1e-12) * account.size, (name, op.name, explicit)
            output = ledger.pop("output")
            found += relevance.values()
            size = found[0].abs().sum()
            close = bars([name], size, rtol=1e-11, atol=1e-12)
            torch.testing.assert_close(sum(ledger.values()), output, **close)
        torch.testing.assert_close(*found, **bars([name], size, rtol=1e-9, atol=1e-10))


@pytest.mark.slow
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_they_can_be_captured_and_explained(names: list[str]) -> None:
    samples = [SAMPLES[name] for name in names]
    inputs = tuple(random(*s.shape, seed=i) for i, s in enumerate(samples))
    explained: Any = graphopt.explain(Net(samples), inputs)
    assert set(names) <= {each["op"] for each in explained.rules()}
    result = explained(*inputs)
    ledger = dict(result.ledger)
    output = ledger.pop("output")
    size = sum(r.abs().sum() for r in result.relevance.values())
    close = bars(names, size, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(sum(ledger.values()), output, **close)
