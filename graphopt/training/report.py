"""What a brief training did."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.training.accuracy import Accuracy

Status = Literal["done", "interrupted", "out of data"]


@dataclass(frozen=True)
class TrainingReport:
    """What a brief training did.

    Attributes:
        status: ``done``; ``interrupted`` by Ctrl-C; ``out of data``: an iterator that can be read
            only once ended before the steps did.
        steps: Steps of the optimizer.
        trained: Names of the parameters that were trained.
        trained_count: How many numbers these hold.
        total_count: How many all parameters hold; tied ones count once.
        losses: Mean training loss of each epoch.
        validation_losses: Loss on the validation data, at first and after each epoch.
        kept_epoch: After how many epochs the weights that are kept were reached, where there is
            validation data, else None: the last.
        accuracy_before: By class, on the validation data, or None.
        accuracy_after: The same afterwards.
        group_weights: Multiplier of each group at the end.
        seconds: How long it took.
    """

    status: Status
    steps: int
    trained: tuple[str, ...]
    trained_count: int
    total_count: int
    losses: tuple[float, ...] = ()
    validation_losses: tuple[float, ...] = ()
    kept_epoch: int | None = None
    accuracy_before: Accuracy | None = None
    accuracy_after: Accuracy | None = None
    group_weights: Mapping[int, float] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def share(self) -> float:
        """The share of the parameters that was trained."""
        return self.trained_count / max(self.total_count, 1)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, with the worst class of each accuracy."""
        data = dataclasses.asdict(self)
        for name in ("accuracy_before", "accuracy_after"):
            found = getattr(self, name)
            if found is not None:
                data[name] |= {"mean": found.mean, "worst": list(found.worst)}
        return {**data, "share": self.share}
