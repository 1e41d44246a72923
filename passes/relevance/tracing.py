"""A run as one flat graph: forward, relevance, ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.ir.signature import Signature
from graphopt.passes.relevance.engine import OUTPUT, Run
from graphopt.passes.relevance.planning import Plan
from graphopt.passes.relevance.simplify import simplify
from graphopt.passes.relevance.target import (
    Target,
    classes_of,
    gradient_of,
    one_hot,
)
from graphopt.passes.relevance.tokens import at_table, returned

SINKS = (OUTPUT, "inputs", "parameters", "constants", "bias", "epsilon", "softmax")


@dataclass(frozen=True)
class Flat:
    """A flat graph and what it takes and gives.

    Attributes:
        graph: Takes tensors, inputs, and a target index for each sample if `indexed`; gives the
            flat outputs, the relevances and the ledger.
        tensors: Names of the parameters and buffers that it takes.
        indexed: Whether it takes target indices.
        outputs: How many flat outputs it gives.
        relevance: Names of the relevances.
        sinks: Names of the ledger's entries.
    """

    graph: fx.GraphModule
    tensors: tuple[str, ...]
    indexed: bool
    outputs: int
    relevance: tuple[str, ...]
    sinks: tuple[str, ...]


class Explainer:
    """A plan with a target: the run of it as a function of flat tensors.

    Args:
        plan: Rules and sources.
        signature: The model's.
        target: What is explained.
        explicit: Hand relevance itself on, not quotients.
    """

    def __init__(
        self, plan: Plan, signature: Signature, target: Target, explicit: bool = False
    ) -> None:
        self.plan = plan
        self.signature = signature
        self.target = target
        self.explicit = explicit
        self.flat_outputs = list(plan.graph.output_node().args[0])  # type: ignore[call-overload]
        self.output = plan.outputs[0]

    @property
    def indexed(self) -> bool:
        """Whether the target is an index, given anew for each call."""
        return isinstance(self.target, Tensor)

    def run(
        self,
        tensors: Mapping[str, Any],
        inputs: Sequence[Tensor],
        index: Tensor | None = None,
        *,
        audit: bool = False,
    ) -> Run:
        """Forward and back.

        Args:
            tensors: Parameters and buffers by target.
            inputs: Flat inputs.
            index: The class to explain, ``[samples]``; None: as the target says.
            audit: Keep sums for each operation.
        """
        run = Run(self.plan, tensors, inputs, explicit=self.explicit, audit=audit)
        run.backward(self._seeds(run, index))
        return run

    def _seeds(self, run: Run, index: Tensor | None) -> dict[fx.Node, Tensor]:
        if index is None and not isinstance(self.target, str):
            flat = [run.values[n] if isinstance(n, fx.Node) else n for n in self.flat_outputs]
            grads = gradient_of(self.target, flat, self.signature)
            pairs = zip(self.flat_outputs, grads, strict=True)
            found: dict[fx.Node, Tensor] = {}
            for node, grad in pairs:
                if grad is not None and node in self.plan.outputs:
                    found[node] = found[node] + grad if node in found else grad
            return found
        value = run.values[self.output]
        if index is None:
            index = classes_of(value).argmax(-1)
        return {self.output: one_hot(value, index)}

    def results(self, run: Run) -> tuple[list[Any], dict[str, Tensor], dict[str, Tensor]]:
        """Flat outputs, relevances and ledger of a run."""
        outputs = [run.values[n] if isinstance(n, fx.Node) else n for n in self.flat_outputs]
        relevance: dict[str, Tensor] = {}
        tables: dict[Any, Tensor] = {}
        for node, name in self.plan.sources.items():
            value = run.values[node]
            flow = run.arrived.get(node)
            found = flow.relevance(value) if flow is not None else torch.zeros_like(value)
            parts, own = {name: found}, found
            if node in self.plan.lookups:
                lookup = self.plan.lookups[node]
                table: Any = node.args[0]
                if table in self.plan.named.values():
                    rows = at_table(lookup, run.values, run.values[table], found)
                    tables[table] = tables[table] + rows if table in tables else rows
                parts, own = returned(lookup, run.values, found)
                if own is not found:
                    run.ledger.book_value("parameters", node, found - own)
            run.ledger.book_value("inputs", node, own)
            for name, part in parts.items():
                relevance[name] = relevance[name] + part if name in relevance else part
        for name, node in self.plan.named.items():
            value = run.values[node]
            flow = run.arrived.get(node)
            relevance[name] = flow.relevance(value) if flow else torch.zeros_like(value)
            if node in tables:
                relevance[name] = relevance[name] + tables[node]
        totals = run.ledger.totals
        zero = torch.zeros_like(totals[OUTPUT])
        sinks = [*SINKS, *(s for s in totals if s not in SINKS)]
        return outputs, relevance, {s: totals.get(s, zero) for s in sinks}


def trace(explainer: Explainer, tensors: Mapping[str, Any], fakes: Sequence[Tensor]) -> Flat:
    """Trace a run into a flat graph.

    Args:
        explainer: What is run.
        tensors: Parameters and buffers by target.
        fakes: The symbolic fake inputs of the program.
    """
    mode: Any = next(t.fake_mode for t in fakes if hasattr(t, "fake_mode"))
    used = {str(n.target) for n in explainer.plan.graph.find_nodes(op="get_attr")}
    names = tuple(k for k, v in tensors.items() if isinstance(v, Tensor) and k in used)
    given = [mode.from_tensor(tensors[k].detach(), static_shapes=True) for k in names]
    inputs = [f.detach() if f.is_floating_point() else f for f in fakes]
    found: dict[str, Any] = {}

    def call(parameters: list[Tensor], flat: list[Tensor], index: Tensor | None) -> list[Any]:
        run = explainer.run(dict(zip(names, parameters, strict=True)), flat, index)
        outputs, relevance, ledger = explainer.results(run)
        run.marker.note("backward", OUTPUT)
        found.update(outputs=len(outputs), relevance=tuple(relevance), sinks=tuple(ledger))
        return [*outputs, *relevance.values(), *ledger.values()]

    with mode, enable_python_dispatcher():
        index = None
        if explainer.indexed:
            samples = explainer.output.meta["val"].shape[0]
            index = torch.zeros((samples,), dtype=torch.int64, device=inputs[0].device)
        graph = make_fx(call)(given, inputs, index)
    simplify(graph.graph, graph.graph.find_nodes(op="placeholder")[: len(names)])
    graph.recompile()
    return Flat(graph, names, explainer.indexed, **found)
