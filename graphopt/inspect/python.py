"""Dumps as readable Python that runs.

The file defines one function: ``forward(state, x, ...)`` for a program, ``joint(...)`` for its
forward and backward, ``step(...)`` for a plan.  It takes the model's ``state_dict`` and the flat
tensor inputs (and for the latter two the gradients of the outputs), and returns the flat outputs,
for the latter two with the gradients by name.  Run as a script, it calls that function on made-up
tensors, or on a state dict saved with `torch.save` whose path is given.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.cost.sizes import UnknownSizeError, output_bytes
from graphopt.errors import UnsupportedError
from graphopt.inspect.document import Binding, Document, Segment, phase_of, scope_of
from graphopt.inspect.script import docstring, header, is_packable, main, tables
from graphopt.inspect.text import (
    Names,
    is_getitem,
    literal,
    one_line,
    short_type,
    target_text,
    tensor_type,
)
from graphopt.plain import human_bytes

Notes = Mapping[str, Sequence[str]]

_FUNCTION = {"program": "forward", "joint": "joint", "plan": "step"}
_RESERVED = {"torch", "operator", "math", "base64", "zlib", "graphopt", "builtins", "sys"}
_RESERVED |= {"state", "gradients", "STATE", "CONSTANTS", "INPUTS", "TANGENTS", *dir(builtins)}
_RESERVED |= {*_FUNCTION.values(), "example", "packed", "main"}


def python_text(
    document: Document, notes: Notes | None = None, tensors: Notes | None = None
) -> str:
    """Print a document as a Python file.

    Args:
        document: The document.
        notes: Node name -> what passes did there, for the comment of its line.
        tensors: The same by parameter.

    Raises:
        UnsupportedError: Something in the graph has no Python text; names the node.
    """
    return _Writer(document, notes or {}, tensors or {}).file()


@dataclass
class _Line:
    depth: int
    text: str
    comment: str = ""
    defines: tuple[str, ...] = ()
    uses: frozenset[str] = frozenset()


class _Writer:
    """Writes one document."""

    def __init__(self, document: Document, notes: Notes, tensors: Notes) -> None:
        self.document = document
        self.notes, self.tensors = notes, tensors
        self.prefix = ""  # of the names of nodes inside of regions
        self.names = Names(_RESERVED)
        self.lines: list[_Line] = []
        self.used: set[str] = set()
        self.parameters = {
            slot.name: self.names.fresh(slot.name)
            for slot in (*document.inputs, *document.tangents)
        }
        self.values: dict[str, str] = {}  # values that pass from one segment to a later one
        self.scope: tuple[str, str] | None = None
        self.modules: set[str] = set()
        self.outputs: dict[int, str] = {}

    def file(self) -> str:
        """The whole file."""
        for segment in self.document.segments:
            self._segment(segment)
        body = "\n".join([*self._body(), *self._returned()])
        function = _FUNCTION[self.document.view]
        head = ", ".join(["state", *self.parameters.values()])
        parts = [
            header(self.document, function, self.modules),
            tables(self.document),
            f"def {function}({head}):\n    {docstring(self.document)}\n{body}\n",
            main(self.document, function),
        ]
        return "\n\n".join(parts)

    # -- statements ----------------------------------------------------------------------------

    def _segment(self, segment: Segment) -> None:
        env: dict[fx.Node, Any] = {}
        for node, binding in segment.bindings.items():
            env[node] = self._bound(binding)
        if len(self.document.segments) > 1:
            self.lines.append(_Line(1, "", ""))
            self.lines.append(_Line(1, "", f"=== {segment.title}"))
            self.scope = None
        self._graph(segment, segment.module, env, 1)
        for result in segment.results:
            self._result(result.kind, result.name, result.value, env)

    def _bound(self, binding: Binding) -> str:
        if binding.kind == "state":
            return self._state(binding.name)
        if binding.kind == "value":
            return self.values[binding.name]
        return self.parameters[binding.name]

    def _state(self, path: str) -> str:
        slot = self.document.state.get(path)
        if slot is not None and is_packable(slot):
            return f"state.get({path!r}, CONSTANTS[{path!r}])"
        return f"state[{path!r}]"

    def _result(self, kind: str, name: str, value: Any, env: dict[fx.Node, Any]) -> None:
        earlier = isinstance(value, str)  # a value that an earlier segment made
        text = self.values[value] if earlier else self._argument(value, None, env)
        uses = self._take_used()
        uses |= {text} if text.isidentifier() else set()
        if kind == "value":
            self.values[name] = text
        elif kind == "output":
            self.outputs[int(name)] = text
        elif kind == "gradient":
            self.lines.append(_Line(1, f"gradients[{name!r}] = {text}", "", (), frozenset(uses)))
        elif kind == "mutation":
            owner = self.parameters.get(name) or self._state(name)
            self.lines.append(_Line(1, f"{owner}.copy_({text})", "", (), frozenset(uses)))

    def _graph(
        self, segment: Segment, module: fx.GraphModule, env: dict[fx.Node, Any], depth: int
    ) -> Any:
        for node in module.graph.nodes:
            if node.op == "output":
                return node.args[0]
            if node.op == "get_attr":
                env[node] = self._attribute(module, node)
            elif node.op == "call_function":
                self._call(segment, module, node, env, depth)
            elif node.op != "placeholder":
                raise UnsupportedError(f"a {node.op} node can't be dumped", node=node)
        return None

    def _attribute(self, module: fx.GraphModule, node: fx.Node) -> Any:
        value: Any = module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return value if isinstance(value, fx.GraphModule) else self._state(str(node.target))

    def _call(
        self,
        segment: Segment,
        module: fx.GraphModule,
        node: fx.Node,
        env: dict[fx.Node, Any],
        depth: int,
    ) -> None:
        self._announce(segment, node, depth)
        source = env.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if is_getitem(node) and isinstance(source, list):
            env[node] = source[node.args[1]]  # type: ignore[index]
            return
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            self._region(segment, node, env, depth)
            return
        arguments = [self._argument(value, node, env) for value in node.args]
        arguments += [
            f"{key}={self._argument(value, node, env)}" for key, value in node.kwargs.items()
        ]
        target = target_text(node)
        if target.startswith("torch.ops.graphopt."):
            self.modules.add("graphopt.ir.dropout")
        elif target.startswith("graphopt."):
            self.modules.add(target.rpartition(".")[0])
        name = self.names.fresh(node.name)
        env[node] = name
        text = f"{arguments[0]}[{arguments[1]}]" if is_getitem(node) else ""
        text = text or f"{target}({', '.join(arguments)})"
        line = _Line(depth, f"{name} = {text}", self._note(node), (name,), self._take_used())
        self.lines.append(line)

    def _region(self, segment: Segment, node: fx.Node, env: dict[fx.Node, Any], depth: int) -> None:
        target: Any = node.target
        kind = str(getattr(target, "_name", target))
        if kind == "wrap_with_set_grad_enabled":
            enabled, inner, *operands = node.args
            head = f"with torch.set_grad_enabled({enabled!r}):"
        elif kind == "wrap_with_autocast":
            device, dtype, enabled, cache, inner, *operands = node.args
            head = f"with torch.autocast({device!r}, {dtype}, {enabled!r}, {cache!r}):"
        elif kind == "cond":
            self._branches(segment, node, env, depth)
            return
        else:
            raise UnsupportedError(f"{one_line(kind)} can't be dumped as Python", node=node)
        self.lines.append(_Line(depth, head))
        env[node] = self._inner(segment, inner, operands, node, env, depth + 1)
        self.scope = None

    def _inner(
        self, segment: Segment, inner: Any, operands: Any, node: fx.Node, env: Any, depth: int
    ) -> Any:
        module = env[inner]
        given = [self._argument(value, node, env) for value in operands]
        holders = module.graph.find_nodes(op="placeholder")
        inside: dict[fx.Node, Any] = dict(zip(holders, given, strict=True))
        start = len(self.lines)
        self.scope = None
        outer, self.prefix = self.prefix, f"{self.prefix}{node.name}/"
        results = self._graph(segment, module, inside, depth)
        self.prefix = outer
        if len(self.lines) == start:
            self.lines.append(_Line(depth, "pass"))
        if isinstance(results, (list, tuple)):
            return [self._argument(value, node, inside) for value in results]
        return self._argument(results, node, inside)

    def _branches(
        self, segment: Segment, node: fx.Node, env: dict[fx.Node, Any], depth: int
    ) -> None:
        predicate, *branches = node.args[:3]
        operands = node.args[3] if len(node.args) > 3 else ()
        name = self.names.fresh(node.name)
        heads = (f"if bool({self._argument(predicate, node, env)}):", "else:")
        for head, branch in zip(heads, branches, strict=True):
            self.lines.append(_Line(depth, head, "", (), self._take_used()))
            results = self._inner(segment, branch, operands, node, env, depth + 1)
            text = f"({', '.join(results)},)" if isinstance(results, list) else results
            uses = frozenset(results) if isinstance(results, list) else frozenset({results})
            self.lines.append(_Line(depth + 1, f"{name} = {text}", "", (name,), uses))
        env[node] = name
        self.scope = None

    def _argument(self, value: Any, node: fx.Node | None, env: Mapping[fx.Node, Any]) -> str:
        def nested(item: Any) -> str | None:
            if not isinstance(item, fx.Node):
                return None
            text = env[item]
            if isinstance(text, list):
                text = f"({', '.join(text)},)"
            if text.isidentifier():
                self.used.add(text)
            return text

        where = node if node is not None else next(iter(env), None)
        return literal(value, where, nested)  # type: ignore[arg-type]

    def _take_used(self) -> frozenset[str]:
        used, self.used = frozenset(self.used), set()
        return used

    def _announce(self, segment: Segment, node: fx.Node, depth: int) -> None:
        path, cls = scope_of(node)
        phase = phase_of(segment, node)
        if (path, phase) == self.scope:
            return
        self.scope = (path, phase)
        label = f"{path or 'root'}: {cls}" if cls else path or "root"
        extra = "" if phase == segment.phase else f" ({phase})"
        self.lines.append(_Line(depth, "", f"{label}{extra}"))

    def _note(self, node: fx.Node) -> str:
        value = node.meta.get("val")
        notes = [short_type(value)] if short_type(value) else []
        if notes and not is_getitem(node):
            try:
                size = sum(output_bytes(node))
                notes.append(human_bytes(size) if size else "view")
            except UnknownSizeError:
                notes.append("size depends on the data")
        saved = self.document.saved
        held = saved.of(node) if saved is not None else None
        if held is not None and held.name == node.name:
            notes.append(f"saved {human_bytes(held.bytes)} for {', '.join(held.savers)}")
        if saved is not None:
            inside = [v for v in saved.saved_by(node) if v.kind == "internal"]
            if inside:
                notes.append(f"saves {human_bytes(sum(v.bytes for v in inside))} of its own")
        text = ", ".join(notes) + self._parameter_note(node)
        told = self.notes.get(self.prefix + node.name, ())
        return one_line("; ".join(part for part in (text, *told) if part))

    def _parameter_note(self, node: fx.Node) -> str:
        found = []
        for source in node.all_input_nodes:
            slot = self.document.state.get(str(source.target)) if source.op == "get_attr" else None
            if slot is not None:
                told = "".join(f" ({text})" for text in self.tensors.get(slot.name, ()))
                found.append(f"{slot.name} {tensor_type(slot.shape, slot.dtype)}{told}")
        return f" <- {', '.join(found)}" if found else ""

    # -- the text ------------------------------------------------------------------------------

    def _body(self) -> list[str]:
        dead = self._deaths() if self.document.view != "program" else {}
        result = ["    gradients = {}"] if self.document.view != "program" else []
        for index, line in enumerate(self.lines):
            pad = "    " * line.depth
            gone = f"del {', '.join(dead[index])}" if index in dead else ""
            simple = line.depth == 1 and line.text
            text = f"{line.text}; {gone}" if gone and simple else line.text
            comment = f"# {one_line(line.comment)}" if line.comment else ""
            result.append(f"{pad}{text}{'  ' if text and comment else ''}{comment}".rstrip())
            if gone and not simple:  # what a block used dies after the block
                result.append(f"    {gone}")
        return result

    def _deaths(self) -> dict[int, list[str]]:
        """After which line each value of the function's own level dies."""
        made = {n: i for i, line in enumerate(self.lines) if line.depth == 1 for n in line.defines}
        kept = set(self.outputs.values())
        last: dict[str, int] = {}
        ends = self._block_ends()
        for index, line in enumerate(self.lines):
            own = [n for n in line.defines if line.depth == 1]
            last.update({name: ends[index] for name in [*own, *line.uses] if name in made})
        result: dict[int, list[str]] = {}
        for name, index in last.items():
            if name not in kept:
                result.setdefault(index, []).append(name)
        return result

    def _block_ends(self) -> list[int]:
        """For each line the last line of the block that it is in; itself outside of blocks."""
        ends = list(range(len(self.lines)))
        for index in reversed(range(len(self.lines) - 1)):
            following = self.lines[index + 1]
            if following.depth > 1 or following.text == "else:":
                ends[index] = ends[index + 1]
        return ends

    def _returned(self) -> list[str]:
        texts = []
        for position in range(self.document.outputs):
            texts.append(self.outputs.get(position) or self._passed(position, texts))
        outputs = f"({', '.join(texts)}{',' if len(texts) == 1 else ''})"
        if self.document.view == "program":
            return [f"    return {outputs}"]
        return [f"    return {outputs}, gradients"]

    def _passed(self, position: int, earlier: list[str]) -> str:
        kind, what = self.document.passthrough.get(position, ("constant", None))
        if kind == "output":
            return earlier[int(what)]
        if kind == "input":
            return self.parameters[what]
        return self._state(what) if kind == "state" else repr(what)
