"""Makes a traced run smaller without changing what it computes.

- Writes in place, as derivatives hold them, are new values: nothing else is right where what is
  equal is computed once.
- Sizes are read from the inputs, at the start: no value is kept alive for its size.
- Detaching is nothing where no gradient is recorded; nor is copying where nobody writes, or
  transposing twice.
- A view of a view is one of the value, and the quotient of a product by its factor the other one.
- Two values that fill up each other's zeros are joined, not added.
- The input gradient of a convolution doesn't read the input.
- Where relevance is zero but for some places, it is handed on at these alone (`padding`).
- A reshape that was traced as a view, of a value whose strides may be others, is one again.
- What is computed twice within one phase is computed once.  Across the phases only views, sizes
  and what depends on parameters alone are: a value would have to be kept for it.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphopt.ir.aliases import is_sure_view, writes
from graphopt.ir.ops import is_repeatable, is_size
from graphopt.ir.storage import aliased_input
from graphopt.passes.relevance import algebra, cropping
from graphopt.passes.relevance.convolutions import without_inputs
from graphopt.passes.relevance.inplace import functionalize_writes
from graphopt.passes.relevance.marks import is_backward, merge

aten = torch.ops.aten


def simplify(graph: fx.Graph, parameters: Iterable[fx.Node]) -> None:
    """Simplify a flat graph in place.

    Args:
        graph: A flat graph with fake values in ``meta["val"]``.
        parameters: The placeholders of parameters and buffers.
    """
    functionalize_writes(graph)
    _reshape_unsure(graph)
    _read_sizes_first(graph)
    if any(writes(node) for node in graph.nodes):
        return  # the same call before and after a write isn't the same value
    _drop_copies(graph)
    without_inputs(graph)
    for node in list(graph.nodes):
        algebra.join(node)
        algebra.divide(node)
    cropping.crop(graph)
    _drop_copies(graph)
    for node in list(graph.nodes):
        algebra.view_once(node)
    _merge_equal(graph, set(parameters))
    graph.eliminate_dead_code()


def _drop_copies(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        source = _same(node)
        if source is not None:
            _replace(node, source)


def _replace(node: fx.Node, by: fx.Node) -> None:
    merge(by, node)
    node.replace_all_uses_with(by)
    node.graph.erase_node(node)


def _same(node: fx.Node) -> fx.Node | None:
    """A node that holds the same, in the same layout, or None."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target is aten.detach.default or algebra.is_all(node, source):
        return source
    if node.target is aten.clone.default and source.op != "placeholder":
        return source if _same_layout(node, source) else None
    if node.target is aten.t.default and source.target is aten.t.default:
        return source.args[0]  # type: ignore[return-value]
    return None


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return str(a.stride()) == str(b.stride()) and a.dtype == b.dtype


_UNSURE = frozenset(
    {
        "_native_batch_norm_legit_no_training",
        "native_batch_norm",
        "convolution",
        "convolution_backward",
        "roll",
    }
)
"""Operators of whose results torch's fake tensors may have other strides than the kernels."""


def _reshape_unsure(graph: fx.Graph) -> None:
    """A `view` that was traced on fake tensors may be impossible on what a kernel returns."""
    unsure: set[fx.Node] = set()
    for node in graph.nodes:
        if _is_unsure(node) or (_keeps_strides(node) and any(n in unsure for n in _tensors(node))):
            unsure.add(node)
            if node.target is aten.view.default:
                node.target = aten.reshape.default


def _is_unsure(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._opname in _UNSURE


def _keeps_strides(node: fx.Node) -> bool:
    """Whether the strides of a result follow from those of what it is computed from."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    copies = target in (aten.detach.default, aten.clone.default, aten._to_copy.default)
    if copies or torch.Tag.pointwise in target.tags:
        return node.kwargs.get("memory_format") in (None, torch.preserve_format)
    return is_sure_view(node)


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if not is_size(n)]


def _read_sizes_first(graph: fx.Graph) -> None:
    """Compute sizes from those of the inputs."""
    inputs = graph.find_nodes(op="placeholder")
    known = _input_sizes(inputs)
    sizes = [n for n in graph.nodes if is_size(n)]
    env: dict[Any, fx.Proxy] = {}
    made: dict[Any, fx.Node] = {}
    tracer = GraphAppendingTracer(graph)  # of all sizes: several make one in `min`
    with graph.inserting_before(inputs[-1].next):
        for node in sizes:
            expr = node.meta["val"].node.expr
            if expr not in made:
                if not expr.free_symbols or not expr.free_symbols <= known.keys():
                    continue
                for symbol in expr.free_symbols - env.keys():
                    source, dim = known[symbol]
                    size = graph.call_function(aten.sym_size.int, (source, dim))
                    size.meta["val"] = source.meta["val"].shape[dim]
                    env[symbol] = fx.Proxy(size, tracer)
                made[expr] = sympy_interp(PythonReferenceAnalysis, env, expr).node
                made[expr].meta.setdefault("val", node.meta["val"])
            node.replace_all_uses_with(made[expr])
    graph.eliminate_dead_code()


def _input_sizes(inputs: Iterable[fx.Node]) -> dict[Any, tuple[fx.Node, int]]:
    """Symbol -> an input and the dimension that has this size."""
    known: dict[Any, tuple[fx.Node, int]] = {}
    for node in inputs:
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                known.setdefault(size.node.expr, (node, dim))
    return known


def _merge_equal(graph: fx.Graph, parameters: set[fx.Node]) -> None:
    constant = set(parameters)  # what depends on parameters alone
    seen: dict[Hashable, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not is_repeatable(node):
            continue
        sources = node.all_input_nodes
        if sources and all(n in constant for n in sources):
            constant.add(node)
        crosses = node in constant or _is_free(node)
        phase = None if crosses else is_backward(node)
        key = _key(node, phase)
        if key is None:
            continue
        first = seen.setdefault(key, node)
        if first is not node:
            _replace(node, first)


def _is_free(node: fx.Node) -> bool:
    if node.target is operator.getitem or is_size(node):
        return True
    return aliased_input(node) is not None


def _key(node: fx.Node, phase: bool | None) -> Hashable | None:
    key = (node.target, _frozen(node.args), _frozen(node.kwargs), phase)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(_frozen(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _frozen(v)) for k, v in value.items())
    # 1, 1.0 and True are equal to each other, but not to an operator
    return value if isinstance(value, fx.Node) else (type(value), value)
