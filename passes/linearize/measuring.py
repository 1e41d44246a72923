"""Which batches fine-tuning trains on, and on which it is measured, by what truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphopt.batches import Batch, read_batch, takes_targets
from graphopt.errors import UsageError
from graphopt.passes.linearize.impact import Truth, are_labels, has_classes
from graphopt.training.objective import Imitated, Scores, class_axis
from graphopt.training.reading import arguments, only_targets
from graphopt.training.surroundings import surroundings

Place = Literal["validation", "held out", "training"]
# Lists of fewer batches are not split, and so many are read of data that can't be.
_FEWEST, _MOST = 5, 32


@dataclass(frozen=True)
class Measured:
    """What is trained on, and what is measured on.

    Attributes:
        data: The batches to train on.
        validation: Batches by which the best weights are chosen, in the form that `train` takes;
            None: the last are kept.
        place: Where accuracy is measured.
        labelled: Pairs of inputs and right classes.
        truth: Where these classes are from; None: there are no classes, and no pairs.
        imitated: What is imitated of the teacher.
        has_labels: Whether the batches to train on come with labels.
    """

    data: Iterable[Any]
    validation: list[Any] | None
    place: Place
    labelled: list[tuple[Any, Tensor]]
    truth: Truth | None
    imitated: Imitated
    has_labels: bool


def measured(
    module: nn.Module,
    teacher: nn.Module,
    data: Iterable[Any],
    validation: Iterable[Any] | None,
    held_out: float,
    loss: Callable[..., Any] | None,
    scores: Scores,
    imitated: Literal["auto"] | Imitated,
) -> Measured:
    """Split the data, and find out what its batches are.

    Raises:
        UsageError: A batch is missing, or targets that the loss takes.
        InputMismatch: The teacher doesn't take a batch.
    """
    data, rows, place = split(data, validation, held_out)
    if not rows:
        raise UsageError("the data holds no batch", hint="a list or a DataLoader of batches")
    count = arguments(module)
    batches = [_read(row, loss, count) for row in rows]
    taught = _taught(module, teacher, batches, scores)
    labels = [
        each.targets if scored is not None and _fit(each.targets, scored) else None
        for each, scored in zip(batches, taught, strict=True)
    ]
    found = imitated if imitated != "auto" else _imitated(batches, taught)
    truth: Truth | None = None
    classes: list[Tensor] = []
    if all(each is not None for each in labels):
        truth, classes = "labels", [each for each in labels if each is not None]
    elif found == "scores":
        truth = "source"
        classes = [s.argmax(class_axis(s)) for s in taught if s is not None]
    labelled = list(zip([_inputs(b) for b in batches], classes, strict=True)) if truth else []
    chosen = None if place == "training" else _validation(rows, batches, labelled, loss)
    own = truth == "labels" and (place != "validation" or _is_paired(data, loss, count))
    return Measured(data, chosen, place, labelled, truth, found, own)


def split(
    data: Iterable[Any], validation: Iterable[Any] | None, share: float
) -> tuple[Iterable[Any], list[Any], Place]:
    """What to train on, what to measure on, and what the latter is."""
    if validation is not None:
        return data, list(validation), "validation"
    iterator = iter(data)
    if share and iterator is data:
        return iterator, list(itertools.islice(iterator, 1)), "held out"
    if share and isinstance(data, Sequence) and len(data) >= _FEWEST:
        kept, held = parts(data, share)
        return kept, held, "held out"
    some = list(itertools.islice(iterator, _MOST))
    if iterator is data:
        data = itertools.chain(some, iterator)
    return data, some, "training"


def parts(batches: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Batches in two parts, the second of about that share, evenly spread."""
    count = min(len(batches) - 1, max(1, round(share * len(batches))))
    places = {int((i + 0.5) * len(batches) / count) for i in range(count)}
    kept = [each for i, each in enumerate(batches) if i not in places]
    return kept, [each for i, each in enumerate(batches) if i in places]


def _read(row: Any, loss: Callable[..., Any] | None, count: int) -> Batch:
    """A batch with its targets, also where no loss takes them."""
    if loss is None and _is_pair(row) and count != 2:
        return read_batch(row, only_targets, count)
    if loss is not None and takes_targets(loss) and not _is_pair(row):
        raise UsageError(
            "loss takes outputs and targets, but a batch is no pair (inputs, targets)",
            hint="pairs, or no loss: the teacher is enough",
        )
    return read_batch(row, loss, count)


def _is_pair(row: Any) -> bool:
    return isinstance(row, (tuple, list)) and len(row) == 2


def _is_paired(data: Iterable[Any], loss: Callable[..., Any] | None, count: int) -> bool:
    """Whether the data to train on has labels, as the validation data has."""
    if loss is not None:
        return takes_targets(loss)
    if iter(data) is data:
        return False  # a look would use a batch up
    first = next(iter(data), None)
    return first is not None and are_labels(_read(first, None, count).targets)


def _taught(
    module: nn.Module, teacher: nn.Module, batches: Sequence[Batch], scores: Scores
) -> list[Tensor | None]:
    """The teacher's class scores for each batch; None where it gives none."""
    found: list[Tensor | None] = []
    with surroundings(module, teacher, ()), torch.no_grad():
        for batch in batches:
            outputs = batch.outputs(teacher, "validation")
            try:
                scored = scores(outputs)
            except UsageError:
                found.append(None)
                continue
            found.append(scored if has_classes(scored) else None)
    return found


def _fit(targets: Any, scored: Tensor) -> bool:
    """Whether targets are a label for each row of scores."""
    axis = class_axis(scored) % scored.dim()
    shape = (*scored.shape[:axis], *scored.shape[axis + 1 :])
    return are_labels(targets) and tuple(targets.shape) == shape


def _imitated(batches: Sequence[Batch], taught: Sequence[Tensor | None]) -> Imitated:
    floating = any(isinstance(b.targets, Tensor) and not are_labels(b.targets) for b in batches)
    return "values" if floating or any(each is None for each in taught) else "scores"


def _inputs(batch: Batch) -> Any:
    return batch.kwargs if batch.kwargs else batch.args


def _validation(
    rows: Sequence[Any],
    batches: Sequence[Batch],
    labelled: Sequence[tuple[Any, Tensor]],
    loss: Callable[..., Any] | None,
) -> list[Any]:
    """The form that `train` takes: as the loss wants it; without one pairs of whatever targets."""
    if loss is not None:
        return list(rows)
    return list(labelled) or [(_inputs(batch), None) for batch in batches]
