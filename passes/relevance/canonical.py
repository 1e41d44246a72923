"""Calls that mean one operator, or none, as what they mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.cost.sizes import same_size
from graphopt.ir.aliases import writes
from graphopt.ir.graphs import copy_place
from graphopt.passes.relevance.exponentials import meant_by
from graphopt.passes.relevance.families import calls, op_name

aten = torch.ops.aten

_LARGEST = frozenset({"amax", "max"})

_BY_SIZE: dict[Any, Any] = {
    aten.upsample_linear1d.default: aten.upsample_linear1d.vec,
    aten.upsample_trilinear3d.default: aten.upsample_trilinear3d.vec,
}
"""Interpolations whose derivative takes no symbolic sizes, and their other form."""

_ZEROS: dict[Any, Any] = {
    aten.empty.memory_format: aten.zeros.default,
    aten.empty_like.default: aten.zeros_like.default,
    aten.new_empty.default: aten.new_zeros.default,
}
"""What stands for memory that a model writes to; what happens to lie there may be NaN."""


def canonicalize(graph: fx.Graph) -> None:
    """Bring a functional forward graph into the form that rules are about; changes the graph."""
    _once(graph)
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if (meant := meant_by(node)) is not None:
            _replace(graph, node, *meant)
        elif (rewrite := _REWRITES.get(op_name(node))) is not None:
            rewrite(graph, node)


def _once(graph: fx.Graph) -> None:
    """Compute once what is computed twice from the same values."""
    if any(writes(node) for node in graph.nodes):
        return  # the same call before and after a write isn't the same value
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags:
            continue
        key = (target, repr(node.args), repr(node.kwargs))
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _through(graph: fx.Graph, node: fx.Node) -> None:
    """What a value is made of doesn't depend on where gradients go."""
    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
    graph.erase_node(node)


def _zero(graph: fx.Graph, node: fx.Node) -> None:
    """Memory that is not filled holds zeros."""
    if node.target not in _ZEROS:
        return
    if op_name(node) == "empty":
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "memory_format"}
    node.target = _ZEROS[node.target]


def _other_gate(graph: fx.Graph, node: fx.Node) -> None:
    """``1 - sigmoid(x)`` is a gate as well: ``sigmoid(-x)``."""
    first, second = node.args[:2]
    gate: Any = first if op_name(node) == "rsub" else second
    one = second if op_name(node) == "rsub" else first
    if one != 1 or node.kwargs or len(node.args) > 2 or not calls(gate, "sigmoid"):
        return
    _replace(graph, node, aten.sigmoid.default, ((aten.neg.default, gate.args),))


