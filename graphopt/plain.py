"""Plain data of anything, for JSON."""

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
