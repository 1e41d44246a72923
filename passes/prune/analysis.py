"""Which axes of a program's tensors are the same, and what of them can be removed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from graphopt.cost.sizes import UnknownSizeError
from graphopt.ir.graphs import lookup
from graphopt.ir.program import Program
from graphopt.passes.prune import rules  # noqa: F401 - registers the rules
from graphopt.passes.prune.rule import (
    Call,
    Result,
    Value,
    analysis_of,
    fixed,
    shape_of,
    values_in,
)
from graphopt.passes.prune.rules.pointwise import is_pointwise, pointwise
from graphopt.passes.prune.units import Labels, Reason, Units

log = logging.getLogger("graphopt")

_REGIONS = ("wrap_with_autocast", "wrap_with_set_grad_enabled")


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter, buffer or constant.

    Attributes:
        path: Its path; of a tied one the first.
        tensor: The tensor.
        value: Its axes.
    """

    path: str
    tensor: torch.Tensor
    value: Value

    @property
    def is_trained(self) -> bool:
        """Whether it is a parameter: those are zero in the masked model."""
        return isinstance(self.tensor, nn.Parameter)


@dataclass(eq=False)
class Analysis:
    """The labels of everything in a program.

    Attributes:
        units: The store of units.
        slots: Parameters, buffers and constants by the identity of their tensors.
        values: What is known of each node of all graphs.
        compensates: Whether norms may lose places of the axes that they normalise.
        names: The first name of each parameter, by its identity.
    """

    units: Units = field(default_factory=Units)
    slots: dict[int, Slot] = field(default_factory=dict)
    values: dict[fx.Node, Result] = field(default_factory=dict)
    compensates: bool = True
    names: dict[int, str] = field(default_factory=dict)

    def slot(self, path: str, tensor: torch.Tensor) -> Slot:
        """The slot of a tensor; a tied one has one."""
        found = self.slots.get(id(tensor))
        if found is None:
            axes = tuple(
                self.units.fresh(n) if n > 1 else np.zeros(n, dtype=np.int64) for n in tensor.shape
            )
            trained = isinstance(tensor, nn.Parameter)
            name = self.names.get(id(tensor), path)
            found = Slot(name, tensor, Value(axes, (trained,) * len(axes)))
            self.slots[id(tensor)] = found
        return found

    def kept(self, slot: Slot, removed: frozenset[int]) -> dict[int, tuple[int, ...]]:
        """For each axis of a slot that loses any places, those that stay."""
        masks = [self.units.kept(labels, removed) for labels in slot.value.axes]
        return {
            axis: tuple(np.flatnonzero(mask).tolist())
            for axis, mask in enumerate(masks)
            if not mask.all()
        }

    def spared(self, removed: frozenset[int]) -> frozenset[int]:
        """Units to remove, less some where an axis, or a part of one that is cut out, lost all."""
        for labels in self._emptiable:
            if not self.units.kept(labels, removed).any():
                removed -= min(map(self.units.members, labels.tolist()), key=len)
        return removed

    @cached_property
    def _emptiable(self) -> list[Labels]:
        """All axes, each once, of which no place stays whatever happens."""
        found: dict[bytes, Labels] = {}
        for value in values_in(tuple(self.values.values())):
            for labels in value.axes:
                if labels.any():
                    now = np.unique(self.units.canonical(labels))
                    if len(now) and now[0]:
                        found[now.tobytes()] = now
        return list(found.values())

    def frozen(self) -> Iterator[tuple[str, int, Reason]]:
        """Axes of parameters of which nothing can be removed, and why."""
        for slot in self.slots.values():
            for axis, labels in enumerate(slot.value.axes):
                if slot.is_trained and len(labels) > 1 and not self.units.is_free(labels):
                    reason = self.units.reason(labels)
                    yield slot.path, axis, reason or Reason("nothing else keeps its size")


def analyse(program: Program, *, compensates: bool = True) -> Analysis:
    """Follow all axes through a program's graphs.

    Args:
        program: The program.
        compensates: Whether norms may lose places of the axes that they normalise.
    """
    names = {id(p): name for name, p in program.skeleton.root.named_parameters()}
    analysis = Analysis(compensates=compensates, names=names)
    for module in (program.module, program.eval_module):
        if module is not None:
            _Walk(analysis, module).run()
    return analysis


