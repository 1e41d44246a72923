"""From a captured graph to the circuit that an engine runs."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from graphopt.errors import GraphoptError, UnsupportedError, UsageError, first_line, user_line_of
from graphopt.ir.functionalize import functionalize
from graphopt.ir.graphs import copy_graph, lookup
from graphopt.ir.inline import inline_regions
from graphopt.ir.module import OptimizedModule
from graphopt.ir.ops import is_effectful
from graphopt.ir.program import Program
from graphopt.ir.signature import bind
from graphopt.ir.trace import trace
from graphopt.ir.untouched import ordinary, untouched
from graphopt.private import movement
from graphopt.private.builder import Builder, Ids, Plain, Shared
from graphopt.private.circuit import Circuit, Site
from graphopt.private.rules import find_rule

Model = nn.Module | Program | fx.GraphModule


def lower(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    weights: str = "secret",
    public: Sequence[str] = (),
) -> Circuit:
    """Bring a model in eval mode into the form that secure-computation engines run.

    Inputs are secret; integers can be looked up in an embedding, one-hot.  What depends on weights
    alone is computed in the clear by their owner and
    then shared: a batch norm in eval mode is one product and one sum.  Integer and Boolean tensors
    of the model, such as the indices of kept activations, are public, as is the graph.

    Args:
        model: A model, a captured program, or a graph module of ATen ops whose placeholders are
            tensors.
        args: Example positional inputs; their sizes are the circuit's.
        kwargs: Example keyword inputs.
        weights: ``"secret"``: floating parameters and buffers belong to the model's owner and are
            shared; ``"public"``: both parties know them.
        public: Names of inputs, parameters and buffers that are public nevertheless, with ``*``;
            of a public input, the example's values are built in.

    Raises:
        UnsupportedError: Ops have no rule; the message names each with its node and line.
    """
    graph, flat = graph_of(model, tuple(args), dict(kwargs or {}))
    return lower_graph(graph, flat, weights=weights, public=public)


def lower_graph(
    graph: fx.GraphModule,
    flat: Sequence[Any],
    *,
    weights: str = "secret",
    public: Sequence[str] = (),
) -> Circuit:
    """`lower` for a graph as `graph_of` gives it, and its flat inputs."""
    if weights not in ("secret", "public"):
        raise UsageError(f"weights are secret or public, not {weights!r}")
    return _Lowering(graph, weights == "secret", tuple(public)).run(flat)


def graph_of(
    model: Model, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[fx.GraphModule, list[Any]]:
    """The eval-mode graph of a model without in-place ops, and its flat inputs."""
    if isinstance(model, OptimizedModule):
        model = model.program
    if isinstance(model, Program):
        signature = model.eval_signature or model.signature
        return _plain_graph(model.specialize(False)), signature.flatten_inputs(args, kwargs)
    if isinstance(model, fx.GraphModule):
        return _plain_graph(model), list(pytree.tree_leaves((args, kwargs)))
    signature, flat = bind(model, args, kwargs)
    with untouched(model):
        found = trace(model, signature, [ordinary(x) for x in flat], None, training=False)
    return _plain_graph(found.graph), flat


def _plain_graph(module: fx.GraphModule) -> fx.GraphModule:
    """A copy without in-place ops and regions."""
    copied = copy_graph(module)
    changed = 1
    while changed:
        changed = inline_regions(copied)[0] + functionalize(copied)[0]
    copied.graph.eliminate_dead_code(is_impure_node=_stays)
    copied.recompile()
    return copied


def _stays(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or is_effectful(node)


class _Lowering:
    """One walk over a graph."""

    def __init__(self, module: fx.GraphModule, secret: bool, public: tuple[str, ...]) -> None:
        self.module = module
        self.secret = secret
        self.public = public
        self.builder = Builder()
        self.values: dict[fx.Node, Any] = {}
        self.missing: list[tuple[fx.Node, str]] = []

    def run(self, inputs: Sequence[Any]) -> Circuit:
        waiting = iter(enumerate(inputs))
        for node in self.module.graph.nodes:
            self.builder.site = Site(node.name, str(node.target), user_line_of(node))
            if node.op == "placeholder":
                self.values[node] = self._input(node, *next(waiting))
            elif node.op == "get_attr":
                self.values[node] = self._attribute(node)
            elif node.op == "output":
                self._refuse_missing()
                return self._finish(node)
            elif all(n in self.values for n in node.all_input_nodes):
                self._run(node)
        raise UnsupportedError("the graph has no output")

    def _input(self, node: fx.Node, place: int, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if self._is_shown(node.name):
            return Plain(value.detach())
        self.builder.places[node.name] = place
        if not value.is_floating_point():
            return Ids(node.name, tuple(value.shape))
        return self.builder.input(node.name, value.shape)

    def _attribute(self, node: fx.Node) -> Any:
        value = lookup(self.module, str(node.target))
        if not isinstance(value, torch.Tensor):
            return value
        names = node.meta.get("sources") or (str(node.target),)  # of a folded view: all of them
        shown = all(self._is_shown(name) for name in names)
        secret = value.is_floating_point() and self.secret and not shown
        return Plain(value.detach(), secret)

    def _is_shown(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.public)

    def _run(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.values.__getitem__)
        given = pytree.tree_leaves((args, kwargs))
        try:
            _refuse_writes(node)
            known = not any(isinstance(v, (Shared, Ids)) for v in given)
            if known or _reads_sizes_only(node.target):
                self.values[node] = _in_the_clear(node, args, kwargs)
            else:
                self.values[node] = self._on_secrets(node, args, kwargs)
        except (GraphoptError, TypeError, AttributeError, RuntimeError, IndexError) as error:
            why = error.message if isinstance(error, GraphoptError) else first_line(error)
            self.missing.append((node, why))  # whatever reads it is left out as well

    def _on_secrets(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        found = find_rule(target)
        held = [v.name for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Ids)]
        if held and getattr(target, "overloadpacket", None) not in movement.TAKES_IDS:
            raise UnsupportedError(
                f"the integer input {held[0]!r} is secret: it can only be looked up in an "
                "embedding, unless it is named as public"
            )
        if found is not None:
            kept = {k: v for k, v in kwargs.items() if k not in _LAYOUT}
            return found(self.builder, *args, **kept)
        if target is operator.getitem:
            return args[0][args[1]]
        raise UnsupportedError("no rule for it")

    def _refuse_missing(self) -> None:
        if not self.missing:
            return
        lines = [
            f"{node.name}: {node.target}: {why} (at {user_line_of(node) or 'an unknown line'})"
            for node, why in self.missing
        ]
        raise UnsupportedError(
            f"{len(lines)} ops can't run on secret values:\n  " + "\n  ".join(lines),
            node=self.missing[0][0],
            hint="replace them in the model, or register a rule with graphopt.private.rules.rule",
        )

    def _finish(self, node: fx.Node) -> Circuit:
        results = pytree.tree_leaves(fx.map_arg(node.args[0], self.values.__getitem__))
        tensors = [value for value in results if isinstance(value, (Shared, Plain))]
        return self.builder.circuit([self.builder.shared(value).name for value in tensors])


_LAYOUT = frozenset({"memory_format", "device", "layout", "pin_memory", "non_blocking", "copy"})


def _refuse_writes(node: fx.Node) -> None:
    if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
        raise UnsupportedError("a write into a tensor that others may see")


def _reads_sizes_only(target: Any) -> bool:
    return getattr(target, "overloadpacket", None) in movement.SHAPE_ONLY


def _in_the_clear(node: fx.Node, args: Any, kwargs: Any) -> Any:
    secret = any(isinstance(v, Plain) and v.secret for v in pytree.tree_leaves((args, kwargs)))
    target: Any = node.target

    def concrete(value: Any) -> Any:
        if isinstance(value, Ids):
            return torch.zeros(value.shape, dtype=torch.long)
        if isinstance(value, Shared):
            return torch.zeros(value.shape)
        return value.tensor if isinstance(value, Plain) else value

    args, kwargs = pytree.tree_map(concrete, (args, kwargs))
    with torch.no_grad():
        result = target(*args, **kwargs)
    sizes_only = _reads_sizes_only(target)
    return pytree.tree_map(
        lambda v: Plain(v, secret and not sizes_only) if isinstance(v, torch.Tensor) else v, result
    )
