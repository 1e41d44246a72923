"""FX graphs as plain JSON data and back: no pickle, no ``eval``, no imports on behalf of a file.

Ops are written by name.  Reading back resolves only what is known: ATen and prims ops, the
higher-order ops that `torch.export` makes, arithmetic on sizes, functions that were registered with
`register_function`, and ops of third-party libraries that are registered in this process already.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph import CodeGen

from graphopt.errors import FileFormatError, UnsupportedError
from graphopt.ir.graphs import assign, lookup
from graphopt.ir.literals import Tie
from graphopt.ir.mode import ModeSwitch
from graphopt.ir.targets import (
    class_name,
    encode_target,
    register_function,
    resolve_class,
    resolve_target,
)

__all__ = [
    "Decoder",
    "decode_graph",
    "encode_graph",
    "encode_module",
    "encode_value",
    "register_function",
]

_ATTRIBUTES = (torch.dtype, torch.layout, torch.memory_format)

Json = Any


# -- values ----------------------------------------------------------------------------------------


def encode_value(value: Any) -> Json:
    """A value as JSON data.

    Raises:
        UnsupportedError: There is no form for it.
    """
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": [class_name(type(value)), value.name]}
    if isinstance(value, (int, float, complex)):
        return _encode_number(value)
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, torch.Size):
        return {"size": [encode_value(v) for v in value]}
    if isinstance(value, list):
        return [encode_value(v) for v in value]
    if isinstance(value, (tuple, set, frozenset)):
        kind = "tuple" if isinstance(value, tuple) else type(value).__name__
        return {kind: [encode_value(v) for v in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode_value(k), encode_value(v)] for k, v in value.items()]}
    return _encode_torch(value)


def _encode_number(value: complex) -> Json:
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if isinstance(value, complex):
        return {"complex": [encode_value(value.real), encode_value(value.imag)]}
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        raise UnsupportedError("a symbolic number outside of the graph can't be saved")
    return value


def _encode_torch(value: Any) -> Json:
    if isinstance(value, _ATTRIBUTES):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, slice):
        return {"slice": [encode_value(v) for v in (value.start, value.stop, value.step)]}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return {"ellipsis": True}
    if isinstance(value, type):
        return {"class": class_name(value)}
    if isinstance(value, Tie):
        return {"tie": [value.source, value.kind, value.input]}
    if isinstance(value, ModeSwitch):
        return {"mode": [value.owner, encode_value(value.values)]}
    raise UnsupportedError(f"a value of type {type(value).__name__} can't be saved: {value!r:.100}")


class Decoder:
    """Reads values and graphs from JSON data.

    Args:
        trust: Resolve any op and class that this process can find.
        nodes: Nodes by name, which values may refer to.
    """

    def __init__(self, *, trust: bool = False, nodes: dict[str, fx.Node] | None = None) -> None:
        self.trust = trust
        self.nodes = nodes or {}

    def value(self, data: Json) -> Any:
        """The value of JSON data.

        Raises:
            FileFormatError: The data is malformed.
        """
        if isinstance(data, list):
            return [self.value(v) for v in data]
        if not isinstance(data, dict):
            return data
        if len(data) != 1:
            raise FileFormatError(f"a value that can't be read: {data!r:.200}")
        ((kind, content),) = data.items()
        reader = getattr(self, f"_{kind}", None) if kind in _KINDS else None
        if reader is None:
            raise FileFormatError(f"a value of unknown kind {kind!r:.100}")
        try:
            return reader(content)
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            raise FileFormatError(f"a {kind} that can't be read: {content!r:.200}") from error

    def _node(self, content: Any) -> fx.Node:
        if content not in self.nodes:
            raise FileFormatError(f"a graph uses {content!r:.100} before it is made")
        return self.nodes[content]

    def _tuple(self, content: Any) -> tuple[Any, ...]:
        return tuple(self.value(v) for v in content)

    def _set(self, content: Any) -> set[Any]:
        return set(self._tuple(content))

    def _frozenset(self, content: Any) -> frozenset[Any]:
        return frozenset(self._tuple(content))

    def _size(self, content: Any) -> torch.Size:
        return torch.Size(self._tuple(content))

    def _dict(self, content: Any) -> dict[Any, Any]:
        return {self.value(k): self.value(v) for k, v in content}

    def _float(self, content: Any) -> float:
        return float(content)

    def _complex(self, content: Any) -> complex:
        return complex(self.value(content[0]), self.value(content[1]))

    def _torch(self, content: Any) -> Any:
        value = getattr(torch, content, None) if isinstance(content, str) else None
        if not isinstance(value, _ATTRIBUTES):
            raise FileFormatError(f"no dtype, layout or memory format: {content!r:.100}")
        return value

    def _device(self, content: Any) -> torch.device:
        return torch.device(content)

    def _slice(self, content: Any) -> slice:
        return slice(*self._tuple(content))

    def _range(self, content: Any) -> range:
        return range(*content)

    def _ellipsis(self, content: Any) -> Any:
        return Ellipsis

    def _class(self, content: Any) -> type:
        return resolve_class(content, trust=self.trust)

    def _enum(self, content: Any) -> enum.Enum:
        cls = resolve_class(content[0], trust=self.trust)
        if not issubclass(cls, enum.Enum):
            raise FileFormatError(f"{content[0]!r:.100} is no enum")
        return cls[content[1]]

    def _tie(self, content: Any) -> Tie:
        source, kind, is_input = content
        if kind not in ("dtype", "device", "device.type") and not _is_finfo(kind):
            raise FileFormatError(f"a tie of unknown kind {kind!r:.100}")
        return Tie(str(source), kind, bool(is_input))

    def _mode(self, content: Any) -> ModeSwitch:
        return ModeSwitch(str(content[0]), self.value(content[1]))

    # -- graphs ------------------------------------------------------------------------------------

    def graph(self, data: Json) -> fx.Graph:
        """The graph of JSON data (see `encode_graph`).

        Raises:
            FileFormatError: The data is malformed.
            UnsafeFileError: It calls something that is not known to be harmless.
        """
        graph = fx.Graph()
        inner = Decoder(trust=self.trust)
        for entry in _expect(data, "nodes", list):
            op, name = _expect(entry, "op", str), _expect(entry, "name", str)
            if not name.isidentifier() or name in inner.nodes:
                raise FileFormatError(f"a node with a bad name: {name!r:.100}")
            if op not in ("placeholder", "get_attr", "call_function", "output"):
                raise FileFormatError(f"a node of unknown kind {op!r:.100}")
            target: Any = _expect(entry, "target", str)
            args = inner.value(entry.get("args", {"tuple": []}))
            kwargs = inner.value(entry.get("kwargs", {"dict": []}))
            if not isinstance(args, tuple) or not isinstance(kwargs, dict):
                raise FileFormatError(f"node {name}: arguments that can't be read")
            _check_names(op, target, kwargs)
            if op == "call_function":
                target = resolve_target(target, trust=self.trust)
            node = graph.create_node(op, target, args, kwargs, name=name)
            inner.nodes[name] = node
            node.meta.update(inner._meta(entry.get("meta", {})))
        if not graph.find_nodes(op="output"):
            raise FileFormatError("a graph without output")
        graph.set_codegen(CodeGen())
        return graph

    def _meta(self, data: Json) -> dict[str, Any]:
        meta = {key: self.value(data[key]) for key in _META if key in data}
        if "nn_module_stack" in data:
            meta["nn_module_stack"] = {path: (path, name) for path, name in data["nn_module_stack"]}
        return meta

    def module(self, data: Json, root: nn.Module) -> fx.GraphModule:
        """A graph module with its sub-graphs; it reads tensors of ``root``.

        Raises:
            FileFormatError: The data is malformed, or a tensor is missing.
        """
        graph = self.graph(_expect(data, "graph", dict))
        holder = nn.Module()
        inner = {k: self.module(v, root) for k, v in data.get("graphs", {}).items()}
        for node in graph.find_nodes(op="get_attr"):
            target = str(node.target)
            try:
                value = inner[target] if target in inner else lookup(root, target)
            except AttributeError:
                raise FileFormatError(f"a graph reads {target!r:.200}, which isn't there") from None
            if not isinstance(value, (torch.Tensor, fx.GraphModule)):
                raise FileFormatError(f"a graph reads {target!r:.200}, which is no tensor")
            assign(holder, target, value)
        return fx.GraphModule(holder, graph)


_KINDS = frozenset(
    name.removeprefix("_")
    for name in vars(Decoder)
    if name.startswith("_") and not name.startswith("__") and name != "_meta"
)
_META = ("stack_trace", "seq_nr", "torch_fn", "mode", "ties", "assign", "constant")


def _is_finfo(kind: Any) -> bool:
    name = str(kind).removeprefix("finfo.")
    return str(kind).startswith("finfo.") and name in (
        "min",
        "max",
        "eps",
        "tiny",
        "resolution",
        "smallest_normal",
    )


def _check_names(op: str, target: str, kwargs: Mapping[Any, Any]) -> None:
    """Refuse names that would be more than a name in the code that torch writes of a graph.

    `torch.fx` writes the names of inputs and keywords as they stand, and those of attributes
    between double quotes, unescaped.
    """
    bad = [key for key in kwargs if not isinstance(key, str) or not key.isidentifier()]
    if op == "placeholder" and not target.isidentifier():
        bad.append(target)
    if op == "get_attr" and (not target.isprintable() or set(target) & set('"\\')):
        bad.append(target)
    if bad:
        raise FileFormatError(f"a name that is no name in Python: {bad[0]!r:.100}")


def _expect(data: Any, key: str, kind: type) -> Any:
    if not isinstance(data, dict) or not isinstance(data.get(key), kind):
        raise FileFormatError(f"{key!r} is missing or no {kind.__name__}")
    return data[key]


def encode_graph(graph: fx.Graph) -> dict[str, Json]:
    """A graph as JSON data; sub-graphs are read as names (see `encode_module`).

    Raises:
        UnsupportedError: A node calls or holds something that can't be saved.
    """
    nodes = []
    for node in graph.nodes:
        entry: dict[str, Json] = {"op": node.op, "name": node.name}
        try:
            entry["target"] = (
                encode_target(node.target) if node.op == "call_function" else str(node.target)
            )
            if node.args:
                entry["args"] = encode_value(tuple(node.args))
            if node.kwargs:
                entry["kwargs"] = encode_value(node.kwargs)
        except UnsupportedError as error:
            raise UnsupportedError(error.message, node=node, hint=error.hint) from error
        entry["meta"] = _encode_meta(node)
        nodes.append(entry)
    return {"nodes": nodes}


def decode_graph(data: Mapping[str, Json], *, trust: bool = False) -> fx.Graph:
    """The graph of JSON data, as `encode_graph` wrote it.

    Raises:
        FileFormatError: The data is malformed.
        UnsafeFileError: It calls something that is not known to be harmless.
    """
    return Decoder(trust=trust).graph(dict(data))


def _encode_meta(node: fx.Node) -> dict[str, Json]:
    meta: dict[str, Json] = {}
    for key in _META:
        if key in node.meta:
            try:
                meta[key] = encode_value(node.meta[key])
            except UnsupportedError:
                if key in ("mode", "ties", "assign", "constant"):
                    raise
    stack = node.meta.get("nn_module_stack")
    if stack:
        meta["nn_module_stack"] = [[str(p), _stack_name(c)] for p, c in stack.values()]
    return meta


def _stack_name(cls: Any) -> str:
    return cls if isinstance(cls, str) else class_name(cls).replace(":", ".")


def encode_module(module: fx.GraphModule) -> dict[str, Json]:
    """A graph module's graph and sub-graphs as JSON data; its tensors are not part of it."""
    graphs = {}
    for node in module.graph.find_nodes(op="get_attr"):
        value = lookup(module, str(node.target))
        if isinstance(value, fx.GraphModule):
            graphs[str(node.target)] = encode_module(value)
    return {"graph": encode_graph(module.graph), "graphs": graphs}