def region_of(module: fx.GraphModule, node: fx.Node) -> fx.GraphModule | None:
    """The sub-graph that a call of a higher-order operator runs once, or None."""
    if not isinstance(node.target, torch._ops.HigherOrderOperator):
        return None
    graph = next((n for n in node.all_input_nodes if _is_graph(module, n)), None)
    return None if graph is None else lookup(module, str(graph.target))


class _Walk:
    """One graph, from its placeholders to its outputs."""

    def __init__(self, analysis: Analysis, module: fx.GraphModule) -> None:
        self.analysis, self.units = analysis, analysis.units
        self.module, self.values = module, analysis.values

    def run(self, operands: list[Result] | None = None) -> Any:
        """Give every node its value.

        Args:
            operands: Values of the placeholders of a region; None for a whole graph, whose inputs
                and outputs keep their sizes.

        Returns:
            The values of the outputs.
        """
        given = iter(operands or ())
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                inner = operands is not None
                self.values[node] = next(given) if inner else fixed(node.meta.get("val"))
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "call_function":
                self.values[node] = self._called(node)
        results = self.module.graph.output_node().args[0]
        if operands is None:
            self._freeze_outputs(results)
        return tuple(self.values[n] if isinstance(n, fx.Node) else n for n in _flat(results))

    def _freeze_outputs(self, results: Any) -> None:
        for node in _flat(results):
            value = self.values[node] if isinstance(node, fx.Node) else None
            if isinstance(value, Value):
                for labels in value.axes:
                    self.units.freeze(labels, Reason("it is an output of the model", node.name))

    def _attribute(self, node: fx.Node) -> Result:
        tensor = lookup(self.module, str(node.target))
        if not isinstance(tensor, torch.Tensor):
            return None
        return self.analysis.slot(str(node.target), tensor).value

    def _called(self, node: fx.Node) -> Result:
        call = Call(node, self.units, self.values, compensates=self.analysis.compensates)
        if getattr(node.target, "_name", "") in _REGIONS:
            return self._region(node)
        if not call.inputs and _is_number(node):
            return None
        if _writes(node):
            if any(value.axes for value in call.inputs):
                return call.opaque("it is written to")
            return fixed(call.output)
        rule = analysis_of(node.target) or (pointwise if is_pointwise(node.target) else None)
        if rule is None:
            return call.opaque("there is no pruning rule for this operator")
        try:
            result = rule(call)
        except UnknownSizeError:
            return call.opaque("its size depends on data")
        except (IndexError, KeyError, TypeError, ValueError, AttributeError):
            log.debug("rule of %s at %s", node.target, node.name, exc_info=True)
            return call.opaque("its rule does not cover this call")
        if not _fits(result, call.output):
            return call.opaque("its rule does not cover this call")
        _keep_single_places(call, result)
        return result

    def _region(self, node: fx.Node) -> Result:
        at = next(i for i, a in enumerate(node.args) if _is_graph(self.module, a))
        inner = lookup(self.module, str(node.args[at].target))  # type: ignore[union-attr]
        operands = [self.values[n] if isinstance(n, fx.Node) else n for n in node.args[at + 1 :]]
        return _Walk(self.analysis, inner).run(operands)


def _keep_single_places(call: Call, result: Result) -> None:
    """An axis of one place may be broadcast; without it there would be nothing to broadcast."""
    for value in values_in(result):
        for labels in value.axes:
            if len(labels) == 1:
                call.freeze(labels, "this place of it is read by itself")


def _flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _is_graph(module: fx.GraphModule, argument: Any) -> bool:
    if not isinstance(argument, fx.Node) or argument.op != "get_attr":
        return False
    return isinstance(lookup(module, str(argument.target)), fx.GraphModule)


def _is_number(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, (torch.Tensor, tuple, list))


def _writes(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def _fits(result: Result, output: Any) -> bool:
    """Whether a rule's result has the sizes of the real one."""
    if isinstance(output, torch.Tensor):
        try:
            return isinstance(result, Value) and result.shape == shape_of(output)
        except UnknownSizeError:
            return True
    if isinstance(output, (tuple, list)):
        return isinstance(result, tuple) and all(map(_fits, result, output))
    return True
