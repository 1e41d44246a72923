"""What is decided about a graph before relevance is handed back through it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.ir.interpret import fill, held_in, placed
from graphopt.passes.relevance import attributed, regions
from graphopt.passes.relevance.composite import Composite, depths, path_of
from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.folding import folded
from graphopt.passes.relevance.ops import Op, carrying, operations, wanted
from graphopt.passes.relevance.origins import Origin, origins
from graphopt.passes.relevance.prepare import lowered
from graphopt.passes.relevance.roles import Roles
from graphopt.passes.relevance.rules import Rule
from graphopt.passes.relevance.samples import WHOLE, Layout, layouts, mixed, poisoned, spread
from graphopt.passes.relevance.tokens import Lookup, lookups, marked


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
        origins: What activations are at zero, where that is a number.
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
    origins: Mapping[Op, Origin]
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
    sources = attributed.sources(graph, looked_up, attribute)
    given = values_of(graph, tensors, inputs)
    results, inside = _way(graph, sources, given, choose)
    named = attributed.values(graph, attribute, sources, inside)
    parameters = {n for n in named.values() if n.op == "get_attr"}
    followed = _closure(graph, parameters, inside)
    ops, inner = _operations(graph, inside, followed)
    named = attributed.outside(named, inner, attribute)
    folds, rules = folded(ops, _rules(ops, composite), {*named.values(), *results})
    values = values_of(graph, tensors, inputs, known=given)  # decomposed calls have new values
    sources = {n: name for n, name in sources.items() if n in inside}
    looked_up = {n: found for n, found in looked_up.items() if n in sources}
    laid_out = [n for n, op in ops.items() if n in inside and op.family is not Family.ROUTE]
    starts = {s: looked_up.get(s) for s in sources}
    batch, layout = _layouts(graph, values, starts, [*results, *sources, *laid_out], inside)
    return Plan(
        graph=graph,
        outputs=results,
        ops=ops,
        interior=inner,
        rules=rules,
        sources=sources,
        lookups=looked_up,
        followed=frozenset(followed),
        parametric=frozenset(_closure(graph, _parameters(graph, tensors), inside)),
        named=named,
        layouts=layout,
        batch=batch,
        origins=origins(ops.values(), values),
        roles=Roles(ops),
        folds=folds,
        patterns=composite.patterns,
    )


def _way(
    graph: fx.Graph,
    sources: Mapping[fx.Node, str],
    values: Mapping[fx.Node, Any],
    choose: Callable[[Sequence[Any]], Sequence[int]],
) -> tuple[tuple[fx.Node, ...], set[fx.Node]]:
    """The results that are explained, and the values between them and the sources.

    What lies there and has no rule is decomposed.
    """
    explained = choose([values[n] if isinstance(n, fx.Node) else n for n in _results(graph)])
    lowered(graph, explained, sources)
    inside = carrying(graph, sources)
    results = [n for n in dict.fromkeys(_results(graph)[i] for i in explained) if n in inside]
    if not results:
        raise _independent(sources)
    return tuple(results), wanted(results, inside)


def _operations(
    graph: fx.Graph, inside: set[fx.Node], followed: set[fx.Node]
) -> tuple[dict[fx.Node, Op], frozenset[fx.Node]]:
    """Operations by the call that gives the result, and the calls that are run inside of them."""
    merged = regions.centred(graph, inside) | regions.activations(graph, inside)
    merged |= regions.complex_maps(graph, inside)
    inner = regions.interior(graph, merged)
    found = {op.node: op for op in operations(graph, inside, merged, inner)}
    # a followed constant stays a constant to what reads it: it gets a relevance on the side
    found |= {op.node: op for op in operations(graph, followed, {}, frozenset())}
    return {node: found[node] for node in graph.nodes if node in found}, inner


def _rules(ops: Mapping[fx.Node, Op], composite: Composite) -> dict[Op, Rule]:
    ends = depths(list(ops.values()))
    return {
        op: composite.rule(op, path_of(op.node), ends.get(op, frozenset())) for op in ops.values()
    }


def _results(graph: fx.Graph) -> list[Any]:
    return list(graph.output_node().args[0])  # type: ignore[arg-type]


def _independent(sources: Mapping[fx.Node, str]) -> UnsupportedError:
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
    values = placed(graph, inputs)
    values.update((node, known[node]) for node in graph.nodes if known and node in known)
    fill(values, graph.nodes, held_in(tensors))
    return values


@torch.no_grad()
def _layouts(
    graph: fx.Graph,
    values: Mapping[fx.Node, Any],
    sources: Mapping[fx.Node, Lookup | None],
    needed: Sequence[fx.Node],
    inside: Collection[fx.Node],
) -> tuple[fx.Node | None, Mapping[fx.Node, Layout]]:
    """The batch's placeholder and where it lies in each value.

    Where the samples are mixed in one of the values that need it, or read constants that lie among
    each other's places, all of them are one.
    """
    batch = next((n for n in graph.find_nodes(op="placeholder") if values[n].ndim), None)
    if batch is not None:
        samples = values[batch].shape[0]
        starts = [_poisoned(values, sources, i, samples) for i in range(min(samples, 2))]
        runs = [spread(graph, values, start) for start in starts]
        found = layouts(runs, samples, values) if samples > 1 else {}
        between = {node: layout for node, layout in found.items() if node in inside}
        if all(node in found for node in needed) and not any(
            mixed(graph, values, start, between, i, samples) for i, start in enumerate(starts)
        ):
            return batch, found
    return None, _Whole()


def _poisoned(
    values: Mapping[fx.Node, Any],
    sources: Mapping[fx.Node, Lookup | None],
    sample: int,
    samples: int,
) -> dict[fx.Node, Tensor]:
    """Sources with NaN in one sample."""
    mark = functools.partial(poisoned, sample=sample, samples=samples)
    return {
        node: mark(values[node]) if how is None else marked(how, values, values[node], mark)
        for node, how in sources.items()
    }


class _Whole(dict[fx.Node, Layout]):
    """Every value belongs to one sample."""

    def __contains__(self, node: object) -> bool:
        return True

    def __missing__(self, node: fx.Node) -> Layout:
        return WHOLE
