"""What a program remembers about the passes that made it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class PassRecord:
    """One pass that ran.

    Attributes:
        text: The pass with its options, as in a pipeline.
        changed: Whether it changed anything.
        seconds: How long it took.
        report: Its sections of the report, JSON-able.
    """

    text: str
    changed: bool
    seconds: float
    report: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PassRecord:
        """Inverse of `to_dict`."""
        return cls(data["text"], data["changed"], data["seconds"], dict(data["report"]))
