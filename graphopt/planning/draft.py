"""What one pass proposes, and the planner of a later one chooses from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.planning.rewrites import Way


@dataclass(frozen=True)
class Draft:
    """Stands for a planner until a later pass plans; calls run unplanned.

    Attributes:
        ways: The one to be preferred first.
    """

    kind: ClassVar[str] = "draft"

    ways: tuple[Way, ...]

    def runner(self, module: Any, inputs: Sequence[Any]) -> None:
        """Nothing is planned yet."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"ways": [way.to_dict() for way in self.ways]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Draft:
        """Reads what `to_dict` wrote."""
        return cls(tuple(Way.from_dict(way) for way in data["ways"]))
