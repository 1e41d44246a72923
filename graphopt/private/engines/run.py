"""What a run of a circuit between parties gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from graphopt.private.cost import Cost


@dataclass(frozen=True)
class Measured:
    """What one step took.

    Attributes:
        bytes: Sent by all parties together.
        rounds: Times that the parties waited for each other.
        seconds: Wall-clock time on this machine.
    """

    bytes: float
    rounds: int
    seconds: float

    @property
    def cost(self) -> Cost:
        """Bytes and rounds."""
        return Cost(self.bytes, self.rounds)


@dataclass(frozen=True)
class Run:
    """One evaluation.

    Attributes:
        outputs: The revealed outputs, float64.
        steps: By name of the step; ``"reveal"`` is the opening of the outputs.
    """

    outputs: tuple[torch.Tensor, ...]
    steps: Mapping[str, Measured]

    @property
    def cost(self) -> Cost:
        """Bytes and rounds of the whole run."""
        return Cost(
            sum(m.bytes for m in self.steps.values()), sum(m.rounds for m in self.steps.values())
        )

    @property
    def seconds(self) -> float:
        """Wall-clock time of the whole run."""
        return sum(m.seconds for m in self.steps.values())
