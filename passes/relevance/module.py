"""`ExplainedModule`: a model that says what its output rests on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from graphopt.errors import NonFiniteError
from graphopt.ir.graphs import lookup
from graphopt.ir.module import OptimizedModule
from graphopt.passes.relevance.composite import Composite, path_of
from graphopt.passes.relevance.planning import make_plan
from graphopt.passes.relevance.prepare import prepared
from graphopt.passes.relevance.target import check_range, classes_of, explained_outputs
from graphopt.passes.relevance.tracing import Explainer, Flat, trace


class Explanation(NamedTuple):
    """What a call of an `ExplainedModule` returns.

    Attributes:
        output: What the model returns.
        relevance: Relevance by name: an input's of its shape (of token ids: of their shape), a
            parameter's or a value's of its.  With several targets there is one more dimension in
            front.
        ledger: Relevance of each sample by sink, ``[samples]``: ``output`` is what was explained,
            the others add up to it.
    """

    output: Any
    relevance: dict[str, Tensor]
    ledger: dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """How a model is explained.

    Attributes:
        composite: Which rules are applied where.
        target: What is explained (see `graphopt.passes.relevance.target`).
        attribute: What gets a relevance.
        explicit: Hand relevance itself on, not quotients.
    """

    composite: Composite
    target: Any
    attribute: tuple[str, ...]
    explicit: bool = False


class ExplainedModule(nn.Module):
    """A model and the relevance of its inputs, as one graph.

    It takes what the model takes and returns an `Explanation`.  The model itself is ``.model``; the
    graph that runs is ``.graph``.

    Args:
        model: The captured model.
        options: How it is explained.
        example: Flat example inputs.
    """

    def __init__(self, model: OptimizedModule, options: Options, example: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model.eval()
        self.options = options
        self._example = list(example)
        self._explainer, self._flat = self._build()

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The flat graph: forward, relevance and ledger."""
        return self._flat.graph

    def forward(self, *args: Any, **kwargs: Any) -> Explanation:
        """Run the model and explain its output."""
        signature = self._explainer.signature
        flat = signature.flatten_inputs(args, kwargs)
        signature.check(flat)
        found = self._explain(flat)
        if not torch.compiler.is_compiling():
            check_finite(found)
        return found

    def train(self, mode: bool = True) -> ExplainedModule:
        """Does nothing: a model is explained in eval mode."""
        return self

    def _explain(self, flat: list[Tensor]) -> Explanation:
        tensors = [lookup(self.model, name) for name in self._flat.tensors]
        target = self.options.target
        with torch.no_grad():
            if not self._flat.indexed:
                return self._packed(self._flat.graph(tensors, flat, None))
            samples = flat[0].shape[0]
            if not torch.compiler.is_compiling():
                value = self._explainer.output.meta["val"]
                check_range(target, int(classes_of(value).shape[-1]), samples)
            target = target.to(flat[0].device)
            if target.ndim < 2:
                return self._packed(self._flat.graph(tensors, flat, target.expand(samples)))
            run: Callable[..., Any] = self._flat.graph
            return self._packed(torch.vmap(run, in_dims=(None, None, 0))(tensors, flat, target))

    def _packed(self, results: Sequence[Any]) -> Explanation:
        flat, signature = self._flat, self._explainer.signature
        rest = iter(results[flat.outputs :])
        relevance = {name: next(rest) for name in flat.relevance}
        ledger = {name: next(rest) for name in flat.sinks}
        return Explanation(signature.unflatten_outputs(results[: flat.outputs]), relevance, ledger)

    def _build(self) -> tuple[Explainer, Flat]:
        program = self.model.program
        signature = program.signature
        if program.eval_module is not None and program.eval_signature is not None:
            signature = program.eval_signature
        graph = prepared(program.specialize(training=False))
        names = {str(n.target) for n in graph.find_nodes(op="get_attr")}
        tensors = {name: lookup(self.model, name) for name in names}
        options = self.options
        choose = functools.partial(explained_outputs, options.target, signature=signature)
        example = doubled(self._example)
        plan = make_plan(graph, tensors, example, options.composite, options.attribute, choose)
        explainer = Explainer(plan, signature, options.target, options.explicit)
        return explainer, trace(explainer, tensors, program.fake_inputs())

    # --- looking at it ------------------------------------------------------------------------

    def rules(self) -> list[dict[str, Any]]:
        """The rule for each operation: ``{"node", "op", "family", "path", "rule"}``."""
        return [
            {
                "node": op.node.name,
                "op": op.name,
                "family": op.family.value,
                "path": path_of(op.node),
                "rule": str(rule),
            }
            for op, rule in self._explainer.plan.rules.items()
        ]

    def conservation(self, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        """What arrived at each operation, what it handed on, and what it booked.

        Args:
            *args: Inputs; none: the example inputs.
            **kwargs: Keyword inputs.

        Returns:
            ``{"node", "op", "rule", "arrived", "left", "sinks", "residual"}`` for each operation;
            the residual is relative to the sum of the absolute relevance that arrived.
        """
        signature = self._explainer.signature
        flat = signature.flatten_inputs(args, kwargs) if args or kwargs else self._example
        with torch.no_grad():
            tensors = {name: lookup(self.model, name) for name in self._flat.tensors}
            run = self._explainer.run(tensors, flat, self._index(flat), audit=True)
        assert run.accounts is not None
        found = []
        for op, account in run.accounts.items():
            sinks = {k: float(v.double().sum()) for k, v in run.ledger.entries.get(op, {}).items()}
            lost = account.arrived - account.left - sum(sinks.values())
            found.append(
                {
                    "node": op.node.name,
                    "op": op.name,
                    "rule": str(self._explainer.plan.rules[op]),
                    "arrived": account.arrived,
                    "left": account.left,
                    "sinks": sinks,
                    "residual": abs(lost) / account.size if account.size else abs(lost),
                }
            )
        return found

    def _index(self, flat: Sequence[Tensor]) -> Tensor | None:
        if not self._flat.indexed:
            return None
        target = self.options.target
        first = target[0] if target.ndim == 2 else target
        return first.expand(flat[0].shape[0])


def doubled(flat: Sequence[Tensor]) -> list[Tensor]:
    """Example inputs with at least two samples."""
    sizes = [t.shape[0] for t in flat if t.ndim]
    if not sizes or max(sizes) > 1:
        return list(flat)
    return [torch.cat([t, t]) if t.ndim else t for t in flat]


def check_finite(explanation: Explanation) -> None:
    """Refuse NaN.

    Raises:
        NonFiniteError: The model's output that is explained is NaN or infinite.
    """
    if not bool(torch.isfinite(explanation.ledger["output"]).all()):
        raise NonFiniteError("the output that is explained is NaN or infinite")
