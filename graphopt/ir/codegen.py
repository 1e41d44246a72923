"""Python code of a program's graph: what an `OptimizedModule` runs, and what ``.code`` shows.

The code reads parameters, buffers and ``training`` flags from the module itself, so that it follows
``.train()``, ``.half()`` and ``functional_call`` with no work at call time.  Regions under
``no_grad`` and autocast become ``with`` blocks; branches of ``cond`` become inner functions.  Every
value is deleted after its last use.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.ir.code import Code, Names, assign_buffer, attribute, readable
from graphopt.ir.literals import Tie
from graphopt.ir.mode import WHOLE, ModeSwitch

_GRAD_REGION = "wrap_with_set_grad_enabled"
_AUTOCAST_REGION = "wrap_with_autocast"
_COUNTER = iter(range(1 << 62))


@dataclass
class _Line:
    depth: int
    text: str
    defines: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    conditional: bool = False


def generate(module: fx.GraphModule) -> Code:
    """Generate the code of a graph module whose tensors live at their original paths."""
    writer = _Writer(module, Names(), {"torch": torch})
    text = writer.function("forward", 0)
    return Code(text, writer.globals, f"<graphopt program {next(_COUNTER)}>")


class _Writer:
    """Writes one function (the whole program, or a branch of it)."""

    def __init__(self, module: fx.GraphModule, names: Names, scope: dict[str, Any]) -> None:
        self.root = module
        self.names = names
        self.globals = scope
        self.lines: list[_Line] = []
        self.env: dict[fx.Node, Any] = {}
        self.scope: str | None = None
        self.inputs: dict[str, str] = {}
        self.used: set[str] = set()

    def function(self, name: str, depth: int) -> str:
        graph = self.root.graph
        parameters = []
        for node in graph.find_nodes(op="placeholder"):
            result = self.names.fresh(node.name)
            self.env[node] = _Name(result)
            self.inputs[node.name] = result
            parameters.append(result)
        outputs = self.body(self.root, depth + 1)
        head = ["self", *parameters] if name == "forward" else parameters
        pad = "    " * depth
        lines = [f"{pad}def {name}({', '.join(head)}):"]
        results = self.render(outputs)
        keep = set(self.used)
        self.used = set()
        lines += self._with_deletions(parameters, keep)
        lines.append(f"{pad}    return {results}")
        return "\n".join(lines) + ("\n" if depth == 0 else "")

    def _with_deletions(self, parameters: list[str], keep: set[str]) -> list[str]:
        last: dict[str, int] = {}
        for index, line in enumerate(self.lines):
            for name in (*line.uses, *line.defines):
                last[name] = index
        result = []
        for index, line in enumerate(self.lines):
            dead = [
                name
                for name in dict.fromkeys((*sorted(line.uses), *line.defines))
                if last[name] == index and name not in keep
            ]
            pad = "    " * line.depth
            opens = line.text.endswith(":") and not line.text.startswith("#")
            result.append(f"{pad}{line.text}")
            if dead and line.conditional:
                result.append(f"{pad[4:]}del {', '.join(dead)}")
            elif dead and not opens:
                result[-1] += f"; del {', '.join(dead)}"
        return result

    def body(self, module: fx.GraphModule, depth: int) -> Any:
        """Write a graph's statements; returns the argument of its output node."""
        for node in module.graph.nodes:
            if node.op == "output":
                return self._resolve(node.args[0])
            if node.op == "placeholder":
                continue
            if node.op == "get_attr":
                self._get_attr(module, node)
            elif node.op == "call_function":
                self._call(module, node, depth)
            else:
                raise UnsupportedError(f"{node.op} in a program's graph", node=node)
        raise UnsupportedError("a graph without output")

    def _resolve(self, value: Any) -> Any:
        return fx.map_arg(value, lambda n: self.env[n])

    def _get_attr(self, module: fx.GraphModule, node: fx.Node) -> None:
        target: Any = module
        try:
            for part in str(node.target).split("."):
                target = getattr(target, part)
        except AttributeError:
            target = None
        if isinstance(target, fx.GraphModule):
            self.env[node] = target
            return
        self.env[node] = _Text(attribute(str(node.target)))

    def _call(self, module: fx.GraphModule, node: fx.Node, depth: int) -> None:
        target = node.target
        name = getattr(target, "__name__", "")
        if isinstance(target, torch._ops.HigherOrderOperator):
            name = target._name if hasattr(target, "_name") else name
            if name in (_GRAD_REGION, _AUTOCAST_REGION):
                self._region(node, name, depth)
                return
        if target is operator.getitem and isinstance(node.args[0], fx.Node):
            parts = self.env[node.args[0]]
            if isinstance(parts, (tuple, list)) and isinstance(node.args[1], int):
                self.env[node] = parts[node.args[1]]
                return
        self._comment(node, depth)
        self.used = set()
        text = self._assignment(node) or self._expression(node, depth)
        uses = tuple(self.used)
        self.used = set()
        mode: ModeSwitch | None = node.meta.get("mode")
        if mode is not None and WHOLE in mode.values:
            word = "if" if mode.values[WHOLE][0] else "if not"
            self.lines.append(_Line(depth, f"{word} {attribute(mode.owner)}.training:"))
            self.lines.append(_Line(depth + 1, text, (), uses, conditional=True))
            self.env[node] = None
            return
        if not node.users:
            self.env[node] = None
            self.lines.append(_Line(depth, text, (), uses))
            return
        result = self.names.fresh(node.name)
        self.env[node] = _Name(result)
        self.lines.append(_Line(depth, f"{result} = {text}", (result,), uses))

    def _region(self, node: fx.Node, name: str, depth: int) -> None:
        count = 1 if name == _GRAD_REGION else 4
        settings, inner = node.args[:count], self.env[node.args[count]]  # type: ignore[index]
        self.used = set()
        texts = [self.render(self._argument(node, ("args", i), v)) for i, v in enumerate(settings)]
        if name == _GRAD_REGION:
            head = f"with torch.set_grad_enabled({texts[0]}):"
        else:
            # export always records cache_enabled=False; the source has the ambient setting
            keys = ("device_type", "dtype", "enabled")
            pairs = ", ".join(f"{k}={t}" for k, t in zip(keys, texts[:3], strict=True))
            head = f"with torch.autocast({pairs}):"
        self.lines.append(_Line(depth, head, (), tuple(self.used)))
        self.used = set()
        operands = [self._resolve(a) for a in node.args[count + 1 :]]
        placeholders = inner.graph.find_nodes(op="placeholder")
        for placeholder, operand in zip(placeholders, operands, strict=True):
            self.env[placeholder] = operand
        before = len(self.lines)
        outputs = self.body(inner, depth + 1)
        if len(self.lines) == before:
            self.lines.append(_Line(depth + 1, "pass"))
        self.env[node] = outputs
        self.scope = None

    def _comment(self, node: fx.Node, depth: int) -> None:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if not stack:
            return
        path, cls = stack[-1][0], stack[-1][1]
        cls = cls if isinstance(cls, str) else getattr(cls, "__qualname__", str(cls))
        label = f"# {path or 'root'}: {cls.rsplit('.', 1)[-1]}"
        label = " ".join(label.split())  # a comment is one line, whatever a file says
        # A name can hold a line end, which would end the comment and start code.
        label = "".join(c if c.isprintable() else "?" for c in label)
        if label != self.scope:
            self.scope = label
            self.lines.append(_Line(depth, label))

    def _expression(self, node: fx.Node, depth: int) -> str:
        self._branches(node, depth)
        args = [self.render(self._argument(node, ("args", i), v)) for i, v in enumerate(node.args)]
        if node.target is operator.getitem:
            return f"{args[0]}[{args[1]}]"
        args += [
            f"{k}={self.render(self._argument(node, ('kwargs', k), v))}"
            for k, v in node.kwargs.items()
        ]
        return f"{self._function(node.target)}({', '.join(args)})"

    def _assignment(self, node: fx.Node) -> str | None:
        """The source assigns to a buffer here; its graph has a copy in that place."""
        written = node.args[0] if node.meta.get("assign") else None
        if not isinstance(written, fx.Node) or written.op != "get_attr":
            return None
        path, _, name = str(written.target).rpartition(".")
        value = self.render(self._argument(node, ("args", 1), node.args[1]))
        return (
            f"{self._global('assign_buffer', assign_buffer)}({attribute(path)}, {name!r}, {value})"
        )

    def _branches(self, node: fx.Node, depth: int) -> None:
        """Write the graph modules among a node's arguments as functions before it."""
        for source in node.all_input_nodes:
            inner = self.env.get(source)
            if not isinstance(inner, fx.GraphModule):
                continue
            name = self.names.fresh(str(source.target))
            writer = _Writer(inner, self.names, self.globals)
            writer.inputs = self.inputs
            text = writer.function(name, 0)
            for line in text.rstrip("\n").split("\n"):
                self.lines.append(_Line(depth, line))
            self.env[source] = _Text(name)

    def _argument(self, node: fx.Node, place: tuple[Any, ...], value: Any) -> Any:
        """Resolve an argument, putting mode switches and tied literals in their places."""
        path = ".".join(str(p) for p in place)
        text = self._switch(node, path, value)
        if text is not None:
            return _Text(text)
        if isinstance(value, fx.Node):
            return self.env[value]
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            parts = [self._argument(node, (*place, i), v) for i, v in enumerate(value)]
            return type(value)(parts)
        if isinstance(value, dict):
            return {k: self._argument(node, (*place, k), v) for k, v in value.items()}
        if isinstance(value, slice):
            return slice(*(self._resolve(v) for v in (value.start, value.stop, value.step)))
        return value

    def _switch(self, node: fx.Node, path: str, value: Any) -> str | None:
        mode: ModeSwitch | None = node.meta.get("mode")
        if mode is not None and path in mode.values:
            train, evaluate = mode.values[path]
            _expect(node, path, value, (train, evaluate))
            flag = f"{attribute(mode.owner)}.training"
            if (train, evaluate) == (True, False):
                return flag
            return f"({self.render(train)} if {flag} else {self.render(evaluate)})"
        tie: Tie | None = node.meta.get("ties", {}).get(path)
        return None if tie is None else self._tie(tie)

    def _tie(self, tie: Tie) -> str:
        if tie.input:
            if tie.source not in self.inputs:
                raise UnsupportedError(f"a literal is tied to {tie.source!r}, which is no input")
            source = self.inputs[tie.source]
            self.used.add(source)
        else:
            source = attribute(tie.source)
        return tie.render(source)

    def _function(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            namespace, name = target._schema.name.split("::")
            overload = target._schema.overload_name or "default"
            return f"torch.ops.{namespace}.{name}.{overload}"
        if isinstance(target, torch._ops.HigherOrderOperator):
            return f"torch.ops.higher_order.{target._name}"
        if not callable(target):
            raise UnsupportedError(f"a call of {target!r} in a program's graph")
        name = readable(target)
        if name is not None:
            return name
        return self._global(getattr(target, "__name__", type(target).__name__), target)

    def _global(self, wish: str, value: Any) -> str:
        for name, known in self.globals.items():
            if known is value:
                return name
        name = self.names.fresh(wish)
        self.globals[name] = value
        return name

    def render(self, value: Any) -> str:
        """Python for a resolved argument."""
        if isinstance(value, _Text):
            return value.text
        if isinstance(value, _Name):
            self.used.add(value.text)
            return value.text
        if isinstance(value, (list, tuple)):
            return self._sequence(value)
        if isinstance(value, dict):
            return "{" + ", ".join(f"{k!r}: {self.render(v)}" for k, v in value.items()) + "}"
        return self._constant(value)

    def _sequence(self, value: Any) -> str:
        parts = ", ".join(self.render(v) for v in value)
        if isinstance(value, torch.Size):
            return f"torch.Size([{parts}])"
        if isinstance(value, list):
            return f"[{parts}]"
        return f"({parts},)" if len(value) == 1 else f"({parts})"

    def _constant(self, value: Any) -> str:
        if isinstance(value, float) and (value != value or value in (float("inf"), -float("inf"))):
            return f'float("{value}")'
        if value is None or value is Ellipsis or isinstance(value, (bool, int, float, complex)):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            return str(value)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if isinstance(value, slice):
            return (
                f"slice({', '.join(self.render(v) for v in (value.start, value.stop, value.step))})"
            )
        if isinstance(value, str):
            return repr(value)
        return self._global(type(value).__name__.lower(), value)


@dataclass(frozen=True)
class _Name:
    """A local variable."""

    text: str


@dataclass(frozen=True)
class _Text:
    """Python that stands for itself."""

    text: str


def _expect(node: fx.Node, path: str, value: Any, known: tuple[Any, Any]) -> None:
    if any(value is k or value == k for k in known):
        return
    raise UnsupportedError(
        f"{path} is {value!r}, but its node switches it between {known[0]!r} and {known[1]!r}",
        node=node,
        hint="a pass that changes a mode-bearing argument has to change node.meta['mode'] as well",
    )
