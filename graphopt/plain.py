"""Plain data of anything, for JSON; sizes and counts as text, for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any


def to_plain(value: Any) -> Any:
    """JSON-able form of a dataclass, a mapping, a sequence or a number.

    NaN and infinities, which JSON doesn't have, become None; numpy and torch scalars become
    numbers; anything else becomes its text.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Iterable):
        return [to_plain(v) for v in value]
    item = getattr(value, "item", None)
    return to_plain(item()) if callable(item) else str(value)


def human_bytes(count: float) -> str:
    """Bytes for people: ``12.3 MB`` (decimal units, as the literature uses them)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def human_count(count: float) -> str:
    """A count for people: ``1.23 G``."""
    return _scaled(count, ("", "k", "M", "G", "T", "P")).strip()


def _scaled(count: float, units: tuple[str, ...]) -> str:
    size = float(count)
    for unit in units[:-1]:
        if abs(size) < 999.5:  # what is rounded to a thousand goes to the next unit
            return f"{size:.0f} {unit}" if unit == units[0] else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} {units[-1]}"
