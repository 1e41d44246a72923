"""What arrives at each value of a program: facts for graph views, scores for other passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import NonFiniteError
from graphopt.ir.graphs import lookup
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import Program
from graphopt.passes.relevance.engine import OUTPUT, Run
from graphopt.passes.relevance.explainer import doubled, explainer_of
from graphopt.passes.relevance.ops import is_floating
from graphopt.passes.relevance.options import Options
from graphopt.passes.relevance.target import check_range, classes_of
from graphopt.passes.relevance.tracing import Explainer


class Arrivals:
    """A program that says what relevance arrives at each of its values.

    Unlike `ExplainedModule` nothing is traced: a run keeps all values, and is looked at.

    Args:
        program: The program; it is explained in eval mode.
        options: Composite, target.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
    """

    def __init__(
        self, program: Program, options: Options, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        self._model: OptimizedModule = program.emit().eval()
        flat = program.signature.flatten_inputs(args, kwargs)
        explainer, self._names = explainer_of(self._model, options, doubled(flat))
        plan = explainer.plan
        values = {node: node.name for node in (*plan.sources, *plan.ops)}
        # Of several results each has a node of its own that takes it.
        one = {name: n for n, name in values.items() if not _is_several(n.meta.get("val"))}
        self._explainer = Explainer(
            replace(plan, named=one), explainer.signature, explainer.target, explainer.explicit
        )

    @property
    def rules(self) -> dict[str, str]:
        """The rule of each operation, by the node of its result."""
        plan = self._explainer.plan
        return {op.node.name: rule.name for op, rule in plan.rules.items()}

    def run(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The relevance at each value, by the name of its node, of the value's shape.

        Args:
            args: Positional inputs.
            kwargs: Keyword inputs.
            index: The class to explain, ``[samples]``, instead of the largest.

        Raises:
            NonFiniteError: The explained output is NaN or infinite.
            UsageError: A class that the model doesn't have.
        """
        signature = self._explainer.signature
        flat = signature.flatten_inputs(args, kwargs)
        signature.check(flat)
        tensors = {name: lookup(self._model, name) for name in self._names}
        with torch.no_grad():
            run = self._explainer.run(tensors, flat, self._index(flat, index), audit=False)
            return _arrived(run)

    def _index(self, flat: Sequence[Tensor], index: Tensor | None) -> Tensor | None:
        target = self._explainer.target
        samples = flat[0].shape[0]
        if index is None and isinstance(target, Tensor):
            index = (target[0] if target.ndim == 2 else target).expand(samples)
        if index is None:
            return None
        classes = int(classes_of(self._explainer.output.meta["val"]).shape[-1])
        check_range(index, classes, samples)
        return index.to(flat[0].device) % classes


def _arrived(run: Run) -> dict[str, Tensor]:
    if not bool(torch.isfinite(run.ledger.totals[OUTPUT]).all()):
        raise NonFiniteError(
            "the output that is explained is NaN or infinite",
            hint="give inputs on which the model is finite",
        )
    return {node.name: flow.relevance(run.values[node]) for node, flow in run.arrived.items()}


def _is_several(value: Any) -> bool:
    return isinstance(value, tuple | list) or not is_floating(value)


@dataclass(frozen=True)
class NodeRelevance:
    """What arrived at one value, over a batch.

    Attributes:
        node: Name of the node that gives it.
        rule: The rule of the operation, or ``input``.
        relevance: Sum of what arrived.
        size: Sum of its absolute values.
    """

    node: str
    rule: str
    relevance: float
    size: float


@dataclass(frozen=True)
class RelevanceReport:
    """Section ``relevance``: what arrives at each value on the example inputs.

    Attributes:
        composite: Which rules were applied.
        output: Sum of what was explained.
        nodes: Each value that carries relevance, in the order in which they run.
        overlays: The same for views of graphs, see `Pass.facts`: the sum as a share of the output,
            and the rule.
    """

    composite: str
    output: float
    nodes: tuple[NodeRelevance, ...]
    overlays: tuple[dict[str, Any], ...] = ()


def node_facts(
    program: Program, options: Options, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> RelevanceReport:
    """The relevance at each value of a program, summed over the example batch."""
    arrivals = Arrivals(program, options, args, kwargs)
    rules = arrivals.rules
    found = arrivals.run(args, kwargs)
    inside = {node.name for node in program.module.graph.nodes}
    nodes = tuple(
        NodeRelevance(
            name,
            rules.get(name, "input"),
            float(value.double().sum()),
            float(value.double().abs().sum()),
        )
        for name, value in reversed(found.items())
    )
    shown = [node for node in nodes if node.node in inside]
    output = next((node.relevance for node in reversed(nodes)), 0.0)
    return RelevanceReport(options.composite.name, output, nodes, tuple(_overlays(shown)))


def _overlays(nodes: Sequence[NodeRelevance]) -> Iterator[dict[str, Any]]:
    if not nodes:
        return
    notes = {n.node: f"{n.relevance:.4g} of {n.size:.4g} in absolute values" for n in nodes}
    yield {
        "name": "relevance",
        "title": "relevance",
        "kind": "diverging",
        "values": {n.node: n.relevance for n in nodes},
        "notes": notes,
    }
    yield {
        "name": "size",
        "title": "absolute relevance",
        "kind": "sequential",
        "values": {n.node: n.size for n in nodes},
        "notes": notes,
    }
    yield {
        "name": "rule",
        "title": "rule of relevance",
        "kind": "categorical",
        "values": {n.node: n.rule for n in nodes},
    }
