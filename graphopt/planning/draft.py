"""Ways of rewriting joint graphs: one pass proposes them, the planner of a later one chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from graphopt.planning.rewrites import Rewrite, dump_rewrites, read_rewrites


@dataclass(frozen=True)
class Way:
    """Rewrites that are applied together, and how far gradients are off with them.

    Attributes:
        rewrites: In the order in which they are applied.
        gradient_error: Measured ``||g - g_exact|| / ||g_exact||`` over all that is trained.
        gradient_cosine: Cosine of both.
    """

    rewrites: tuple[Rewrite, ...] = ()
    gradient_error: float = 0.0
    gradient_cosine: float = 1.0


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
        ways = [{**asdict(way), "rewrites": dump_rewrites(way.rewrites)} for way in self.ways]
        return {"ways": ways}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Draft:
        """Reads what `to_dict` wrote."""
        ways = [{**way, "rewrites": read_rewrites(way["rewrites"])} for way in data["ways"]]
        return cls(tuple(Way(**way) for way in ways))
