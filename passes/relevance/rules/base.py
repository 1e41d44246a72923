"""What a rule is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.passes.relevance.site import Site

RULES: dict[str, type[Rule]] = {}
"""All rules by the name that composites use."""


@dataclass(frozen=True)
class Rule:
    """How relevance at the result of an operation is shared among what it was computed from.

    Rules are frozen dataclasses whose fields are their options.

    Attributes:
        name: The rule's name in composites (a class variable).
        conserves: Whether what arrives is what leaves and what is booked.
    """

    name: ClassVar[str] = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name:
            RULES[cls.name] = cls

    def prepare(self, site: Site) -> Any:
        """What `propagate` needs of the inputs besides what is kept anyway (``site.prepared``)."""
        return None

    def propagate(self, site: Site) -> None:
        """Hand on what has arrived at an operation, and book what stays."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != f.default
        }

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.options().items())
        return f"{self.name}({given})" if given else self.name
