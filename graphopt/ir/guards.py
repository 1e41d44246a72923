"""Conditions on input sizes: checked, compiled arithmetic, never ``eval`` of foreign text."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from graphopt.errors import UnsupportedError

_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type, Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_CALLS: dict[str, Callable[..., Any]] = {
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Max": max,
    "Min": min,
    "max": max,
    "min": min,
    "Eq": operator.eq,
    "Ne": operator.ne,
    "Not": operator.not_,
    "And": lambda *parts: all(parts),
    "Or": lambda *parts: any(parts),
}
_Sizes = Sequence[Sequence[int]]
_Eval = Callable[[_Sizes], Any]


def compile_arithmetic(code: str) -> Callable[[_Sizes], bool]:
    """Compile a condition over ``s[i][d]`` (size ``d`` of input ``i``).

    Raises:
        UnsupportedError: The text holds anything but arithmetic and comparisons.
    """
    try:
        tree = ast.parse(code, mode="eval").body
    except SyntaxError as error:
        raise UnsupportedError(f"a size guard that can't be read: {code!r}") from error
    return _compile(tree, code)


def compile_expression(code: str) -> Callable[[Mapping[str, Any]], Any]:
    """Compile arithmetic over named sizes, such as ``2*s0 + 1``.

    Raises:
        UnsupportedError: The text holds anything else.
    """
    try:
        tree = ast.parse(code, mode="eval").body
    except SyntaxError as error:
        raise UnsupportedError(f"a size that can't be read: {code!r}") from error
    compiled = _compile(tree, code)
    return lambda symbols: compiled(symbols)  # type: ignore[arg-type]


def _name(node: Any, code: str) -> _Eval:
    name = node.id
    return lambda s: s[name]


def _compile(node: ast.expr, code: str) -> _Eval:
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float, bool)):
        value = node.value
        return lambda s: value
    for kind, build in _BUILDERS.items():
        if isinstance(node, kind):
            return build(node, code)
    raise UnsupportedError(f"a size guard with unknown parts: {code!r}")


def _subscript(node: Any, code: str) -> _Eval:
    inner = node.value
    if not (isinstance(inner, ast.Subscript) and isinstance(inner.value, ast.Name)):
        raise UnsupportedError(f"a size guard with unknown parts: {code!r}")
    index, axis = _compile(inner.slice, code), _compile(node.slice, code)
    return lambda s: s[index(s)][axis(s)]


def _unary(node: Any, code: str) -> _Eval:
    inner = _compile(node.operand, code)
    if isinstance(node.op, ast.Not):
        return lambda s: not inner(s)
    return lambda s: -inner(s)


def _binary(node: Any, code: str) -> _Eval:
    left, right = _compile(node.left, code), _compile(node.right, code)
    if isinstance(node.op, ast.Pow):
        return lambda s: left(s) ** min(right(s), 16)
    if type(node.op) not in _BINARY:
        raise UnsupportedError(f"a size guard with unknown parts: {code!r}")
    op = _BINARY[type(node.op)]
    return lambda s: op(left(s), right(s))


def _bool(node: Any, code: str) -> _Eval:
    parts = [_compile(value, code) for value in node.values]
    combine: Callable[[Any], bool] = all if isinstance(node.op, ast.And) else any
    return lambda s: combine(part(s) for part in parts)


def _compare(node: Any, code: str) -> _Eval:
    terms = [_compile(term, code) for term in (node.left, *node.comparators)]
    ops = [_COMPARE.get(type(op)) for op in node.ops]
    if None in ops:
        raise UnsupportedError(f"a size guard with unknown parts: {code!r}")

    def holds(s: _Sizes) -> bool:
        values = [term(s) for term in terms]
        return all(op(a, b) for op, a, b in zip(ops, values, values[1:], strict=False))  # type: ignore[misc]

    return holds


def _call(node: Any, code: str) -> _Eval:
    name = node.func.id if isinstance(node.func, ast.Name) else None
    if name not in _CALLS or node.keywords:
        raise UnsupportedError(f"a size guard with unknown parts: {code!r}")
    function = _CALLS[name]
    args = [_compile(arg, code) for arg in node.args]
    return lambda s: function(*(arg(s) for arg in args))


_BUILDERS: dict[type, Callable[[Any, str], _Eval]] = {
    ast.Name: _name,
    ast.Subscript: _subscript,
    ast.UnaryOp: _unary,
    ast.BinOp: _binary,
    ast.BoolOp: _bool,
    ast.Compare: _compare,
    ast.Call: _call,
}
