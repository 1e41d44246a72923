"""Parametrising tests over the zoo."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest

from tests.zoo.registry import ZOO


def zoo_params(
    *,
    tag: str | None = None,
    without: str = "",
    refused: bool = False,
    slow: Collection[str] = (),
) -> list[Any]:
    """Zoo models as ``pytest.param``; the slow ones carry the mark.

    Args:
        tag: only models with this tag.
        without: leave out models with any of these tags (separated by blanks).
        refused: take the models that capture must refuse as well.
        slow: names of models that are slow in this test, besides those tagged so.
    """
    excluded = set(without.split())
    return [
        pytest.param(
            entry,
            id=name,
            marks=[pytest.mark.slow] if "slow" in entry.tags or name in slow else [],
        )
        for name, entry in sorted(ZOO.items())
        if (tag is None or tag in entry.tags)
        and not excluded & entry.tags
        and (refused or entry.refused is None)
    ]
