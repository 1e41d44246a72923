"""What a change costs each class: a mean hides the one that pays for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.training import Accuracy
from graphopt.training.accuracy import Tally
from graphopt.training.objective import class_axis

Truth = Literal["labels", "source"]
# How much more than the mean a class may lose, besides twice the error of its estimate.
_UNEVEN = 0.05


@dataclass(frozen=True)
class ClassChange:
    """One class.

    Attributes:
        label: The class.
        examples: How many examples were seen.
        before: Share that was told rightly.
        after: Share that is now.
    """

    label: int
    examples: int
    before: float
    after: float

    @property
    def change(self) -> float:
        """What was gained, negative where it was lost."""
        return self.after - self.before

    @property
    def error(self) -> float:
        """Standard error of `after`, with one success and one failure added (Agresti-Coull)."""
        share = (self.after * self.examples + 1) / (self.examples + 2)
        return math.sqrt(share * (1 - share) / (self.examples + 2))


@dataclass(frozen=True)
class Impact:
    """How accuracy changed, by class.

    Attributes:
        truth: What is right: ``labels``, or what the ``source`` says where there are none.
        before: Accuracy over all examples.
        after: The same afterwards.
        worst: The class that lost the most, or gained the least.
        worst_change: Its change.
        classes: Each class that occurs, rising.
    """

    truth: Truth
    before: float
    after: float
    worst: int
    worst_change: float
    classes: tuple[ClassChange, ...]

    @property
    def change(self) -> float:
        """Change of the accuracy over all examples."""
        return self.after - self.before

    def summary(self) -> str:
        """One line for people."""
        what = "accuracy" if self.truth == "labels" else "agreement with the source"
        return (
            f"{what} {100 * self.before:.1f} % -> {100 * self.after:.1f} % "
            f"({100 * self.change:+.1f}); worst class {self.worst}: "
            f"{100 * self.worst_change:+.1f}"
        )

    def uneven(self) -> str | None:
        """What to warn of: a class that lost clearly more than all together did."""
        each = min(self.classes, key=lambda c: c.change + 2 * c.error)
        if each.change + 2 * each.error + _UNEVEN >= min(self.change, 0.0):
            return None
        return (
            f"class {each.label} lost {-100 * each.change:.1f} points of accuracy, all classes "
            f"together {max(0.0, -100 * self.change):.1f}"
        )


def impact(before: Accuracy, after: Accuracy, truth: Truth) -> Impact:
    """Compare two accuracies on the same examples."""
    classes = tuple(
        ClassChange(label, count, right / count, after.of(label))
        for label, right, count in before.classes
    )
    worst = min(classes, key=lambda c: c.change)
    return Impact(truth, before.mean, after.mean, worst.label, worst.change, classes)


def impact_of(
    expected: Sequence[Sequence[Any]], got: Sequence[Sequence[Any]], targets: Sequence[Any]
) -> Impact | None:
    """Compare outputs by class.

    Args:
        expected: The source's flat outputs for each batch.
        got: The same of the result.
        targets: Of each batch; labels where these are whole numbers, one for each row of scores.

    Returns:
        The change by labels, else by the class that the source says; None where outputs are not
        class scores.
    """
    pairs = [(_scores(a), _scores(b)) for a, b in zip(expected, got, strict=True)]
    if not pairs or any(a is None or b is None for a, b in pairs):
        return None
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    labels = [_labels(truth, a) for truth, (a, _) in zip(targets, known, strict=False)]
    if len(labels) == len(known) and all(each is not None for each in labels):
        found = _counted(known, labels, "labels")
        if found is not None:
            return found
    if any(a.dim() != 2 for a, _ in known):
        return None
    return _counted(known, [a.argmax(1) for a, _ in known], "source")


def _counted(
    pairs: Sequence[tuple[Tensor, Tensor]], labels: Sequence[Tensor | None], truth: Truth
) -> Impact | None:
    tallies = Tally(), Tally()
    for scores, label in zip(pairs, labels, strict=True):
        for tally, each in zip(tallies, scores, strict=True):
            tally.add(each, label)
    before, after = (tally.result() for tally in tallies)
    return None if before is None or after is None else impact(before, after, truth)


def _scores(outputs: Sequence[Any]) -> Tensor | None:
    """The class scores among flat outputs."""
    found = [v for v in outputs if isinstance(v, Tensor) and v.is_floating_point()]
    return found[0] if len(found) == 1 and has_classes(found[0]) else None


def has_classes(scores: Tensor) -> bool:
    """Whether a tensor can be the scores of two or more classes."""
    return scores.dim() > 1 and scores.shape[class_axis(scores)] > 1


def _labels(targets: Any, scores: Tensor) -> Tensor | None:
    """The labels of as many rows as there are scores."""
    if not are_labels(targets) or not targets.dim():
        return None
    return targets[: len(scores)]


def are_labels(targets: Any) -> bool:
    """Whether targets are whole numbers, as class labels are."""
    floating = isinstance(targets, Tensor) and (
        targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool
    )
    return isinstance(targets, Tensor) and not floating
