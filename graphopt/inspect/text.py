"""Small texts that all views share: types, sizes, literals, comments that can't break out."""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.cost.sizes import tensors_in
from graphopt.errors import UnsupportedError

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_PLAIN_MODULES = {"_operator": "operator", "operator": "operator", "math": "math"}
_PLAIN_MODULES |= {"torch": "torch", "builtins": "builtins"}


def short_type(value: Any) -> str:
    """``f32[4, 16]`` for a tensor, ``(f32[4], b8[4])`` for several; empty for anything else."""
    if isinstance(value, torch.Tensor):
        return tensor_type(tuple(value.shape), value.dtype)
    if isinstance(value, (list, tuple)) and next(tensors_in(value), None) is not None:
        return f"({', '.join(short_type(item) or '-' for item in value)})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"size {value}"
    return ""


def tensor_type(shape: tuple[Any, ...], dtype: torch.dtype) -> str:
    """``f32[4, 16]``."""
    name = _SHORT.get(dtype, str(dtype).removeprefix("torch."))
    return f"{name}[{', '.join(str(size) for size in shape)}]"


def one_line(text: Any) -> str:
    """Text for a comment or a label: nothing that ends a line, nothing that isn't printable."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in str(text))


def target_text(node: fx.Node) -> str:
    """Python for what a node calls, such as ``torch.ops.aten.add.Tensor``.

    Raises:
        UnsupportedError: The target can't be named in Python.
    """
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        parts = [target.namespace, target._opname, target._overloadname]
        return _path("torch.ops", parts)
    module = getattr(target, "__module__", None)
    name = getattr(target, "__name__", "")
    if module in _PLAIN_MODULES and name.isidentifier():
        return f"{_PLAIN_MODULES[module]}.{name}"
    if str(module).startswith("graphopt.") and name.isidentifier():
        return f"{module}.{name}"
    raise UnsupportedError(
        f"{one_line(target)} can't be named in Python", node=node, hint="use another format"
    )


def short_target(node: fx.Node) -> str:
    """A node's op for people: ``aten.add``, ``getitem``, ``cond``."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return one_line(str(target._overloadpacket))
    name = getattr(target, "__name__", None) or getattr(target, "_name", None)
    return one_line(name or target)


def literal(value: Any, node: fx.Node, nested: Callable[[Any], str | None]) -> str:
    """Python for an argument.

    Args:
        value: A literal, or a nest of lists, tuples, dicts and slices.
        node: Whose argument it is, for errors.
        nested: Gives the text for what isn't a literal (nodes), or None.

    Raises:
        UnsupportedError: The value has no Python text.
    """
    own = nested(value)
    if own is not None:
        return own
    if isinstance(value, (list, tuple)):
        items = [literal(item, node, nested) for item in value]
        if isinstance(value, list):
            return f"[{', '.join(items)}]"
        return f"({', '.join(items)}{',' if len(items) == 1 else ''})"
    if isinstance(value, dict):
        pairs = (f"{k!r}: {literal(v, node, nested)}" for k, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, slice):
        bounds = (literal(b, node, nested) for b in (value.start, value.stop, value.step))
        return f"slice({', '.join(bounds)})"
    plain = _plain(value)
    if plain is None:
        raise UnsupportedError(
            f"an argument of type {type(value).__name__} has no Python text", node=node
        )
    return plain


def _plain(value: Any) -> str | None:
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else f'float("{value}")'
    if isinstance(value, complex):
        return f"complex({_plain(value.real)}, {_plain(value.imag)})"
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    return None


def _path(text: str, parts: list[str]) -> str:
    for part in parts:
        if part.isidentifier() and not keyword.iskeyword(part):
            text += f".{part}"
        else:
            text = f"getattr({text}, {part!r})"
    return text


class Names:
    """Hands out Python identifiers, each once."""

    def __init__(self, taken: set[str]) -> None:
        self.taken = set(taken)

    def fresh(self, wish: str) -> str:
        """The wish if it is a free identifier, else something like it."""
        name = re.sub(r"\W", "_", wish, flags=re.ASCII) or "_"
        if name[0].isdigit() or keyword.iskeyword(name) or name == "_":
            name = f"v_{name}"
        unique, count = name, 1
        while unique in self.taken:
            unique, count = f"{name}_{count}", count + 1
        self.taken.add(unique)
        return unique


def is_getitem(node: fx.Node) -> bool:
    """Whether the node picks one result of an op."""
    return node.target is operator.getitem
