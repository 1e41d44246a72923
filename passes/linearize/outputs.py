"""How far outputs are from the source's."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def compared(expected: Sequence[object], got: Sequence[object]) -> tuple[float, float | None]:
    """Relative error of outputs, and how often the largest one is the same.

    Args:
        expected: The source's flat outputs for each batch.
        got: The same of the result.
    """
    off = size = 0.0
    same = rows = 0
    for one, other in zip(expected, got, strict=True):
        pairs = [
            (a.double(), b.double()) for a, b in zip(one, other, strict=True)  # type: ignore[call-overload]
            if isinstance(a, Tensor) and a.is_floating_point()
        ]  # fmt: skip
        off += sum(float((a - b).square().sum()) for a, b in pairs)
        size += sum(float(a.square().sum()) for a, _ in pairs)
        if len(pairs) == 1 and pairs[0][0].dim() == 2:
            a, b = pairs[0]
            same += int((a.argmax(1) == b.argmax(1)).sum())
            rows += len(a)
    return math.sqrt(off / size) if size else 0.0, same / rows if rows else None
