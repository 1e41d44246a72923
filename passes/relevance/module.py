"""`ExplainedModule`: a model that says what its output rests on."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _functorch  # type: ignore[attr-defined]
from torch.utils import _pytree as pytree

from graphopt.cost.sizes import Substitution, concrete, symbols_of
from graphopt.errors import InputMismatch, NonFiniteError, UnsupportedError
from graphopt.ir.graphs import lookup
from graphopt.ir.module import OptimizedModule
from graphopt.ir.trees import flatten
from graphopt.ir.untouched import autocast_off
from graphopt.passes.relevance.composite import path_of
from graphopt.passes.relevance.conservation import Entry, conservation
from graphopt.passes.relevance.explainer import doubled, explainer_of
from graphopt.passes.relevance.memory import Schedule, peak_of, plan_memory
from graphopt.passes.relevance.options import Options
from graphopt.passes.relevance.planning import Plan
from graphopt.passes.relevance.promises import Promise, promises
from graphopt.passes.relevance.target import (
    check_range,
    check_target,
    classes_of,
)
from graphopt.passes.relevance.tracing import Explainer, Flat, trace
from graphopt.report import MemoryReport, PlanReport

_OPAQUE = "an explanation runs as it was planned, and is not traced into"


class Explanation(NamedTuple):
    """What a call of an `ExplainedModule` returns.

    Attributes:
        output: What the model returns.
        relevance: Relevance by name: an input's of its shape (of token ids: of their shape), a
            parameter's or a value's of its.  With several targets there is one more dimension in
            front.
        ledger: Relevance of each sample by sink, ``[samples]``: ``output`` is what was explained,
            the others add up to it.  With several targets ``[targets, samples]``.  Where the model
            mixes the samples they are one: ``[1]``.
    """

    output: Any
    relevance: dict[str, Tensor]
    ledger: dict[str, Tensor]


# so that `torch.export.save` can write what an exported explanation returns
pytree._register_namedtuple(Explanation, serialized_type_name="graphopt.Explanation")


@dataclass(frozen=True)
class _Built:
    """What is made of a model once, and again when its tensors have moved.

    Attributes:
        explainer: The plan.
        traced: The run as it was traced.
        flat: The run as it is executed: the same, or the traced one as scheduled.
        sizes: What stands for symbolic sizes at the example inputs.
        traits: Types and places of the tensors that the graph takes.
    """

    explainer: Explainer
    traced: Flat
    flat: Flat
    sizes: Substitution
    traits: tuple[Any, ...]


class ExplainedModule(nn.Module):
    """A model and the relevance of its inputs, as one graph.

    It takes what the model takes and returns an `Explanation`.  The model itself is ``.model``,
    whose parameters are read at each call; the graph that runs is ``.graph``.  After ``.to()`` or
    ``.half()`` the graph is made anew.

    Args:
        model: The captured model.
        options: How it is explained.
        example: Flat example inputs.

    Raises:
        BudgetInfeasible: The memory budget can't be kept; carries the smallest that could.
    """

    def __init__(self, model: OptimizedModule, options: Options, example: Sequence[Tensor]) -> None:
        super().__init__()
        self.model = model.eval()
        self.options = options
        self._example = list(example)
        self._schedule: Schedule | None = None
        self._built: _Built | None = None
        self._ready()

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The flat graph that runs: forward, relevance and ledger."""
        return self._ready().flat.graph

    @property
    def plan(self) -> Plan:
        """What was decided about the model's graph: operations, rules, sources."""
        return self._ready().explainer.plan

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that the graph takes, in this order."""
        return self._ready().flat.tensors

    # --- calls --------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Explanation:
        """Run the model and explain its output.

        Raises:
            InputMismatch: Inputs of other types or sizes than the model takes.
            UsageError: A target out of range.
            NonFiniteError: The output that is explained is NaN or infinite.
        """
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            return self._opaque(args, kwargs)
        return self._called(args, kwargs)

    @torch.compiler.disable(reason=_OPAQUE)
    def _opaque(self, args: Any, kwargs: Any) -> Explanation:
        return self._called(args, kwargs)

    def _called(self, args: Any, kwargs: Any) -> Explanation:
        built = self._ready()
        signature = built.explainer.signature
        flat = signature.flatten_inputs(args, kwargs)
        if torch.compiler.is_exporting():
            return self._explain(built, flat)
        signature.check(flat)
        with autocast_off():  # the graph computes in the types that it was captured with
            explanation = self._run(built, flat)
        check_finite(explanation)
        return explanation

    def at(self, target: Any) -> ExplainedModule:
        """The same explanation of another target; shares the model.

        Where both targets are class indices it shares the graph too, and the index may be a tensor
        that `torch.vmap` maps over.

        Args:
            target: As for `graphopt.explain`.
        """
        found = target if _is_batched(target) else check_target(target)
        twin = copy.copy(self)
        twin.__dict__["options"] = dataclasses.replace(self.options, target=found)
        if not (isinstance(found, Tensor) and isinstance(self.options.target, Tensor)):
            twin.__dict__["_built"] = None
        return twin

    def train(self, mode: bool = True) -> ExplainedModule:
        """Does nothing: a model is explained in eval mode."""
        return self

    def _explain(self, built: _Built, inputs: list[Tensor]) -> Explanation:
        flat = built.flat
        tensors = self._tensors(flat)
        with torch.no_grad():
            if not flat.indexed:
                return self._packed(built, flat.graph(tensors, inputs, None))
            target = self._index(built, inputs)
            if target.ndim < 2:
                return self._packed(built, flat.graph(tensors, inputs, target))
            run: Callable[..., Any] = flat.graph
            # the output doesn't depend on the target
            rest = len(flat.relevance) + len(flat.sinks)
            out_dims: Any = [*[None] * flat.outputs, *[0] * rest]
            mapped = torch.vmap(run, in_dims=(None, None, 0), out_dims=out_dims)
            return self._packed(built, mapped(tensors, inputs, target))

    def _run(self, built: _Built, inputs: list[Tensor]) -> Explanation:
        try:
            return self._explain(built, inputs)
        except RuntimeError as error:
            for place, (given, example) in enumerate(zip(inputs, self._example, strict=True)):
                if given.dtype != example.dtype:
                    raise InputMismatch(
                        f"input {place} is of {given.dtype}, the model takes {example.dtype}",
                        hint="convert the input, or the explanation with .to()",
                    ) from error
            raise

    def _index(self, built: _Built, inputs: Sequence[Tensor]) -> Tensor:
        """The class of each sample, ``[samples]`` or ``[targets, samples]``."""
        samples, target = self._samples(built, inputs), self.options.target
        classes = int(classes_of(built.explainer.output.meta["val"]).shape[-1])
        if not torch.compiler.is_exporting() and not _is_batched(target):
            check_range(target, classes, samples)
        target = target.to(inputs[0].device) % classes  # -1 is the last class
        return target if target.ndim == 2 else target.expand(samples)

    def _samples(self, built: _Built, inputs: Sequence[Tensor]) -> int:
        """Rows of the output: the size of the batch, unless one is a graph of many nodes, say."""
        rows = built.explainer.output.meta["val"].shape[0]
        if not isinstance(rows, torch.SymInt):
            return rows
        fakes = [n.meta["val"] for n in built.explainer.plan.graph.find_nodes(op="placeholder")]
        for fake, given in zip(fakes, inputs, strict=True):
            for size, actual in zip(fake.shape, given.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr == rows.node.expr:
                    return actual
        return concrete(rows, symbols_of(fakes, [t.shape for t in inputs]))

    def _packed(self, built: _Built, results: Sequence[Any]) -> Explanation:
        flat, signature = built.flat, built.explainer.signature
        rest = iter(results[flat.outputs :])
        relevance = {name: next(rest) for name in flat.relevance}
        ledger = {name: next(rest) for name in flat.sinks}
        return Explanation(signature.unflatten_outputs(results[: flat.outputs]), relevance, ledger)

    def _tensors(self, flat: Flat) -> list[Tensor]:
        return [lookup(self.model, name) for name in flat.tensors]

    # --- making the graph -----------------------------------------------------------------------

    def _ready(self) -> _Built:
        built = self._built
        if built is None or built.traits != _traits(self._tensors(built.flat)):
            if torch.compiler.is_exporting():
                raise UnsupportedError(
                    "the model was converted or moved since its explanation was made",
                    hint="call the module once before it is exported",
                )
            built = self.__dict__["_built"] = self._build()
        return built

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExplainedModule:
        super()._apply(fn, recurse)
        if not any(t.is_meta for t in (*self.parameters(), *self.buffers())):
            self._ready()
        return self

    def _build(self) -> _Built:
        fakes = self.model.program.fake_inputs()
        pairs = zip(self._example, fakes, strict=True)
        self._example = [t.to(device=f.device, dtype=f.dtype) for t, f in pairs]
        options = self.options
        explainer, names = explainer_of(self.model, options, doubled(self._example))
        tensors = {name: lookup(self.model, name) for name in names}
        flat = trace(explainer, tensors, fakes)
        sizes = symbols_of(fakes, [t.shape for t in self._example])
        built = _Built(explainer, flat, flat, sizes, _traits(self._tensors(flat)))
        return built if options.memory_budget is None else self._scheduled(built)

    def _scheduled(self, built: _Built) -> _Built:
        """The run within the memory budget; a plan that was made before is used again."""
        budget = self.options.memory_budget
        assert budget is not None
        if self._schedule is not None:
            try:
                flat = self._schedule.applied(built.traced)
                return replace(built, flat=flat)
            except KeyError:
                pass  # after a change of type the graph may have other calls
        measure = functools.partial(self._peak, built)
        self._schedule = plan_memory(built.traced, built.sizes, budget, measure)
        return self._scheduled(built)

    def _peak(self, built: _Built, flat: Flat) -> int:
        candidate = replace(built, flat=flat)
        call = functools.partial(self._explain, candidate, self._example)
        return peak_of(call, self._example[0].device)

    # --- copies and files -----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """The state without the graph, which is made anew; its schedule is kept."""
        return {**self.__dict__, "_built": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the graph anew."""
        super().__setstate__(state)
        self._ready()

    def __deepcopy__(self, memo: dict[int, Any]) -> ExplainedModule:
        twin = copy.copy(self)
        memo[id(self)] = twin
        shared = {"_built", "options", "_schedule"}
        for name, value in self.__dict__.items():
            if name not in shared:
                twin.__dict__[name] = copy.deepcopy(value, memo)
        return twin

    def __copy__(self) -> ExplainedModule:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    # --- looking at it ------------------------------------------------------------------------

    @property
    def memory(self) -> MemoryReport | None:
        """Peaks of one explanation of the example inputs, if there is a memory budget."""
        return None if self._schedule is None else self._schedule.memory

    @property
    def schedule(self) -> PlanReport | None:
        """What is recomputed and what is proven about it, if there is a memory budget."""
        return None if self._schedule is None else self._schedule.plan

    def promises(self) -> list[Promise]:
        """Each value that a rule needs of the forward pass, and how it will be there."""
        built = self._ready()
        ops = built.explainer.plan.ops.values()
        return promises(built.flat.graph.graph, ops, built.sizes)

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
            for op, rule in self.plan.rules.items()
        ]

    def scores(self, output: Any) -> Tensor | None:
        """The scores among which a class is explained.

        Args:
            output: What the model returned.

        Returns:
            ``[samples, classes]``; None where the target is a function of the output.
        """
        explainer = self._ready().explainer
        if not isinstance(self.options.target, str | Tensor):
            return None
        leaves, _ = flatten(output)
        return classes_of(leaves[explainer.flat_outputs.index(explainer.output)])

    def coverage(self) -> dict[str, Any]:
        """How many operations carry relevance, and by which rules.

        Every one has a named rule: an operator without one is an error when the module is made.

        Returns:
            ``{"operations", "named", "families": {family: {"count", "share"}}, "rules": {rule:
            {"count", "share"}}}``; ``named`` is the share of operations with a named rule.
        """
        rules = self.plan.rules
        total = max(1, len(rules))

        def counted(names: list[str]) -> dict[str, dict[str, float]]:
            found = Counter(names).most_common()
            return {name: {"count": count, "share": count / total} for name, count in found}

        return {
            "operations": len(rules),
            "named": sum(bool(rule.name) for rule in rules.values()) / total,
            "families": counted([op.family.value for op in rules]),
            "rules": counted([rule.name for rule in rules.values()]),
        }

    def conservation(self, *args: Any, **kwargs: Any) -> list[Entry]:
        """What arrived at each operation, what it handed on, and what it booked.

        Args:
            *args: Inputs; none: the example inputs.
            **kwargs: Keyword inputs.

        Returns:
            ``{"node", "op", "rule", "arrived", "left", "sinks", "residual"}`` for each operation;
            the residual is relative to the sum of the absolute relevance that arrived.
        """
        built = self._ready()
        signature = built.explainer.signature
        flat = signature.flatten_inputs(args, kwargs) if args or kwargs else self._example
        with torch.no_grad():
            tensors = dict(zip(built.flat.tensors, self._tensors(built.flat), strict=True))
            index = None
            if built.flat.indexed:
                index = self._index(built, flat)
                index = index[0] if index.ndim == 2 else index
            run = built.explainer.run(tensors, flat, index, audit=True)
        return conservation(run)


def _traits(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    return tuple((t.dtype, t.device) for t in tensors)


def _is_batched(target: Any) -> bool:
    """Whether a tensor is being mapped over, so that its elements can't be looked at."""
    return isinstance(target, Tensor) and _functorch.is_batchedtensor(target)


def check_finite(explanation: Explanation) -> None:
    """Refuse NaN; nothing is checked while the output is being mapped over.

    Raises:
        NonFiniteError: The model's output that is explained is NaN or infinite.
    """
    output = explanation.ledger["output"]
    if not _is_batched(output) and not bool(torch.isfinite(output).all()):
        raise NonFiniteError(
            "the output that is explained is NaN or infinite",
            hint="are the inputs and the parameters finite?",
        )
