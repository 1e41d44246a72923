"""The forward graph in the form that rules are about: what has no rule is decomposed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError
from graphopt.ir.aliases import affected, writes
from graphopt.ir.graphs import copy_place
from graphopt.passes.relevance import families
from graphopt.passes.relevance.canonical import canonicalize
from graphopt.passes.relevance.frequencies import is_complex
from graphopt.passes.relevance.inlining import inline_regions
from graphopt.passes.relevance.inplace import functionalize_writes
from graphopt.passes.relevance.ops import carrying, is_getitem, unknown, wanted
from graphopt.passes.relevance.written_out import LOOKUPS, written_out


def prepared(module: fx.GraphModule) -> fx.Graph:
    """A forward graph in which each value is one value and regions are calls like any others.

    Args:
        module: A graph of its own, which is changed.
    """
    inline_regions(module)
    functionalize_writes(module.graph)
    canonicalize(module.graph)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and families.op_name(node) in LOOKUPS:
            decompose(module.graph, node)
    module.graph.eliminate_dead_code()
    return module.graph


def lowered(graph: fx.Graph, outputs: Iterable[int], sources: Iterable[fx.Node]) -> None:
    """Decompose what lies between sources and outputs and has no rule; changes the graph.

    Args:
        graph: The forward graph.
        outputs: Places of the results that are explained.
        sources: Where relevance ends.

    Raises:
        UnsupportedError: A region or an in-place write on the way of relevance, or an operator that
            neither has a rule nor is made of others.
    """
    places, starts = list(outputs), list(sources)
    changed = True
    while changed:
        results: Any = graph.output_node().args[0]  # others once they have been decomposed
        ends = [results[place] for place in places]
        changed = _lowered(graph, wanted(ends, carrying(graph, starts)))


def _lowered(graph: fx.Graph, way: set[fx.Node]) -> bool:
    """One round; whether anything was decomposed."""
    changed = False
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        target = node.target
        mutable = isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable
        if mutable and _is_read(node, way):
            raise UnsupportedError(
                "a value is written in place on the way of relevance",
                node=node,
                hint="write the functional form: y = f(x) instead of f_(x)",
            )
        if node not in way or families.spec_of(node) is not None or is_getitem(node):
            continue
        if any(is_complex(n.meta.get("val")) for n in (node, *node.all_input_nodes)):
            continue  # a part of a region
        if isinstance(target, torch._ops.HigherOrderOperator):
            raise UnsupportedError(
                "relevance doesn't pass through regions of control flow yet",
                node=node,
                hint="write the branches with torch.where",
            )
        decompose(graph, node)
        changed = True
    return changed


def _is_read(node: fx.Node, way: set[fx.Node]) -> bool:
    """Whether a value on the way of relevance may hold what a call writes."""
    return node in way or any(n in way for w in writes(node) for n in affected(w))


def decompose(graph: fx.Graph, node: fx.Node) -> None:
    """Put what an operator is made of in its place.

    Raises:
        UnsupportedError: It isn't made of others.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        raise unknown(node)
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, a in enumerate(flat) if isinstance(a, fx.Node)]
    fakes = [flat[i].meta["val"] for i in places]
    mode = next(f.fake_mode for f in fakes if isinstance(f, torch.Tensor))

    known = written_out(node.target)
    function: Any = known or node.target

    def call(*given: Any) -> Any:
        filled = list(flat)
        for place, value in zip(places, given, strict=True):
            filled[place] = value
        args, kwargs = pytree.tree_unflatten(filled, spec)
        return function(*args, **kwargs)

    with mode, enable_python_dispatcher(), torch.no_grad():
        try:
            traced = make_fx(call, pre_dispatch=known is not None)(*fakes)
        except NotImplementedError as error:
            raise unknown(node) from error
    functionalize_writes(traced.graph)
    aten = torch.ops.aten
    for view in traced.graph.find_nodes(op="call_function", target=aten.view.default):
        view.target = aten.reshape.default  # other samples may be laid out otherwise
    traced.graph.eliminate_dead_code()
    inner = [n for n in traced.graph.nodes if n.op == "call_function"]
    if any(n.target is node.target for n in inner) or not inner:
        raise unknown(node)
    _splice(graph, node, traced, [flat[i] for i in places])


def _splice(graph: fx.Graph, node: fx.Node, traced: fx.GraphModule, given: list[fx.Node]) -> None:
    env: dict[fx.Node, Any] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), given, strict=True)
    )
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "get_attr":
                raise unknown(node)
            if inner.op == "call_function":
                new = graph.node_copy(inner, env.__getitem__)
                copy_place(new, node)
                env[inner] = new
    (result,) = traced.graph.output_node().args
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(env[result])
    else:
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(env[result[index]])  # type: ignore[index]
            graph.erase_node(user)
    graph.erase_node(node)
