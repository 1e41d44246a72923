"""How often each class is told rightly: a mean hides the class that pays for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.batches import read_batch
from graphopt.ir.untouched import buffers_kept
from graphopt.training.objective import Scores, class_axis, class_scores
from graphopt.training.reading import only_targets
from graphopt.training.surroundings import surroundings


@dataclass(frozen=True)
class Accuracy:
    """Right answers by class.

    Attributes:
        classes: (class, right answers, examples) of each class that occurs, rising.
    """

    classes: tuple[tuple[int, int, int], ...]

    @property
    def mean(self) -> float:
        """Share of right answers among all examples."""
        return sum(right for _, right, _ in self.classes) / sum(n for *_, n in self.classes)

    def of(self, label: int) -> float:
        """Share of right answers among the examples of one class."""
        return next(right / n for each, right, n in self.classes if each == label)

    @property
    def worst(self) -> tuple[int, float]:
        """The class that is told rightly the least often, and how often."""
        return min(((c, right / n) for c, right, n in self.classes), key=lambda pair: pair[1])

    def largest_drop(self, after: Accuracy) -> tuple[int, float]:
        """The class that lost the most, and how much of [0, 1]."""
        return max(
            ((c, self.of(c) - after.of(c)) for c, *_ in self.classes), key=lambda pair: pair[1]
        )


class Tally:
    """Counts right answers over batches."""

    def __init__(self) -> None:
        self.counts: dict[int, list[int]] = {}

    def add(self, scores: Tensor, targets: object) -> None:
        """Count a batch, unless its targets are no classes; negative ones count for nothing."""
        if not isinstance(targets, Tensor) or targets.is_floating_point():
            return
        found = scores.detach().argmax(class_axis(scores))
        if found.shape != targets.shape:
            return
        right = (found == targets.to(found.device)).flatten().cpu()
        labels = targets.flatten().cpu()
        for label in torch.unique(labels).tolist():
            mine = labels == label
            if label >= 0:
                count = self.counts.setdefault(label, [0, 0])
                count[0] += int(right[mine].sum())
                count[1] += int(mine.sum())

    def result(self) -> Accuracy | None:
        """The counts, or None where there were no classes."""
        found = tuple((label, *map(int, self.counts[label])) for label in sorted(self.counts))
        return Accuracy(found) if found else None  # type: ignore[arg-type]


@torch.no_grad()
def accuracy_of(
    module: nn.Module, data: Iterable[Any], *, scores: Scores = class_scores
) -> Accuracy | None:
    """The accuracy of a module in eval mode, by class.

    Args:
        module: The module; it is left as it is.
        data: Pairs ``(inputs, targets)``.
        scores: Finds the class scores among its outputs.

    Returns:
        The accuracy, or None where targets are no classes.
    """
    tally = Tally()
    with surroundings(module, None, ()), buffers_kept(module), torch.no_grad():
        module.eval()
        for each in data:
            batch = read_batch(each, only_targets, 1)
            tally.add(scores(batch.outputs(module, "validation")), batch.targets)
    return tally.result()
