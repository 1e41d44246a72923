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
- What is computed twice within one phase is computed once.  Across the phases only views, sizes
  and what depends on parameters alone are: a value would have to be kept for it.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterable
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphopt.ir.aliases import writes
from graphopt.ir.ops import is_repeatable
from graphopt.ir.storage import aliased_input
from graphopt.passes.relevance import cropping
from graphopt.passes.relevance.convolutions import without_inputs
from graphopt.passes.relevance.inplace import functionalize_writes
from graphopt.passes.relevance.marks import is_backward, merge
from graphopt.passes.relevance.padding import END, same_shape, same_size

aten = torch.ops.aten


def simplify(graph: fx.Graph, parameters: Iterable[fx.Node]) -> None:
    """Simplify a flat graph in place.

    Args:
        graph: A flat graph with fake values in ``meta["val"]``.
        parameters: The placeholders of parameters and buffers.
    """
    functionalize_writes(graph)
    _read_sizes_first(graph)
    if any(writes(node) for node in graph.nodes):
        return  # the same call before and after a write isn't the same value
    _drop_copies(graph)
    without_inputs(graph)
    for node in list(graph.nodes):
        _join(node)
        _divide(node)
    cropping.crop(graph)
    _drop_copies(graph)
    for node in list(graph.nodes):
        _view_once(node)
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
    if node.target is aten.detach.default or _is_all(node, source):
        return source
    if node.target is aten.clone.default and source.op != "placeholder":
        return source if _same_layout(node, source) else None
    if node.target is aten.t.default and source.target is aten.t.default:
        return source.args[0]  # type: ignore[return-value]
    return None


_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_PLACE = {aten.slice.Tensor: 1, aten.slice_backward.default: 2}
"""Where the dimension stands among the arguments of a slice; start, stop and step follow."""


def _is_all(node: fx.Node, source: fx.Node) -> bool:
    """Whether a slice or its gradient, a view or an expansion is all of its source."""
    if node.target in _PLACE:
        _, start, stop, step = _sliced(node)
        return start == 0 and stop == END and step == 1
    if node.target in (*_RESHAPES, aten.expand.default):
        return same_shape(node.meta["val"].shape, source.meta["val"].shape)
    return False


def _sliced(node: fx.Node) -> tuple[Any, Any, Any, Any]:
    """Dimension, start, stop and step of a slice."""
    given = node.args[_PLACE[node.target] :]  # type: ignore[index]
    dim, start, stop, step = (*given, *(0, None, None, 1)[len(given) :])
    return dim, 0 if start is None else start, END if stop is None else stop, step


def _view_once(node: fx.Node) -> None:
    """View a value itself, not a view of it."""
    source = node.args[0] if node.args else None
    if node.target in _RESHAPES and isinstance(source, fx.Node) and source.target in _RESHAPES:
        base: Any = source.args[0]
        if base.meta["val"].is_contiguous():
            node.replace_input_with(source, base)


def _join(node: fx.Node) -> None:
    """Join two gradients of slices that lie next to each other and make up the whole."""
    given = node.args[:2]
    if node.target is not aten.add.Tensor or node.kwargs or not all(map(_is_padded, given)):
        return
    first, second = sorted(given, key=lambda n: _sliced(n)[1])  # type: ignore[arg-type]
    parts = [n.args[0] for n in (first, second)]
    dim, start, middle, step = _sliced(first)
    other, begin, _, pace = _sliced(second)
    sizes = [n.meta["val"].shape[dim] for n in (*parts, node)]  # type: ignore[union-attr]
    adjacent = start == 0 and begin == middle and (step, pace) == (1, 1)
    if dim == other and adjacent and same_size(sizes[0] + sizes[1], sizes[2]):
        with node.graph.inserting_before(node):
            joined = node.graph.call_function(aten.cat.default, (parts, dim))
        joined.meta = dict(node.meta)
        node.replace_all_uses_with(joined)


def _is_padded(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target is not aten.slice_backward.default:
        return False
    return all(isinstance(v, int) for v in _sliced(node))


def _divide(node: fx.Node) -> None:
    """``c x y / x``, or its limit where ``x`` is zero, is ``c y``."""
    quotient = node.args[0] if node.args else None
    if node.target is not aten.nan_to_num.default or not isinstance(quotient, fx.Node):
        return
    if quotient.target is not aten.div.Tensor or len(quotient.users) > 1:
        return
    product, divisor = quotient.args
    found = _factors(product, divisor)
    if found is None:
        return
    scale, other = found
    if scale == 1:
        node.replace_all_uses_with(other)
        return
    with node.graph.inserting_before(node):
        scaled = node.graph.call_function(aten.mul.Tensor, (other, scale))
    scaled.meta = dict(node.meta)
    node.replace_all_uses_with(scaled)


def _factors(product: Any, divisor: Any) -> tuple[float, fx.Node] | None:
    """``c`` and ``y`` of a product ``c x y`` whose one factor is ``x``, both of one shape."""
    if not _is_product(product):
        return None
    for factor, other in (product.args, product.args[::-1]):
        if not isinstance(other, fx.Node) or not _is_like(other, product):
            continue
        if factor is divisor:
            return 1, other
        if _is_product(factor):
            for inner, scale in (factor.args, factor.args[::-1]):
                if inner is divisor and isinstance(scale, int | float):
                    return scale, other
    return None


def _is_product(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.mul.Tensor


def _is_like(node: fx.Node, other: fx.Node) -> bool:
    a, b = node.meta["val"], other.meta["val"]
    return same_shape(a.shape, b.shape) and a.dtype == b.dtype


def _same_layout(node: fx.Node, source: fx.Node) -> bool:
    a, b = node.meta["val"], source.meta["val"]
    return str(a.stride()) == str(b.stride()) and a.dtype == b.dtype


def _read_sizes_first(graph: fx.Graph) -> None:
    """Compute sizes from those of the inputs."""
    inputs = graph.find_nodes(op="placeholder")
    known = _input_sizes(inputs)
    sizes = [n for n in graph.nodes if _is_size(n)]
    env: dict[Any, fx.Proxy] = {}
    made: dict[Any, fx.Node] = {}
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
                    env[symbol] = fx.Proxy(size)
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


def _is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta.get("val"), torch.SymInt)


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
    if node.target is operator.getitem or _is_size(node):
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
