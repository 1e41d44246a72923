"""Trees: the structure of nested inputs and outputs, apart from the tensors in them.

A model is called with trees (tuples, dicts, dataclasses, HF ``ModelOutput`` ...), a captured graph
with a flat list of tensors.  A `Tree` is the shape of one such value: its tensors are leaves,
everything else is static and has to come back as it was when the model was captured.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.errors import InputMismatch

_MAX_DEPTH = 24
_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Tree:
    """The structure of a nested value.

    Attributes:
        kind: ``leaf`` (a tensor, or a symbolic number in an output), ``static`` (anything without
            tensors inside), ``node`` (a type that torch's pytree registry knows), ``dataclass`` or
            ``object`` (any other object, by its attributes, such as a HF cache).
        type: The container's class; for a static value its class.
        context: What the registry needs to rebuild the container; the field or attribute names of
            a dataclass or object; the value itself of a static one.
        children: The trees inside.
    """

    kind: str
    type: type | None = None
    context: Any = None
    children: tuple[Tree, ...] = ()

    @property
    def leaves(self) -> int:
        """Number of leaves below (and at) this tree."""
        if self.kind == "leaf":
            return 1
        return sum(child.leaves for child in self.children)

    def keys(self) -> list[str]:
        """What to write after a path to name each child, such as ``['ids']`` or ``[0]``."""
        if self.kind in ("dataclass", "object"):
            return [f".{name}" for name in self.context]
        names = self.context
        if isinstance(names, list) and len(names) == len(self.children):
            return [f"[{name!r}]" for name in names]
        return [f"[{i}]" for i in range(len(self.children))]


LEAF = Tree("leaf")


def static(value: Any) -> Tree:
    """The tree of a value that holds no tensor."""
    return Tree("static", type(value), value)


def flatten(value: Any, *, symbols: bool = False) -> tuple[list[Any], Tree]:
    """Split a nested value into its tensors and its structure.

    Args:
        value: Any nest of containers.
        symbols: Whether symbolic numbers are leaves too (in the outputs of a trace).

    Returns:
        The tensors in order, and the tree that `unflatten` rebuilds the value from.
    """
    leaves: list[Any] = []
    return leaves, _flatten(value, leaves, symbols, 0)


def _flatten(value: Any, leaves: list[Any], symbols: bool, depth: int) -> Tree:
    if isinstance(value, torch.Tensor) or (symbols and isinstance(value, _SYMBOLIC)):
        leaves.append(value)
        return LEAF
    if isinstance(value, (*_ATOMS, *_SYMBOLIC)) or depth > _MAX_DEPTH:
        return static(value)
    opened = _open(value)
    if opened is None:
        return static(value)
    kind, parts, context = opened
    start = len(leaves)
    children = tuple(_flatten(part, leaves, symbols, depth + 1) for part in parts)
    if kind == "object" and len(leaves) == start:
        return static(value)
    return Tree(kind, type(value), context, children)


def _open(value: Any) -> tuple[str, list[Any], Any] | None:
    """Take a container apart: its kind, its parts, and the context to rebuild it."""
    cls = type(value)
    registered = _registered(cls)
    if registered is not None:
        parts, context = registered.flatten_fn(value)
        return "node", list(parts), context
    if dataclasses.is_dataclass(cls):
        names = [f.name for f in dataclasses.fields(cls)]
        return "dataclass", [getattr(value, name) for name in names], names
    if isinstance(value, (nn.Module, type)) or callable(value) or not hasattr(value, "__dict__"):
        return None
    if isinstance(value, (dict, list, tuple, set)):  # subclasses with contents of their own
        return None
    return "object", list(vars(value).values()), list(vars(value))


def _registered(cls: type) -> Any:
    if cls in pytree.SUPPORTED_NODES:
        return pytree.SUPPORTED_NODES[cls]
    if pytree.is_namedtuple_class(cls):
        return pytree.SUPPORTED_NODES[collections.namedtuple]  # type: ignore[index]
    if pytree.is_structseq_class(cls):
        return pytree.NodeDef(cls, lambda v: (list(v), cls), lambda v, t: t(list(v)), None)
    return None


def is_registered(cls: type) -> bool:
    """Whether torch's pytree registry knows a class (or it is a named tuple)."""
    return _registered(cls) is not None


def unflatten(tree: Tree, leaves: Iterable[Any]) -> Any:
    """Rebuild a nested value from its tree and its leaves."""
    return rebuild(tree, iter(leaves))


def rebuild(tree: Tree, leaves: Any) -> Any:
    """Rebuild a nested value, taking its leaves from an iterator."""
    kind = tree.kind
    if kind == "leaf":
        return next(leaves)
    if kind == "static":
        return tree.context
    parts = [rebuild(child, leaves) for child in tree.children]
    cls: Any = tree.type
    if cls is tuple:
        return tuple(parts)
    if cls is list:
        return parts
    if kind == "node":
        return _registered(cls).unflatten_fn(parts, tree.context)
    return _rebuild_object(tree, parts)


def _rebuild_object(tree: Tree, parts: list[Any]) -> Any:
    value = object.__new__(tree.type)  # type: ignore[type-var, arg-type]
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    for name, part in zip(tree.context, parts, strict=True):
        if tree.kind == "object" and tensors and isinstance(part, torch.dtype | torch.device):
            part = getattr(tensors[0], "dtype" if isinstance(part, torch.dtype) else "device")
        object.__setattr__(value, name, part)
    return value


def same_tree(one: Tree, other: Tree) -> bool:
    """Whether two trees have the same structure and static values (dtypes and devices apart)."""
    if isinstance(one.context, torch.dtype | torch.device):
        return type(one.context) is type(other.context)
    return (
        one.kind == other.kind
        and one.type is other.type
        and same_value(one.context, other.context)
        and len(one.children) == len(other.children)
        and all(same_tree(a, b) for a, b in zip(one.children, other.children, strict=True))
    )


def match(tree: Tree, value: Any, leaves: list[torch.Tensor], path: str) -> None:
    """Flatten a value that has to have the structure ``tree``, appending its tensors to ``leaves``.

    Raises:
        InputMismatch: The structure or a static value differs; names the argument.
    """
    if tree.kind == "leaf":
        if not isinstance(value, torch.Tensor):
            raise _mismatch(path, "a tensor", _describe(value))
        leaves.append(value)
        return
    if tree.kind == "static":
        if not same_value(tree.context, value):
            raise _mismatch(path, _describe(tree.context), _describe(value))
        return
    opened = _open(value) if type(value) is tree.type else None
    if opened is None:
        raise _mismatch(path, _name(tree.type), _describe(value))
    _, parts, context = opened
    if isinstance(value, dict) and context != tree.context and set(value) == set(tree.context):
        parts, context = [value[key] for key in tree.context], tree.context  # order is free
    if len(parts) != len(tree.children) or not same_value(context, tree.context):
        expected = ", ".join(tree.keys()) or "nothing"
        raise _mismatch(path, f"{_name(tree.type)} with {expected} in it", _describe(value))
    for child, part, key in zip(tree.children, parts, tree.keys(), strict=True):
        match(child, part, leaves, path + key)


def same_value(expected: Any, value: Any) -> bool:
    """Whether two static values are of one type and equal (NaN equals NaN)."""
    if expected is value:
        return True
    if type(expected) is not type(value):
        return False
    try:
        return bool(expected == value) or (expected != expected and value != value)
    except Exception:
        return False


def _name(cls: Any) -> str:
    return getattr(cls, "__qualname__", str(cls))


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, _ATOMS):
        return repr(value)
    if isinstance(value, dict):
        return f"a {_name(type(value))} with {', '.join(map(repr, value)) or 'nothing'} in it"
    return f"a {_name(type(value))}"


def _mismatch(path: str, expected: str, got: str) -> InputMismatch:
    return InputMismatch(
        f"argument {path!r}: expected {expected}, got {got}",
        hint="structure and values other than tensors are fixed when a model is captured; "
        "capture it again with inputs of this form",
    )
