"""The nodes of a graph in the form in which two graphs are compared.

An `Entry` says what a node does apart from what it is called: its op, its arguments with numbered
gaps where it reads other nodes, and what stands in the gaps.  Nodes of sub-graphs stand among the
others under ``outer/inner``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from graphopt.errors import FileFormatError, user_line_of
from graphopt.inspect.document import Segment, phase_of, scope_of
from graphopt.inspect.nodes import bytes_of
from graphopt.inspect.schema import SCHEMA_VERSION
from graphopt.inspect.text import one_line, short_target, short_type, tensor_type
from graphopt.ir.graphs import lookup

if TYPE_CHECKING:
    from graphopt.inspect.document import Document

_SYMBOL = re.compile(r"\b[su]\d+\b")
_GAP = re.compile(r"%(\d+)")
_WORD = re.compile(r"[A-Za-z_][\w/]*")


@dataclass(frozen=True)
class Entry:
    """One node, or one input or output, of a graph to be compared.

    Attributes:
        name: Its name, unique in the graph.
        op: ``input``, ``tangent``, ``call`` or ``output``.
        target: The op, overload included, such as ``aten.add.Tensor``.
        arguments: Its arguments as text, ``%0``, ``%1``, ... where nodes are read.
        operands: Names of the entries that stand there.
        state: Paths of the parameters, buffers and constants read.
        type: Such as ``f32[s0, 16]``; symbols are numbered by first appearance.
        bytes: Bytes allocated for the example sizes; None where the data decides.
        scope: Path of the innermost module.
        module: That module's class.
        phase: ``forward``, ``backward`` or ``recomputed``.
        source: Line of the user's code, or None.
        node: The FX node, where the graph is at hand.
    """

    name: str
    op: str
    target: str = ""
    arguments: str = ""
    operands: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    type: str = ""
    bytes: int | None = 0
    scope: str = ""
    module: str = ""
    phase: str = "forward"
    source: str | None = None
    node: fx.Node | None = field(default=None, compare=False, repr=False)

    def text(self) -> str:
        """As one line of Python-like text: ``relu = aten.relu.default(linear)``."""
        inside = _GAP.sub(lambda gap: self.operands[int(gap[1])], self.arguments)
        if self.op in ("input", "tangent"):
            return f"{self.name}: {self.op}"
        if self.op == "output":
            return f"{self.name} = {inside}"
        return f"{self.name} = {self.target}({inside})"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        data = {key: value for key, value in vars(self).items() if key != "node"}
        return {**data, "operands": list(self.operands), "state": list(self.state)}


@dataclass(frozen=True)
class Tensor:
    """A parameter, buffer or constant: its type, and its value where it is at hand."""

    type: str
    value: torch.Tensor | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class Listing:
    """A graph to be compared.

    Attributes:
        entries: Its nodes in order, inputs first.
        state: The parameters, buffers and constants that it reads, by path.
    """

    entries: tuple[Entry, ...]
    state: Mapping[str, Tensor]


def listing(document: Document, *, folded: bool = False) -> Listing:
    """The entries of a document.

    Args:
        document: A program, joint graph or plan.
        folded: Keep a sub-graph in one piece, as a part of the node that runs it.
    """
    return _Lister(folded).listed(document)


def listing_of_dump(data: Any) -> Listing:
    """The entries of a JSON dump; what nodes hold in their tensors isn't in it.

    Raises:
        FileFormatError: It isn't one.
    """
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        raise FileFormatError(
            f"not a JSON dump of a graph of schema version {SCHEMA_VERSION}, "
            + ("but of no version" if version is None else f"but of version {version!r}"),
            hint="`graphopt dump -f json` and `optimize --dump-dir` write them",
        )
    try:
        if len(data.get("snapshots", ())) > 1:
            raise ValueError("it holds several states of a program, not one graph")
        state = {
            str(path): Tensor(f"{slot['dtype']}{list(slot['shape'])}")
            for path, slot in data["state"].items()
        }
        symbols, sources = _Symbols(), list(data.get("sources", ()))
        entries = tuple(_dumped(node, sources, symbols) for node in data["nodes"])
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise FileFormatError(
            f"not a JSON dump of a graph: {type(error).__name__}: {error}",
            hint="`graphopt dump -f json` and `optimize --dump-dir` write them",
        ) from None
    return Listing(entries, state)


def _dumped(node: Mapping[str, Any], sources: list[Any], symbols: _Symbols) -> Entry:
    """An entry of a node; what a dump leaves out is empty there."""
    inputs = tuple(str(name) for name in node["inputs"])
    place = {name: f"%{index}" for index, name in enumerate(inputs)}
    pairs = node.get("literals", {}).items()
    literals = symbols(", ".join(f"{key}={_plain(value)}" for key, value in pairs))
    arguments = _WORD.sub(lambda word: place.get(word[0], word[0]), literals)
    found = {gap[0] for gap in _GAP.finditer(arguments)}
    missing = [gap for gap in place.values() if gap not in found]
    reads = [f"state[{_plain(repr(path))}]" for path in node["state"]]
    line = node.get("source")
    return Entry(
        str(node["name"]),
        str(node["op"]),
        str(node.get("target", "")),
        ", ".join([*missing, *reads, *([arguments] if arguments else [])]),
        inputs,
        tuple(map(str, node["state"])),
        symbols(str(node.get("type", ""))),
        node.get("bytes", 0),
        str(node.get("scope", "")),
        str(node.get("module", "")),
        str(node.get("phase", "forward")),
        sources[line] if isinstance(line, int) else line,
    )


class _Symbols:
    """Numbers the symbols of free sizes by first appearance."""

    def __init__(self) -> None:
        self.names: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        return _SYMBOL.sub(lambda m: self.names.setdefault(m[0], f"s{len(self.names)}"), text)


class _Lister:
    """Lists the entries of a document."""

    def __init__(self, folded: bool) -> None:
        self.folded = folded
        self.symbols = _Symbols()
        self.entries: list[Entry] = []
        self.taken: set[str] = set()
        self.values: dict[str, str] = {}
        self.state: dict[str, Tensor] = {}

    def listed(self, document: Document) -> Listing:
        """The entries of all segments."""
        for op, slots in (("input", document.inputs), ("tangent", document.tangents)):
            for slot in slots:
                name = self._fresh(slot.name)
                self.values[f"{op} {slot.name}"] = name
                phase = "forward" if op == "input" else "backward"
                kind = tensor_type(slot.shape, slot.dtype)
                self.entries.append(Entry(name, op, type=kind, phase=phase))
        for segment in document.segments:
            self._segment(segment)
        return Listing(tuple(self.entries), self.state)

    def _fresh(self, wish: str) -> str:
        unique, count = wish, 1
        while unique in self.taken:
            unique, count = f"{wish}_{count}", count + 1
        self.taken.add(unique)
        return unique

    def _segment(self, segment: Segment) -> None:
        env: dict[fx.Node, Any] = {}
        for node, binding in segment.bindings.items():
            if binding.kind == "state":
                env[node] = _Read(binding.name)
                self._note(binding.name, node.meta.get("val"))
            else:
                key = binding.name if binding.kind == "value" else f"{binding.kind} {binding.name}"
                env[node] = self.values[key]
        self._graph(segment, segment.module, env, "")
        for result in segment.results:
            value = result.value
            if result.kind == "value":
                found = self.values.get(value) if isinstance(value, str) else env.get(value)
                if isinstance(found, str):
                    self.values[result.name] = found
                continue
            if isinstance(value, str):  # a value that an earlier segment made
                template, operands, state = "%0", (self.values[value],), ()
            else:
                template, operands, state = self._arguments((value,), {}, env)
            label = self._fresh(f"{result.kind} {result.name}")
            phase = "backward" if result.kind == "gradient" else "forward"
            self.entries.append(Entry(label, "output", "", template, operands, state, phase=phase))

    def _note(self, path: str, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            kind = tensor_type(tuple(value.shape), value.dtype)
            plain = not isinstance(value, torch._subclasses.FakeTensor)
            self.state.setdefault(path, Tensor(kind, value.detach() if plain else None))

    def _graph(
        self, segment: Segment, module: fx.GraphModule, env: dict[fx.Node, Any], prefix: str
    ) -> list[Any]:
        for node in module.graph.nodes:
            if node.op == "get_attr":
                value = lookup(module, str(node.target))
                env[node] = value if isinstance(value, fx.GraphModule) else _Read(str(node.target))
                self._note(str(node.target), value)
            elif node.op == "output":
                value = node.args[0]
                return list(value) if isinstance(value, (list, tuple)) else [value]
            elif node.op != "placeholder":
                env[node] = self._add(segment, node, env, prefix)
        return []

    def _add(self, segment: Segment, node: fx.Node, env: dict[fx.Node, Any], prefix: str) -> str:
        graphs = [env[n] for n in node.all_input_nodes if isinstance(env.get(n), fx.GraphModule)]
        inner: list[str] = []
        for graph in () if self.folded else graphs:
            inner += self._inner(segment, node, graph, env, prefix)
        template, operands, state = self._arguments(node.args, node.kwargs, env)
        if inner:
            gaps = ", ".join(f"%{len(operands) + index}" for index in range(len(inner)))
            template, operands = f"{template} -> [{gaps}]", (*operands, *inner)
        elif self.folded:
            template += "".join(f" {{{_text(graph, self.symbols)}}}" for graph in graphs)
        path, cls = scope_of(node)
        name = self._fresh(prefix + node.name)
        entry = Entry(
            name,
            "call",
            _target(node),
            template,
            operands,
            state,
            self.symbols(short_type(node.meta.get("val"))),
            bytes_of(node),
            path,
            cls,
            phase_of(segment, node),
            user_line_of(node),
            node,
        )
        self.entries.append(entry)
        return name

    def _inner(
        self,
        segment: Segment,
        node: fx.Node,
        module: fx.GraphModule,
        env: Mapping[fx.Node, Any],
        prefix: str,
    ) -> list[str]:
        """Lay a sub-graph open; gives the names of its results."""
        holders = module.graph.find_nodes(op="placeholder")
        given: list[fx.Node] = []
        fx.map_arg(node.args, lambda n: given.append(n) or n)  # type: ignore[func-returns-value]
        operands = given[len(given) - len(holders) :]
        inside: dict[fx.Node, Any] = {h: env[n] for h, n in zip(holders, operands, strict=True)}
        results = self._graph(segment, module, inside, f"{prefix}{node.name}/")
        found = [inside.get(r) if isinstance(r, fx.Node) else None for r in results]
        return [name for name in found if isinstance(name, str)]

    def _arguments(
        self, args: Any, kwargs: Mapping[str, Any], env: Mapping[fx.Node, Any]
    ) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
        operands: list[str] = []
        state: list[str] = []

        def text(value: Any) -> str:
            if isinstance(value, fx.Node):
                value = env.get(value, value)
                if isinstance(value, _Read):
                    state.append(value.path)
                    return f"state[{_plain(repr(value.path))}]"
                if isinstance(value, str):
                    operands.append(value)
                    return f"%{len(operands) - 1}"
                return "graph" if isinstance(value, fx.GraphModule) else one_line(value)
            if isinstance(value, (list, tuple)):
                return f"[{', '.join(map(text, value))}]"
            if isinstance(value, Mapping):
                return f"{{{', '.join(f'{k}: {text(v)}' for k, v in value.items())}}}"
            if isinstance(value, slice):
                return f"slice({text(value.start)}, {text(value.stop)}, {text(value.step)})"
            return self.symbols(_plain(repr(value)))

        parts = [text(value) for value in args]
        parts += [f"{key}={text(value)}" for key, value in kwargs.items()]
        return ", ".join(parts), tuple(operands), tuple(state)


@dataclass(frozen=True)
class _Read:
    path: str


def _plain(text: str) -> str:
    return one_line(text).replace("%", "\\x25")  # a per cent sign begins a gap


def _target(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return one_line(f"{short_target(node)}.{target._overloadname}")
    return short_target(node)


def _text(module: fx.GraphModule, symbols: _Symbols) -> str:
    lines = []
    for node in module.graph.nodes:
        value = lookup(module, str(node.target)) if node.op == "get_attr" else None
        nested = _text(value, symbols) if isinstance(value, fx.GraphModule) else ""
        lines.append(f"{node.format_node() or f'return {node.args}'}{nested}")
    return symbols(_plain("; ".join(lines)))
