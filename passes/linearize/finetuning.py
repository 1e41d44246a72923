"""Brief fine-tuning of a linearized module: distillation, fair to classes where asked."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from graphopt.errors import ModelError, UsageError
from graphopt.passes.linearize.impact import Impact, impact
from graphopt.passes.linearize.measuring import Measured, Place, measured
from graphopt.pipeline import Progress, silent
from graphopt.plain import to_plain
from graphopt.training import TrainingReport, accuracy_of, class_scores, train
from graphopt.training.objective import Groups, Imitated, Scores
from graphopt.training.reading import check

# Step of the dual ascent; of a distillation whose loss is some units, larger ones swing.
_RATE = 0.003


def sgd(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Stochastic gradient descent with momentum 0.9 and a weight decay of 1e-4."""
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-4)


@dataclass(frozen=True)
class FinetuneReport:
    """What fine-tuning did, and to whom.

    Attributes:
        training: Steps, losses, and how it ended.
        imitated: Of the teacher: class ``scores``, or all output ``values``.
        measured_on: Where accuracy was measured: on ``validation`` data, on a part of the data
            that was ``held out``, or on ``training`` data itself.
        change: The module's accuracy by class, before and after; None where nothing is a class.
        against_teacher: The teacher's accuracy by class, and the module's after.
        warnings: What a user should know, such as a class that lost much more than the others.
    """

    training: TrainingReport
    imitated: Imitated
    measured_on: Place
    change: Impact | None = None
    against_teacher: Impact | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**to_plain(self), "training": to_plain(self.training.to_dict())}

    def summary(self) -> str:
        """A few lines for people."""
        ended = f"{self.training.steps} steps, {self.training.seconds:.1f} s, "
        lines = [ended + self.training.status]
        if self.change is not None and self.against_teacher is not None:
            lines += [
                f"by fine-tuning: {self.change.summary()} (on {self.measured_on} data)",
                f"against the teacher: {self.against_teacher.summary()}",
            ]
        return "\n".join([*lines, *self.warnings])


def finetune(
    module: nn.Module,
    data: Iterable[Any],
    *,
    teacher: nn.Module,
    loss: Callable[..., Any] | None = None,
    epochs: int = 4,
    steps: int | None = None,
    lr: float = 0.02,
    optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    temperature: float = 4.0,
    label_share: float = 0.5,
    imitated: Literal["auto"] | Imitated = "auto",
    fair: bool | float = False,
    validation: Iterable[Any] | None = None,
    held_out: float = 0.1,
    parameters: Iterable[str] | None = None,
    scores: Scores = class_scores,
    clip: float | None = 10.0,
    seed: int = 0,
    progress: Progress = silent,
) -> FinetuneReport:
    """Train a linearized module in place to do what its source does; labels are optional.

    Weights and the coefficients of replacements (``_graphopt.*``) are trained together, in train
    mode, by distillation (Hinton et al. 2015), with a rate that falls to zero along a cosine.
    Modes, gradients, the random state and the teacher come out as they went in; after an error
    the weights are what they were; Ctrl-C keeps what was reached, the best of it where something
    was held out.

    A network with fewer non-linearities loses most on classes that are few or hard. The report
    tells the change of each class, and `fair` holds the loss of every class at or below the mean
    one by multipliers (dual ascent; Tran et al. 2022, "Pruning has a disparate impact").

    Args:
        module: What is trained, such as `graphopt.optimize` gave.
        data: Batches of inputs, or pairs ``(inputs, targets)``; more than one epoch needs data that
            can be read more than once.
        teacher: The source, with weights of its own.
        loss: ``loss(outputs)``, or ``loss(outputs, targets)`` exactly when `data` yields pairs;
            None: distillation alone.
        epochs: How often the data is gone through.
        steps: Steps of the optimizer, instead of epochs.
        lr: Learning rate at first.
        optimizer: Makes an optimizer: called with parameters and ``lr=``.
        temperature: Of the distillation.
        label_share: Weight of `loss` in [0, 1]; the distillation's is the rest.
        imitated: Class ``scores`` (by softened probabilities) or all output ``values`` (by squared
            error relative to their variance), for regression and embeddings. ``auto``: values
            where targets are floating, or where no output can be the scores of several classes.
        fair: Hold classes at or below the mean loss: labels where there are some, else the
            teacher's classes. A number is the step of the ascent.
        validation: Batches on which accuracy is measured and the best weights are chosen, readable
            more than once.
        held_out: Share of the batches of a list that is kept for that where there is no validation
            data; of an iterator that can be read only once it is the first batch. Batches that are
            made anew (a `DataLoader`), and lists of fewer than five, are not split: accuracy is
            measured on data that is trained on, and the last weights are kept.
        parameters: Names of the parameters to train; None: all that require gradients.
        scores: Finds the class scores among outputs.
        clip: Largest norm of the gradient; larger ones are scaled down. None: none is.
        seed: Of everything random.
        progress: Told what goes on.

    Returns:
        What was done, with the change of accuracy by class.

    Raises:
        UsageError: Options that make no sense; the teacher shares weights with the module; `fair`
            where there are no classes.
        NonFiniteError: The loss or a gradient is NaN or infinite.
        InputMismatch: The module or the teacher doesn't take the data.
    """
    check(module, data, loss, teacher, epochs, steps, lr, temperature, label_share)
    _check(module, teacher, imitated, fair, held_out)
    rows = measured(module, teacher, data, validation, held_out, loss, scores, imitated)
    groups = _groups(rows, fair)
    before = _accuracy(module, rows, scores)
    training = train(
        module, rows.data, loss=loss, teacher=teacher, temperature=temperature,
        label_share=label_share, parameters=parameters, epochs=epochs, steps=steps, lr=lr,
        optimizer=optimizer, groups=groups, group_rate=_RATE if fair is True else float(fair),
        group_limit=1.0, validation=rows.validation, scores=scores, imitated=rows.imitated,
        clip=clip, seed=seed, progress=progress,
    )  # fmt: skip
    progress("measuring the classes")
    return _report(training, rows, before, _accuracy(module, rows, scores), teacher, scores)


