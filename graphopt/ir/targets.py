"""Functions and classes by name: what a graph in a file may call, and what it may not."""

from __future__ import annotations

import builtins
import importlib
import math
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch

from graphopt.errors import FileFormatError, UnsafeFileError, UnsupportedError

_NAMESPACES = frozenset({"aten", "prims", "graphopt"})
# torch's own libraries beyond these reach into files, other processes or the compiler
_REFUSED_NAMESPACES = frozenset(
    {
        "prim", "prims_rng", "c10d", "_c10d_functional", "_c10d_functional_autograd", "inductor",
        "profiler", "symm_mem", "static_runtime", "debugprims", "rngprims", "onnx", "higher_order",
        "_dtensor", "fsdp", "streams", "aoti_torch", "export", "quantized", "_quantized",
    }
)  # fmt: skip
_REFUSED_OPS = frozenset(
    {"aten::from_file", "aten::set_", "aten::resize_", "aten::_resize_output_", "aten::set_data"}
)
_HIGHER_ORDER = frozenset(
    {
        "cond", "wrap_with_set_grad_enabled", "wrap_with_autocast", "while_loop", "scan", "map",
        "map_impl", "associative_scan", "flex_attention", "checkpoint", "tag_activation_checkpoint",
    }
)  # fmt: skip
_OPERATORS = frozenset(
    {
        "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "eq",
        "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "not_", "lshift", "rshift", "pos",
        "invert", "is_", "is_not", "index",
    }
)  # fmt: skip
_MATH = frozenset({"ceil", "floor", "trunc", "sqrt", "log", "log2", "exp"})
_TORCH = frozenset(
    {"sym_max", "sym_min", "sym_not", "sym_int", "sym_float", "sym_ite", "sym_sum", "sym_sqrt"}
)
_BUILTINS = frozenset({"max", "min", "round", "int", "float", "bool", "abs"})

_functions: dict[str, Callable[..., Any]] = {}


def register_function(name: str, function: Callable[..., Any]) -> None:
    """Let graphs that call a Python function be saved; ``name`` stands for it in files.

    Args:
        name: A name of its own, such as ``graphopt.linearize.gelu``.
        function: The function; a pass puts it into graphs as a ``call_function`` target.
    """
    _functions[name] = function


def encode_target(target: Any) -> str:
    """The name of a function that a graph calls.

    Raises:
        UnsupportedError: It has none that could be read back.
    """
    if isinstance(target, torch._ops.OpOverload):
        schema = target._schema
        return f"op:{schema.name}.{schema.overload_name or 'default'}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"hop:{target._name}"
    for name, function in _functions.items():
        if function is target:
            return f"fn:{name}"
    for module, names in _PYTHON.items():
        name = getattr(target, "__name__", "")
        if name in names and getattr(sys.modules[module], name, None) is target:
            return f"py:{module}.{name}"
    raise UnsupportedError(
        f"a graph that calls {getattr(target, '__qualname__', target)!s} can't be saved",
        op=target,
        hint="register the function with graphopt.ir.codec.register_function, or make it a "
        "torch.library op",
    )


_PYTHON: dict[str, frozenset[str]] = {
    operator.__name__: _OPERATORS,
    math.__name__: _MATH,
    torch.__name__: _TORCH,
    builtins.__name__: _BUILTINS,
}


def resolve_target(name: str, *, trust: bool = False) -> Any:
    """The function that a graph calls, by its name in a file.

    Raises:
        FileFormatError: There is no such function.
        UnsafeFileError: It is not known to be harmless, and ``trust`` isn't given.
    """
    kind, _, rest = name.partition(":")
    if kind == "op":
        return _resolve_op(rest, trust)
    if kind == "hop":
        if rest not in _HIGHER_ORDER and not trust:
            raise _unsafe(f"the higher-order op {rest!r:.100}")
        found = getattr(torch.ops.higher_order, rest, None) if rest.isidentifier() else None
    elif kind == "fn":
        found = _functions.get(rest)
    else:
        module, _, attribute = rest.rpartition(".")
        known = kind == "py" and attribute in _PYTHON.get(module, ())
        found = getattr(sys.modules[module], attribute, None) if known else None
        if not known:
            raise _unsafe(f"the function {name!r:.100}")
    if found is None:
        raise FileFormatError(f"the function {name!r:.100} isn't known here")
    return found


def _resolve_op(name: str, trust: bool) -> Any:
    qualified, _, overload = name.rpartition(".")
    namespace, _, op = qualified.partition("::")
    if not (namespace.isidentifier() and op.isidentifier() and overload.isidentifier()):
        raise FileFormatError(f"an op with a bad name: {name!r:.100}")
    hidden = op.startswith("_unsafe") and op != "_unsafe_view"
    if not trust and (namespace in _REFUSED_NAMESPACES or qualified in _REFUSED_OPS or hidden):
        raise _unsafe(f"the op {name}")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), op), overload)
    except (AttributeError, RuntimeError):
        where = "" if namespace in _NAMESPACES else f"; import the library that defines {namespace}"
        raise FileFormatError(f"the op {name} isn't registered here{where}") from None


def _unsafe(what: str) -> UnsafeFileError:
    return UnsafeFileError(
        f"the file calls {what}, which is not known to be harmless",
        hint="load it with trust=True (--trust) if you know where it comes from",
    )


def class_name(cls: type) -> str:
    """``module:qualified name`` of a class."""
    return f"{cls.__module__}:{cls.__qualname__}"


def resolve_class(name: Any, *, trust: bool = False) -> type:
    """The class of a name that `class_name` made.

    Only transformers is imported on a file's behalf (``trust`` allows others); any other class has
    to be imported already.

    Raises:
        FileFormatError: There is no such class, or its module isn't imported.
    """
    module_name, _, path = str(name).partition(":")
    module = sys.modules.get(module_name)
    if module is None and (trust or module_name.split(".")[0] == "transformers"):
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            module = None
    if module is None:
        raise FileFormatError(
            f"the file needs the class {name!r:.200}",
            hint=f"import {module_name:.100} before you load the file",
        )
    value: Any = module
    for part in path.split("."):
        value = getattr(value, part, None)
    if not isinstance(value, type):
        raise FileFormatError(f"the file needs the class {name!r:.200}, which isn't there")
    return value
