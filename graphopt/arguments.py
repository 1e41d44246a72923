"""Values of pass options as text, both ways."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterable
from typing import Any, Literal

from graphopt.errors import PipelineError

_OPEN = {"{": "}", "[": "]"}


def split_top_level(text: str) -> list[str]:
    """Split at commas that stand outside braces, brackets and double quotes.

    Raises:
        PipelineError: Unbalanced braces, brackets or quotes, or an empty part.
    """
    parts, stack, quoted, escaped, start = [], [], False, False, 0
    for i, char in enumerate(text):
        if quoted:
            quoted = escaped or char != '"'
            escaped = not escaped and char == "\\"
        elif char == '"':
            quoted = True
        elif char in _OPEN:
            stack.append(_OPEN[char])
        elif char in _OPEN.values():
            if not stack or stack.pop() != char:
                raise PipelineError(f"unbalanced {char!r} in {text!r}")
        elif char == "," and not stack:
            parts.append(text[start:i])
            start = i + 1
    if stack or quoted:
        expected = stack[-1] if stack else '"'
        raise PipelineError(f"missing {expected!r} in {text!r}")
    parts.append(text[start:])
    if any(not part.strip() for part in parts):
        raise PipelineError(f"an empty part between commas in {text!r}")
    return parts


def format_value(value: Any) -> str:
    """Text of an option value that `read_value` reads back; of a function its name."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(format_value(v) for v in value) + "]"
    if isinstance(value, str):
        plain = value and all(c.isalnum() or c in "_-./%:" for c in value)
        looks_special = value.lower() in ("none", "true", "false")
        return value if plain and not looks_special else json.dumps(value)
    if callable(value):
        kind = value if hasattr(value, "__qualname__") else type(value)
        return format_value(f"{kind.__module__}:{kind.__qualname__}")
    return str(value)


def read_value(text: str, kinds: Iterable[Any]) -> Any:
    """Read an option value.

    Args:
        text: The text.
        kinds: The alternatives of the option's annotation (``int | None`` gives two).

    Returns:
        The value of the first alternative that the text fits.

    Raises:
        ValueError: The text fits none of them.
    """
    kinds = list(kinds)
    if type(None) in kinds and text.strip() == "none":
        return None
    # `int | float` should read 3 as an int, and `str` takes anything, so it comes last.
    order = (bool, int, float)
    ranked = [k for k in order if k in kinds] + [k for k in kinds if k not in order]
    ranked.sort(key=lambda kind: kind is str)
    for kind in ranked:
        if kind is type(None):
            continue
        try:
            return _read(text.strip(), kind)
        except (ValueError, PipelineError):
            continue
    names = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not type(None))
    raise ValueError(f"expected {names}")


def _read(text: str, kind: Any) -> Any:
    origin = typing.get_origin(kind)
    if kind is bool:
        return {"true": True, "false": False}[text] if text in ("true", "false") else _fail(text)
    if kind is int or kind is float:
        return kind(text)
    if origin is Literal:
        return _literal(text, typing.get_args(kind))
    if origin in (tuple, list):
        item = typing.get_args(kind)[0] if typing.get_args(kind) else str
        return origin(_items(text, item))
    if kind is str or kind is Any:
        return json.loads(text) if text.startswith('"') else text
    return _fail(text)


def _literal(text: str, choices: tuple[Any, ...]) -> Any:
    for choice in choices:
        if text in (str(choice), format_value(choice)):
            return choice
    if all(isinstance(c, str) for c in choices):
        return text  # the pass names the choices in its own error
    return _fail(text)


def _items(text: str, item: Any) -> list[Any]:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if not inner.strip():
        return []
    return [read_value(part, [item]) for part in split_top_level(inner)]


def _fail(text: str) -> Any:
    raise ValueError(text)