def _check(module: nn.Module, teacher: Any, imitated: str, fair: Any, held_out: float) -> None:
    if not isinstance(teacher, nn.Module):
        raise ModelError(f"expected a torch.nn.Module as teacher, got {type(teacher).__name__}")
    shared = {id(p) for p in teacher.parameters()}
    for name, parameter in module.named_parameters():
        if id(parameter) in shared:
            raise UsageError(
                f"the module and the teacher share the weight {name}",
                hint="teacher=copy.deepcopy(source), or optimize without inplace=True",
            )
    for text, right in {
        f"imitated={imitated!r}": imitated in ("auto", "scores", "values"),
        f"fair={fair}": isinstance(fair, bool) or fair >= 0,
        f"held_out={held_out}": 0 <= held_out < 1,
    }.items():
        if not right:
            raise UsageError(f"{text} is out of range")


def _groups(rows: Measured, fair: bool | float) -> Groups | None:
    if not fair:
        return None
    if rows.has_labels:
        return _own
    if rows.imitated == "values":
        raise UsageError(
            "fair= where nothing is a class",
            hint="data of pairs with integer labels, or imitated='scores'",
        )
    return "taught"


def _own(targets: Any) -> Any:
    """The groups of labels: the classes."""
    return targets


def _accuracy(module: nn.Module, rows: Measured, scores: Scores) -> Any:
    return None if rows.truth is None else accuracy_of(module, rows.labelled, scores=scores)


def _report(
    training: TrainingReport,
    rows: Measured,
    before: Any,
    after: Any,
    teacher: nn.Module,
    scores: Scores,
) -> FinetuneReport:
    if rows.truth is None or before is None or after is None:
        return FinetuneReport(training, rows.imitated, rows.place)
    taught = _accuracy(teacher, rows, scores)
    change, against = impact(before, after, rows.truth), impact(taught, after, rows.truth)
    told = [text for text in (against.uneven(),) if text is not None]
    for text in told:
        warnings.warn(f"{text}; fair=True holds them together", stacklevel=3)
    return FinetuneReport(training, rows.imitated, rows.place, change, against, tuple(told))