def _replace(graph: fx.Graph, node: fx.Node, target: Any, args: tuple[Any, ...]) -> None:
    """Call another operator in place of a node; arguments that are pairs are calls themselves."""
    with graph.inserting_before(node):
        inner = [graph.call_function(*a) if isinstance(a, tuple) else a for a in args]
        new = graph.call_function(target, tuple(inner))
    for made in (*(i for i, a in zip(inner, args, strict=True) if i is not a), new):
        copy_place(made, node, "val")
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _linear(graph: fx.Graph, node: fx.Node) -> None:
    """``x @ W + b`` with a matrix and a vector that are parameters is a linear layer with bias."""
    if node.kwargs or len(node.args) != 2:
        return
    product: Any = next((a for a in node.args if calls(a, "matmul") or calls(a, "mm")), None)
    bias: Any = next((a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"), None)
    if product is None or bias is None or len(product.users) != 1:
        return
    x, weight = product.args
    matrix = weight.args[0] if _is_transposed(weight) else weight
    if matrix.op != "get_attr" or x.op == "get_attr":
        return
    sizes = [n.meta["val"].shape for n in (weight, bias, node)]
    if len(sizes[0]) != 2 or len(sizes[1]) != 1 or sizes[1][0] != sizes[2][-1]:
        return
    with graph.inserting_before(node):
        if matrix is weight:
            matrix = graph.call_function(aten.t.default, (weight,))
            matrix.meta["val"] = weight.meta["val"].t()
        new = graph.call_function(aten.linear.default, (x, matrix, bias))
    copy_place(new, node, "val")
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    graph.erase_node(product)


def _is_transposed(node: fx.Node) -> bool:
    """Whether a node is a matrix with its two dimensions exchanged."""
    names = ("t", "transpose", "numpy_T", "mT", "permute", "adjoint")
    if not any(calls(node, name) for name in names):
        return False
    dims = node.args[1] if op_name(node) == "permute" else node.args[1:]
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    exchanged = not dims or sorted(d % 2 for d in dims) == [0, 1]  # type: ignore[union-attr]
    kept = op_name(node) == "permute" and [d % 2 for d in dims] == [0, 1]  # type: ignore[union-attr]
    return isinstance(value, Tensor) and value.ndim == 2 and exchanged and not kept


def _by_factors(graph: fx.Graph, node: fx.Node) -> None:
    """Interpolation as modules call it, by sizes or by factors: that has a derivative."""
    if node.target not in _BY_SIZE:
        return
    x: Any
    x, size, aligned, *factors = (*node.args, *node.kwargs.values())
    factors = [f for f in factors if f is not None]
    if aligned or not factors:  # aligned corners tell the factors
        _replace(graph, node, _BY_SIZE[node.target], (x, size, aligned, None))
        return
    sizes = x.meta["val"].shape[2:]
    if len(factors) == len(sizes) and size == [int(n * f) for n, f in zip(sizes, factors)]:  # noqa: B905
        _replace(graph, node, _BY_SIZE[node.target], (x, None, aligned, factors))


def _trim(graph: fx.Graph, node: fx.Node) -> None:
    """Cut a scattered source to the size of its index; autograd takes no other one."""
    index, source = node.args[2], node.args[3] if len(node.args) > 3 else None
    if not isinstance(index, fx.Node) or not isinstance(source, fx.Node):
        return
    sizes = zip(source.meta["val"].shape, index.meta["val"].shape, strict=True)
    for dim, (given, read) in enumerate(sizes):
        if same_size(given, read):
            continue
        with graph.inserting_before(node):
            length = graph.call_function(aten.sym_size.int, (index, dim))
            length.meta["val"] = read
            cut = graph.call_function(aten.slice.Tensor, (source, dim, 0, length))
        copy_place(cut, node)
        cut.meta["val"] = source.meta["val"].narrow(dim, 0, read)
        node.update_arg(3, cut)
        source = cut


def _softmax(graph: fx.Graph, node: fx.Node) -> None:
    """``exp(x - m) / sum(exp(x - m))``, with ``m`` the largest ``x`` or left out."""
    exponential: Any = node.args[0]
    total: Any = node.args[1]
    if not calls(exponential, "exp") or not calls(total, "sum"):
        return
    dims = _dims(total)
    if total.args[0] is not exponential or dims is None or len(dims) != 1:
        return
    if len(total.args) < 3 or total.args[2] is not True or total.kwargs.get("dtype"):
        return
    x: Any = exponential.args[0]
    if calls(x, "sub") and len(x.args) == 2 and not x.kwargs and _largest_of(x.args[1], x.args[0]):
        x = x.args[0]
    with graph.inserting_before(node):
        new = graph.call_function(aten.softmax.int, (x, dims[0]))
    copy_place(new, node, "val")
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _largest_of(node: Any, x: Any) -> bool:
    if calls(node, "getitem") and node.args[1] == 0:
        node = node.args[0]
    return isinstance(node, fx.Node) and op_name(node) in _LARGEST and node.args[0] is x


def _dims(node: fx.Node) -> list[int] | None:
    dims: Any = node.args[1] if len(node.args) > 1 else None
    value = node.meta.get("val")
    if dims is None or not isinstance(value, Tensor):
        return None
    return [d % value.ndim for d in dims]


_REWRITES: dict[str, Callable[[fx.Graph, fx.Node], None]] = {
    "detach": _through,
    "lift_fresh_copy": _through,
    "empty": _zero,
    "empty_like": _zero,
    "new_empty": _zero,
    "scatter": _trim,
    "scatter_add": _trim,
    "scatter_reduce": _trim,
    "div": _softmax,
    "rsub": _other_gate,
    "sub": _other_gate,
    "add": _linear,
    "upsample_linear1d": _by_factors,
    "upsample_trilinear3d": _by_factors,
}
"""What is done with a call, by its operator's name."""
