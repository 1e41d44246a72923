"""What is decided about a graph before relevance is handed back through it."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import UnsupportedError, UsageError, suggest
from graphopt.passes.relevance import regions
from graphopt.passes.relevance.composite import Composite, depths, path_of
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.folding import folded
from graphopt.passes.relevance.ops import Op, carrying, is_floating, is_getitem, operations, wanted
from graphopt.passes.relevance.prepare import lowered
from graphopt.passes.relevance.roles import Roles
from graphopt.passes.relevance.rules import Rule
from graphopt.passes.relevance.samples import WHOLE, Layout, layouts, poisoned, spread
from graphopt.passes.relevance.tokens import Lookup, lookups, marked, named


@dataclass(frozen=True, eq=False)
class Plan:
    """Decisions about one forward graph.

    Attributes:
        graph: The forward graph.
        outputs: The results that are explained and depend on a source.
        ops: The operations that carry relevance, by the call that gives the result.
        interior: Calls that are run as a part of an operation.
        rules: The rule for each operation.
        sources: Where relevance ends: values of inputs and embedded tokens, with the input's name.
        lookups: How those of them that aren't inputs were looked up.
        followed: Constants through which relevance goes on, to a parameter that was asked for.
        parametric: Constants that depend on a parameter.
        named: What was asked for besides the inputs: name in the result -> value.
        layouts: Where the samples of a batch lie in each value.
        batch: The placeholder whose dimension 0 is the batch; None: all is one sample.
        slopes: Derivatives at zero of the activations that give zero for zero.
        roles: Roles of operands.
        folds: Batch norms that are a part of the layer in front of them, by that layer.
        patterns: Patterns by the name of the weight, where a rule needs them.
    """

    graph: fx.Graph
    outputs: tuple[fx.Node, ...]
    ops: Mapping[fx.Node, Op]
    interior: frozenset[fx.Node]
    rules: Mapping[Op, Rule]
    sources: Mapping[fx.Node, str]
    lookups: Mapping[fx.Node, Lookup]
    followed: frozenset[fx.Node]
    parametric: frozenset[fx.Node]
    named: Mapping[str, fx.Node]
    layouts: Mapping[fx.Node, Layout]
    batch: fx.Node | None
    slopes: Mapping[Op, float]
    roles: Roles
    folds: Mapping[Op, Op]
    patterns: Mapping[str, Tensor] | None = None

    @property
    def kept(self) -> set[fx.Node]:
        """Values at which what arrives is wanted."""
        return {*self.sources, *self.named.values()}

    def rows(self, op: Op) -> tuple[int, ...]:
        """Dimensions of one row of a result: all but the batch, the last one of a linear layer."""
        value = op.node.meta["val"]
        if op.family is Family.CONV or value.ndim < 2:
            return tuple(range(1, value.ndim)) or (0,)
        return (-1,)


def make_plan(
    graph: fx.Graph,
    tensors: Mapping[str, Any],
    inputs: Sequence[Tensor],
    composite: Composite,
    attribute: Sequence[str],
    choose: Callable[[Sequence[Any]], Sequence[int]],
) -> Plan:
    """Decide which rule is applied where.

    Args:
        graph: The forward graph, with fake values in ``meta["val"]``.
        tensors: What its ``get_attr`` nodes hold, by target.
        inputs: Example values of its placeholders.
        composite: Rules.
        attribute: What shall get a relevance: ``"inputs"``, ``"parameters"``, or globs on names of
            inputs, parameters and values.
        choose: Says at which places the results stand that are explained, given all values.

    Raises:
        UnsupportedError: An operator without a rule; an output that depends on nothing attributed.
        UsageError: Nothing is called what ``attribute`` asks for.
    """
    looked_up = lookups(graph)
    sources = _sources(graph, looked_up, attribute)
    given = values_of(graph, tensors, inputs)
    explained = choose([given[n] if isinstance(n, fx.Node) else n for n in _results(graph)])
    lowered(graph, explained, sources)
    inside = carrying(graph, sources)
    results = [n for n in dict.fromkeys(_results(graph)[i] for i in explained) if n in inside]
    if not results:
        raise _independent(graph, sources)
    inside = wanted(results, inside)
    named, parameters = _named(graph, attribute, sources, inside)
    parametric = _closure(graph, _parameters(graph, tensors), inside)
    followed = _closure(graph, parameters, inside)
    merged = regions.centred(graph, inside) | regions.activations(graph, inside)
    merged |= regions.complex_maps(graph, inside)
    inner = regions.interior(graph, merged)
    named = _outer(named, inner, attribute)
    # a followed constant stays a constant to what reads it: it gets a relevance on the side
    found_ops = [
        *operations(graph, inside, merged, inner),
        *operations(graph, followed, {}, frozenset()),
    ]
    by_node = {op.node: op for op in found_ops}
    ops = {node: by_node[node] for node in graph.nodes if node in by_node}
    ends = depths(list(ops.values()))
    rules = {
        op: composite.rule(op, path_of(op.node), ends.get(op, frozenset())) for op in ops.values()
    }
    folds, rules = folded(ops, rules, {*named.values(), *results})
    values = values_of(graph, tensors, inputs, known=given)  # decomposed calls have new values
    laid_out = [*results, *(s for s in sources if s in inside)]
    laid_out += [n for n, op in ops.items() if n in inside and op.family is not Family.ROUTE]
    batch, layout = _layouts(
        graph, values, {s: looked_up.get(s) for s in inside & {*sources}}, laid_out
    )
    return Plan(
        graph=graph,
        outputs=tuple(results),
        ops=ops,
        interior=inner,
        rules=rules,
        sources={n: name for n, name in sources.items() if n in inside},
        lookups={n: found for n, found in looked_up.items() if n in sources and n in inside},
        followed=frozenset(followed),
        parametric=frozenset(parametric),
        named=named,
        layouts=layout,
        batch=batch,
        slopes=_slopes(ops.values(), values),
        roles=Roles(ops),
        folds=folds,
        patterns=composite.patterns,
    )


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _sources(
    graph: fx.Graph, looked_up: Mapping[fx.Node, Lookup], attribute: Sequence[str]
) -> dict[fx.Node, str]:
    """Floating inputs, and what integer ones look up."""
    found = dict(named(looked_up))
    for node in graph.find_nodes(op="placeholder"):
        if is_floating(node.meta.get("val")):
            found[node] = node.name
    asked = {n for n in found.values() if any(fnmatch.fnmatchcase(n, g) for g in attribute)}
    if "inputs" not in attribute and asked:
        return {node: name for node, name in found.items() if name in asked}
    return found


def _independent(graph: fx.Graph, sources: Mapping[fx.Node, str]) -> UnsupportedError:
    if not sources:
        return UnsupportedError(
            "the model has no input that could get a relevance",
            hint="inputs are floating tensors, or integer ones that an embedding looks up",
        )
    names = ", ".join(sorted(set(sources.values())))
    return UnsupportedError(
        f"no output of the model depends on what shall be explained ({names})",
        hint="does forward detach, compare or round on the way?",
    )


def _parameters(graph: fx.Graph, tensors: Mapping[str, Any]) -> set[fx.Node]:
    nodes = graph.find_nodes(op="get_attr")
    return {n for n in nodes if isinstance(tensors.get(str(n.target)), torch.nn.Parameter)}


def _closure(graph: fx.Graph, start: set[fx.Node], inside: set[fx.Node]) -> set[fx.Node]:
    """Floating constants that depend on some of them."""
    return carrying(graph, start) - inside if start else set()


def _named(
    graph: fx.Graph,
    attribute: Sequence[str],
    sources: Mapping[fx.Node, str],
    inside: set[fx.Node],
) -> tuple[dict[str, fx.Node], set[fx.Node]]:
    """Values and parameters that were asked for by name."""
    parameters = {str(n.target): n for n in graph.find_nodes(op="get_attr") if _is_tensor(n)}
    values = {n.name: n for n in graph.nodes if n in inside}
    inputs = set(sources.values())
    named: dict[str, fx.Node] = {}
    for asked in attribute:
        glob = asked.removeprefix("node:")
        if asked == "parameters":
            named |= parameters
        if asked in ("inputs", "parameters") or any(fnmatch.fnmatchcase(n, glob) for n in inputs):
            continue
        found = {
            name: node
            for name, node in (parameters | values).items()
            if fnmatch.fnmatchcase(name, glob)
        }
        if not found:
            known = [*inputs, *parameters, *values]
            raise UsageError(
                f"nothing that carries relevance is called {asked!r}",
                hint=suggest(asked, known) or "ask for inputs, parameters, or names of nodes",
            )
        named |= found
    return named, {n for n in named.values() if n.op == "get_attr"}


def _outer(
    named: Mapping[str, fx.Node], inner: frozenset[fx.Node], attribute: Sequence[str]
) -> dict[str, fx.Node]:
    """What was asked for, less what a glob fits inside of operations: no relevance arrives there.

    Raises:
        UsageError: Something inside of an operation was asked for by its own name.
    """
    for name, node in named.items():
        if node in inner and (name in attribute or f"node:{name}" in attribute):
            raise UsageError(
                f"{name!r} is a part of an operation, inside of which there is no relevance",
                node=node,
                hint="ask for the operation's result, or what it reads",
            )
    return {name: node for name, node in named.items() if node not in inner}


def _is_tensor(node: fx.Node) -> bool:
    return is_floating(node.meta.get("val"))


@torch.no_grad()
def values_of(
    graph: fx.Graph,
    tensors: Mapping[str, Any],
    inputs: Sequence[Tensor],
    known: Mapping[fx.Node, Any] | None = None,
) -> dict[fx.Node, Any]:
    """The value of each node in one run of a forward graph.

    Args:
        graph: The graph.
        tensors: What its ``get_attr`` nodes hold, by target.
        inputs: Values of its placeholders.
        known: Values that an earlier run of these inputs gave.
    """
    given = iter(inputs)
    known = known or {}
    values: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = next(given)
        elif node.op == "get_attr":
            values[node] = tensors[str(node.target)]
        elif node.op == "call_function" and node in known:
            values[node] = known[node]
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return values


@torch.no_grad()
def _layouts(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    sources: Mapping[fx.Node, Lookup | None],
    needed: Sequence[fx.Node],
) -> tuple[fx.Node | None, Mapping[fx.Node, Layout]]:
    """The batch's placeholder and where it lies in each value.

    Where the samples are mixed in one of the values that need it, all of them are one.
    """
    batch = next((n for n in graph.find_nodes(op="placeholder") if values[n].ndim), None)
    if batch is not None:
        samples = values[batch].shape[0]
        runs = []
        for sample in range(min(samples, 2)):
            mark = functools.partial(poisoned, sample=sample, samples=samples)
            start = {
                node: mark(values[node]) if how is None else marked(how, values, values[node], mark)
                for node, how in sources.items()
            }
            runs.append(spread(graph, values, start))
        found = layouts(runs, samples) if samples > 1 else {}
        if all(node in found for node in needed):
            return batch, found
    return None, _Whole()


class _Whole(dict[fx.Node, Layout]):
    """Every value belongs to one sample."""

    def __contains__(self, node: object) -> bool:
        return True

    def __missing__(self, node: fx.Node) -> Layout:
        return WHOLE


def _slopes(ops: Any, values: Mapping[fx.Node, Any]) -> dict[Op, float]:
    """Derivatives at zero of the activations that give zero for zero."""
    found: dict[Op, float] = {}
    for op in ops:
        if op.family is Family.ACTIVATION and not is_getitem(op.node) and len(op.operands) == 1:
            slope = _slope(op, values)
            if slope is not None:
                found[op] = slope
    return found


def _slope(op: Op, values: Mapping[fx.Node, Any]) -> float | None:
    (operand,) = op.operands
    leaf = torch.zeros_like(values[operand]).requires_grad_()
    with torch.enable_grad():
        result = op.run(lambda n: leaf if n is operand else values[n])
    if not isinstance(result, Tensor) or bool(result.any()) or not result.requires_grad:
        return 0.0 if isinstance(result, Tensor) and not bool(result.any()) else None
    (grad,) = torch.autograd.grad(result.sum(), leaf)
    slope = grad.flatten()[0]
    same = bool((grad == slope).all()) and bool(slope.isfinite())
    return float(slope) if same else None
