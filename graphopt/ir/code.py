"""Generated code as an object, and the names that may stand in it."""

from __future__ import annotations

import builtins
import keyword
import linecache
import re
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch


@dataclass(frozen=True)
class Code:
    """Generated code.

    Attributes:
        text: Readable Python: one function ``forward(self, ...)``.
        names: The global names that it uses.
        file: Its entry in ``linecache``, which tracebacks show.
    """

    text: str
    names: Mapping[str, Any]
    file: str

    def compile(self) -> Callable[..., tuple[Any, ...]]:
        """Compile it; tracebacks show its lines."""
        lines = self.text.splitlines(keepends=True)
        linecache.cache[self.file] = (len(self.text), None, lines, self.file)
        scope: dict[str, Any] = dict(self.names)
        exec(compile(self.text, self.file, "exec"), scope)
        # A frame in a traceback holds the code object, so that its lines live as long.
        weakref.finalize(scope["forward"].__code__, linecache.cache.pop, self.file, None)
        return scope["forward"]


@dataclass
class Names:
    """Hands out Python identifiers, each once."""

    taken: set[str] = field(default_factory=lambda: {"self", "torch", *dir(builtins)})

    def fresh(self, wish: str) -> str:
        """An identifier like ``wish`` that wasn't handed out before."""
        name = re.sub(r"\W", "_", wish)
        if not name or name[0].isdigit() or keyword.iskeyword(name):
            name = f"_{name}"
        unique, count = name, 1
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        return unique


def attribute(path: str) -> str:
    """Python for the attribute at a dotted path of ``self``: ``self.layers[0].weight``."""
    text = "self"
    for part in path.split(".") if path else ():
        if part.isdigit():
            text += f"[{part}]"
        elif part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}"
        else:
            text = f"getattr({text}, {part!r})"
    return text


def assign_buffer(module: torch.nn.Module, name: str, value: torch.Tensor) -> None:
    """Assign to a buffer, as the source does; export records that as a copy."""
    if torch.compiler.is_exporting():
        module._buffers[name].copy_(value)  # type: ignore[union-attr]
    else:
        module._buffers[name] = value


def readable(target: Any) -> str | None:
    """``torch.sym_max`` or ``max`` for functions that the code can name without a global."""
    name = getattr(target, "__name__", None)
    if name is None or isinstance(target, ModuleType):
        return None
    if getattr(torch, name, None) is target:
        return f"torch.{name}"
    if getattr(builtins, name, None) is target:
        return name
    return None
