"""How a model is explained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from graphopt.budget import Quantity
from graphopt.passes.relevance.composite import Composite


@dataclass(frozen=True)
class Options:
    """How a model is explained.

    Attributes:
        composite: Which rules are applied where.
        target: What is explained (see `graphopt.passes.relevance.target`).
        attribute: What gets a relevance.
        explicit: Hand relevance itself on, not quotients.
        memory_budget: Peak bytes of one explanation of the example inputs above parameters and
            inputs, or a share of the peak without a budget.
    """

    composite: Composite
    target: Any
    attribute: tuple[str, ...]
    explicit: bool = False
    memory_budget: Quantity | None = None
