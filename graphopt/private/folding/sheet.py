"""A graph under folding: what is known of its nodes, and how rules change them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.ops import is_effectful, is_random
from graphopt.ir.sharing import gives_only_aliases
from graphopt.ir.skeleton import ADDED
from graphopt.private.folding.affine import Affine, Sources
from graphopt.private.folding.linear import Linear

aten = torch.ops.aten

Form = Affine | Linear


@dataclass(frozen=True, eq=False)
class Known:
    """A value that depends on no input.

    Attributes:
        value: It; floating values in float64.
        sources: The parameters and buffers that it is made of.
        tied: Whether a literal in its making follows the module's dtype or device.
    """

    value: Tensor
    sources: Sources
    tied: bool = False


def folded(*_: Any) -> Any:
    """Stands in the graph for an op that a rule has changed, until `emit` writes it in ATen."""
    raise AssertionError("never runs")


@dataclass
class Sheet:
    """A graph under folding.

    Attributes:
        module: The graph, in eval mode.
        known: Values of nodes that depend on no input.
        lists: Values of such nodes that give several.
        forms: What is known of nodes: linear operators, scales and shifts.
        places: Which argument of a node is the value that its form is applied to.
        public: Names of public parameters and buffers, with ``*``.
        barred: Nodes that share memory with something that is written to, and their readers.
    """

    module: fx.GraphModule
    known: dict[fx.Node, Known] = field(default_factory=dict)
    lists: dict[fx.Node, list[Known]] = field(default_factory=dict)
    forms: dict[fx.Node, Form] = field(default_factory=dict)
    places: dict[fx.Node, int] = field(default_factory=dict)
    public: tuple[str, ...] = ()
    barred: set[fx.Node] = field(default_factory=set)

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph

    def nodes(self) -> Iterator[fx.Node]:
        """Computing nodes that may be changed, in order; erased ones are passed over."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and not node._erased and node not in self.barred:
                yield node

    def linear(self, node: Any) -> Linear | None:
        """The linear operator that a node is."""
        form = self.forms.get(node)
        return form if isinstance(form, Linear) else None

    def affine(self, node: Any) -> Affine | None:
        """The scale and shift that a node is."""
        form = self.forms.get(node)
        return form if isinstance(form, Affine) else None

    def data(self, node: fx.Node) -> fx.Node:
        """What a node's form is applied to."""
        found = node.args[self.places[node]]
        assert isinstance(found, fx.Node)
        return found

    def note(self, node: fx.Node, form: Form, place: int) -> None:
        """Note what a node is as it stands."""
        self.forms[node], self.places[node] = form, place

    def change(self, node: fx.Node, form: Form, data: fx.Node) -> None:
        """Make another op of a node."""
        node.target, node.args, node.kwargs = folded, (data,), {}
        node.meta.pop("ties", None)
        self.note(node, form, 0)

    def add(self, before: fx.Node, form: Form, data: fx.Node) -> fx.Node:
        """A new op in front of a node, with a value like that of its data."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(folded, (data,))
        copied = ("stack_trace", "nn_module_stack")
        node.meta = {k: v for k, v in before.meta.items() if k in copied}
        node.meta["val"] = data.meta["val"]
        self.note(node, form, 0)
        return node

    def replace(self, node: fx.Node, by: fx.Node) -> None:
        """Put a node in another's place."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        self.forms.pop(node, None)

    def is_public(self, sources: Sources) -> bool:
        """Whether all that a number is made of is known to both parties."""
        return all(any(fnmatchcase(name, p) for p in self.public) for name in sources)

    def takes(self, one: Sources, other: Sources) -> bool:
        """Whether a number may take in another one: a public one takes no secret.

        Coefficients that a pass added may be public where weights are secret, so they take no
        weights either.
        """
        if self.is_public(one):
            return self.is_public(other)
        return not all(_added(name) for name in one) or all(_added(name) for name in other)

    def composes(self, second: Affine, first: Affine) -> bool:
        """Whether a scale and shift and the one after it are better written as one.

        Not where a public scale would take in a secret shift: the product, free for the parties,
        would become one of secrets.
        """
        if not second.fits(first):
            return False
        if second.scales == first.scales:
            return True
        scaling, shifting = (second, first) if second.scales else (first, second)
        return self.takes(scaling.sources, shifting.sources)

    def is_private(self, node: Any) -> bool:
        """Whether one op alone reads a node, once."""
        readers = [a for u in node.users for a in _leaves([u.args, u.kwargs]) if a is node]
        return node not in self.barred and len(readers) == 1

    def sweep(self) -> None:
        """Drop what nobody reads."""
        self.graph.eliminate_dead_code(is_impure_node=_stays)


def _added(name: str) -> bool:
    return name.split(".")[0] == ADDED


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _stays(node: fx.Node) -> bool:
    if node.target is folded:
        return False
    return node.op in ("placeholder", "output") or is_effectful(node) or is_random(node)


def barred(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes in memory that something writes to, and what reads them.

    When such a value is read matters, so rules leave these as they are.
    """
    touched: set[fx.Node] = set()
    for node in module.graph.nodes:
        if _writes(node):
            for argument in node.all_input_nodes:
                _spread(argument, touched)
            touched.add(node)
    return touched | {user for node in touched for user in node.users}


def _writes(node: fx.Node) -> bool:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.is_mutable
    return isinstance(target, torch._ops.HigherOrderOperator) and is_effectful(node)


def _spread(node: fx.Node, touched: set[fx.Node]) -> None:
    """Add all that may share memory with a node."""
    if node in touched:
        return
    touched.add(node)
    near = [user for user in node.users if _aliases(user)]
    near += node.all_input_nodes if _aliases(node) else []
    for other in near:
        _spread(other, touched)


def _aliases(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return node.op == "call_function"  # an item of a list of views
    return gives_only_aliases(target) or target._schema.is_mutable


def sizes(node: fx.Node) -> list[int | str]:
    """A value's sizes; free ones as the text of their symbol."""
    return [s if isinstance(s, int) else str(s) for s in node.meta["val"].shape]


def example(shape: Sequence[Any]) -> list[int]:
    """Sizes as numbers, free ones as in the example."""
    return [s if isinstance(s, int) else int(s.node.hint) for s in shape]


def same_kind(one: fx.Node, other: fx.Node) -> bool:
    """Whether two values have the same sizes and dtype."""
    a, b = one.meta.get("val"), other.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return False
    return a.dtype == b.dtype and sizes(one) == sizes(other)
