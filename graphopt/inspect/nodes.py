"""The nodes of a document as plain data, for the views that aren't Python.

Sub-graphs of higher-order ops are laid open: their nodes stand among the others, named
``outer/inner``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.cost.flops import flops
from graphopt.cost.sizes import UnknownSizeError, concrete, output_bytes, tensors_in
from graphopt.errors import user_line_of
from graphopt.inspect.document import Document, Segment, phase_of, scope_of
from graphopt.inspect.text import is_getitem, one_line, short_target, short_type, tensor_type


@dataclass(frozen=True)
class NodeView:
    """One node of a dump.

    Attributes:
        name: Unique name.
        op: ``input``, ``tangent``, ``call`` or ``output``.
        target: The op, such as ``aten.linear``.
        inputs: Names of the nodes read, in argument order.
        state: Paths of the parameters, buffers and constants read.
        literals: The other arguments by position or name, as text.
        type: Such as ``f32[4, 16]``; free sizes by their symbols.
        bytes: Bytes allocated for the example sizes; 0 for views; None where the data decides.
        flops: FLOPs for the example sizes.
        scope: Path of the innermost module.
        module: That module's class.
        phase: ``forward``, ``backward``, or ``recomputed``.
        segment: Title of the segment.
        source: Line of the user's code, or None.
        saved: Bytes of this value that autograd saves for backward.
        saved_for: The nodes that save it.
        shapes: Sizes of each tensor result for the example sizes; None where the data decides.
        dtypes: Their dtypes.
    """

    name: str
    op: str
    target: str = ""
    inputs: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    literals: Mapping[str, str] = field(default_factory=dict)
    type: str = ""
    bytes: int | None = 0
    flops: int = 0
    scope: str = ""
    module: str = ""
    phase: str = "forward"
    segment: str = ""
    source: str | None = None
    saved: int = 0
    saved_for: tuple[str, ...] = ()
    shapes: tuple[tuple[int | None, ...], ...] = ()
    dtypes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        data = dict(self.__dict__)
        data.update(
            inputs=list(self.inputs),
            state=list(self.state),
            literals=dict(self.literals),
            saved_for=list(self.saved_for),
            shapes=[list(shape) for shape in self.shapes],
            dtypes=list(self.dtypes),
        )
        return data


@dataclass(frozen=True)
class Collected:
    """The nodes of a document, and which FX nodes they show.

    Attributes:
        views: All nodes in order, inputs first and outputs last.
        names: FX node -> name, for calls.
        nodes: Name -> FX node, likewise.
    """

    views: tuple[NodeView, ...]
    names: Mapping[fx.Node, str]
    nodes: Mapping[str, fx.Node]


def node_views(document: Document) -> list[NodeView]:
    """All nodes of a document in order, inputs first and outputs last."""
    return _Collector(document).collect()


def collected(document: Document) -> Collected:
    """The same as `node_views`, with the FX nodes behind them."""
    collector = _Collector(document)
    views = collector.collect()
    return Collected(tuple(views), collector.names, {n: f for f, n in collector.names.items()})


class _Collector:
    """Collects the nodes of all segments under names that are unique in the document."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.nodes: list[NodeView] = []
        self.taken: set[str] = set()
        self.values: dict[str, tuple[str, ...]] = {}
        self.names: dict[fx.Node, str] = {}

    def collect(self) -> list[NodeView]:
        """All nodes."""
        for op, slots in (("input", self.document.inputs), ("tangent", self.document.tangents)):
            for slot in slots:
                name = self._fresh(slot.name)
                self.values[f"{op} {slot.name}"] = (name,)
                kind = tensor_type(slot.shape, slot.dtype)
                phase = "forward" if op == "input" else "backward"
                shapes, dtypes = (tuple(slot.shape),), (dtype_name(slot.dtype),)
                self.nodes.append(
                    NodeView(name, op, type=kind, phase=phase, shapes=shapes, dtypes=dtypes)
                )
        for segment in self.document.segments:
            self._segment(segment)
        return self.nodes

    def _fresh(self, wish: str) -> str:
        unique, count = wish, 1
        while unique in self.taken:
            unique, count = f"{wish}_{count}", count + 1
        self.taken.add(unique)
        return unique

    def _segment(self, segment: Segment) -> None:
        env: dict[fx.Node, tuple[str, ...]] = {}
        state: dict[fx.Node, str] = {}
        for node, binding in segment.bindings.items():
            if binding.kind == "state":
                state[node] = binding.name
            else:
                key = binding.name if binding.kind == "value" else f"{binding.kind} {binding.name}"
                env[node] = self.values[key]
        self._graph(segment, segment.module, env, state, "")
        for result in segment.results:
            value = result.value
            names = env.get(value, ()) if isinstance(value, fx.Node) else ()
            if isinstance(value, str):
                names = self.values.get(value, ())
            if result.kind == "value":
                self.values[result.name] = names
            else:
                owner = (state[value],) if isinstance(value, fx.Node) and value in state else ()
                label = self._fresh(f"{result.kind} {result.name}")
                phase = "backward" if result.kind == "gradient" else "forward"
                self.nodes.append(
                    NodeView(label, "output", "", names, owner, phase=phase, segment=segment.title)
                )

    def _graph(
        self,
        segment: Segment,
        module: fx.GraphModule,
        env: dict[fx.Node, tuple[str, ...]],
        state: dict[fx.Node, str],
        prefix: str,
    ) -> tuple[str, ...]:
        modules: dict[fx.Node, fx.GraphModule] = {}
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value: Any = module
                for part in str(node.target).split("."):
                    value = getattr(value, part)
                if isinstance(value, fx.GraphModule):
                    modules[node] = value
                else:
                    state[node] = str(node.target)
            elif node.op == "output":
                return tuple(n for source in node.all_input_nodes for n in env.get(source, ()))
            elif node.op != "placeholder":
                inner = [modules[n] for n in node.all_input_nodes if n in modules]
                names = self._inner(segment, node, inner, env, state, prefix)
                env[node] = (self._add(segment, node, names, env, state, prefix),)
        return ()

    def _inner(
        self,
        segment: Segment,
        node: fx.Node,
        modules: list[fx.GraphModule],
        env: dict[fx.Node, tuple[str, ...]],
        state: dict[fx.Node, str],
        prefix: str,
    ) -> tuple[str, ...]:
        """Lay the sub-graphs of a node open; gives the names that their results go by."""
        results: list[str] = []
        for inner in modules:
            holders = inner.graph.find_nodes(op="placeholder")
            operands = _operands(node, len(holders))
            inside = {h: env.get(o, ()) for h, o in zip(holders, operands, strict=False)}
            tensors = {h: state[o] for h, o in zip(holders, operands, strict=False) if o in state}
            results += self._graph(segment, inner, inside, tensors, f"{prefix}{node.name}/")
        return tuple(results)

    def _add(
        self,
        segment: Segment,
        node: fx.Node,
        inner: tuple[str, ...],
        env: Mapping[fx.Node, tuple[str, ...]],
        state: Mapping[fx.Node, str],
        prefix: str,
    ) -> str:
        inputs = [n for source in node.all_input_nodes for n in env.get(source, ())]
        path, cls = scope_of(node)
        saved = self.document.saved
        held = saved.of(node) if saved is not None and not prefix else None
        own = held is not None and held.name == node.name
        name = self.names[node] = self._fresh(prefix + node.name)
        tensors = list(tensors_in(node.meta.get("val")))
        view = NodeView(
            name,
            "call",
            short_target(node),
            tuple(dict.fromkeys([*inputs, *inner])),
            tuple(state[source] for source in node.all_input_nodes if source in state),
            _literals(node),
            short_type(node.meta.get("val")),
            bytes_of(node),
            0 if inner else flops(node),
            path,
            cls,
            phase_of(segment, node),
            segment.title,
            user_line_of(node),
            held.bytes if own and held is not None else 0,
            held.savers if own and held is not None else (),
            tuple(_sizes(tensor) for tensor in tensors),
            tuple(dtype_name(tensor.dtype) for tensor in tensors),
        )
        self.nodes.append(view)
        return name


def dtype_name(dtype: torch.dtype) -> str:
    """``float32``."""
    return str(dtype).removeprefix("torch.")


def _sizes(tensor: torch.Tensor) -> tuple[int | None, ...]:
    def known(size: Any) -> int | None:
        try:
            return concrete(size)
        except UnknownSizeError:
            return None

    return tuple(known(size) for size in tensor.shape)


def _operands(node: fx.Node, count: int) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(node.args, lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found[-count:] if count else []


def _literals(node: fx.Node) -> dict[str, str]:
    found = {}
    for key, value in [*enumerate(node.args), *node.kwargs.items()]:
        if not isinstance(value, fx.Node):
            found[str(key)] = one_line(value)
    return found


def bytes_of(node: fx.Node) -> int | None:
    """Bytes that a call allocates for its results; None where that depends on the data."""
    if is_getitem(node) or next(tensors_in(node.meta.get("val")), None) is None:
        return 0
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return 0  # its sub-graph's nodes say what they allocate
    try:
        return sum(output_bytes(node))
    except UnknownSizeError:
        return None
