"""The training loop that passes share: brief, seeded, and it leaves everything else alone."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.batches import Batch
from graphopt.errors import NonFiniteError, NothingToTrainError, UsageError
from graphopt.ir.randomness import seed_torch
from graphopt.pipeline import Progress, silent
from graphopt.training.accuracy import Accuracy, Tally
from graphopt.training.objective import (
    Groups,
    GroupWeights,
    Imitated,
    Objective,
    Scores,
    class_axis,
    class_scores,
    read_groups,
    rows_of,
)
from graphopt.training.reading import Batches, Length, arguments, check, chosen, only_targets
from graphopt.training.report import Status, TrainingReport
from graphopt.training.surroundings import ctrl_c, surroundings

MakeOptimizer = Callable[..., torch.optim.Optimizer]
State = list[tuple[Tensor, Tensor]]
"""Tensors that training changes, and copies of what they held."""


def train(
    module: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[..., Any] | None = None,
    teacher: nn.Module | None = None,
    temperature: float = 2.0,
    label_share: float = 0.5,
    parameters: Iterable[str] | None = None,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 1e-3,
    optimizer: MakeOptimizer = torch.optim.Adam,
    groups: Groups | None = None,
    group_rate: float = 0.1,
    group_limit: float = math.inf,
    validation: Iterable[Any] | None = None,
    scores: Scores = class_scores,
    imitated: Imitated = "scores",
    clip: float | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> TrainingReport:
    """Train a module in place, briefly; the rate falls to zero along a cosine.

    The same seed and data give the same weights. The module's modes and gradients, the random
    state and all global modes of torch come out as they went in. Ctrl-C ends the work after the
    step at hand; what was reached is kept, the best of it where there is validation data. After an
    error the weights are what they were before.

    Args:
        module: What is trained, in train mode.
        data: Batches, as `graphopt.optimize` takes them; more than one epoch needs data that can
            be read more than once (a list, a `DataLoader`).
        loss: ``loss(outputs)``, or ``loss(outputs, targets)`` exactly when `data` yields pairs; may
            be left out where there is a teacher.
        teacher: A model whose class scores are imitated, on the same inputs, in eval mode.
        temperature: Of the distillation, see `distillation_loss`.
        label_share: Weight of `loss` beside a teacher, in [0, 1]; the distillation's is the rest.
        parameters: Names of the parameters to train; None: all that require gradients.
        epochs: How often the data is gone through.
        steps: Steps of the optimizer, instead of epochs.
        lr: Learning rate at first.
        optimizer: Makes an optimizer: called with parameters and ``lr=``.
        groups: ``groups(targets)`` gives the group of each row, (N,) whole numbers: their losses
            are held at or below the mean by multipliers. ``taught``: the teacher's classes.
        group_rate: Step of the dual ascent on these: ``w_g += group_rate (L_g - L)``, at least 0.
        group_limit: Of the sum of the multipliers; 1 makes it the fairest that is stable.
        validation: Pairs ``(inputs, targets)``, readable more than once: the weights with the
            smallest loss on it are kept, and accuracies are reported.
        scores: Finds the class scores among a model's outputs.
        imitated: Of the teacher: ``scores``, or all output ``values``, where they are no classes.
        clip: Gradients are scaled down where their norm over all parameters is larger.
        seed: Of everything random.
        progress: Told what goes on.

    Returns:
        What was done.

    Raises:
        UsageError: Options that make no sense, neither a loss nor a teacher.
        NothingToTrainError: No parameter, or none that the loss depends on.
        NonFiniteError: The loss or a gradient is NaN or infinite.
        InputMismatch: The model doesn't take the data.
    """
    check(module, data, loss, teacher, epochs, steps, lr, temperature, label_share)
    if clip is not None and not clip > 0:
        raise UsageError(f"clip={clip} is out of range")
    if groups == "taught" and teacher is None:
        raise UsageError("groups='taught' without a teacher", hint="teacher=, or groups of targets")
    by_targets = groups is not None and groups != "taught"
    pairs = only_targets if loss is None and by_targets else loss
    objective = Objective(
        loss is not None, teacher is not None, temperature, label_share, scores, imitated
    )
    run = _Training(
        module=module,
        teacher=teacher,
        objective=objective,
        batches=Batches(data, pairs, arguments(module)),
        validation=None if validation is None else Batches(validation, loss or only_targets, 0),
        trained=chosen(module, parameters),
        groups=groups,
        weights=GroupWeights(group_rate, group_limit),
        length=Length(epochs, steps, data),
        make=lambda tensors: optimizer(tensors, lr=lr),
        clip=clip,
        progress=progress,
    )
    with surroundings(module, teacher, run.trained.values()):
        seed_torch(seed)
        return run.result()


@dataclass(frozen=True)
class _Best:
    """The state with the smallest loss on the validation data."""

    epoch: int
    state: State
    accuracy: Accuracy | None


class _Training:
    """One run."""

    def __init__(
        self,
        *,
        module: nn.Module,
        teacher: nn.Module | None,
        objective: Objective,
        batches: Batches,
        validation: Batches | None,
        trained: dict[str, nn.Parameter],
        groups: Groups | None,
        weights: GroupWeights,
        length: Length,
        make: Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer],
        clip: float | None,
        progress: Progress,
    ) -> None:
        self.module, self.teacher, self.objective = module, teacher, objective
        self.batches, self.validation = batches, validation
        self.trained, self.weights = trained, weights
        self.groups: Groups | None = groups
        self.length, self.progress = length, progress
        self.optimizer, self.clip = make(list(trained.values())), clip
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = self.epoch = 0
        self.losses: list[float] = []
        self.measured: list[float] = []
        self.best: _Best | None = None

    def result(self) -> TrainingReport:
        """Train, and say what was done."""
        began, first = time.perf_counter(), self._state()
        try:
            before = self._measure()
            status = self._until_over()
            if self.best is not None:
                _restore(self.best.state)
        except BaseException:
            _restore(first)
            raise
        sizes = {id(p): p.numel() for p in self.module.parameters()}
        return TrainingReport(
            status=status,
            steps=self.step,
            trained=tuple(self.trained),
            trained_count=sum({id(p): p.numel() for p in self.trained.values()}.values()),
            total_count=sum(sizes.values()),
            losses=tuple(self.losses),
            validation_losses=tuple(self.measured),
            kept_epoch=None if self.best is None else self.best.epoch,
            accuracy_before=before,
            accuracy_after=None if self.best is None else self.best.accuracy,
            group_weights=dict(sorted(self.weights.weights.items())),
            seconds=time.perf_counter() - began,
        )

    def _until_over(self) -> Status:
        with ctrl_c() as stopped:
            try:
                while not self.length.is_over(self.step, self.epoch) and not stopped.is_set():
                    if not self._pass(stopped):
                        return "out of data"
                    self.epoch += 1
                    self._measure()
            except KeyboardInterrupt:
                return "interrupted"
            return "interrupted" if stopped.is_set() else "done"

    def _pass(self, stopped: threading.Event) -> bool:
        """Go through the data once; whether that was what was wanted of it."""
        self.module.train()
        values = []
        for batch in self.batches:
            values.append(self._stepped(batch))
            self.progress(f"training, loss {values[-1]:.4g}", self._done())
            if stopped.is_set() or (not self.length.by_epochs and self._is_over()):
                break
        if not self.step:
            raise UsageError("the data holds no batch", hint="a list or a DataLoader of batches")
        if values:
            self.losses.append(sum(values) / len(values))
        return stopped.is_set() or self.length.by_epochs or not self.length.once or self._is_over()

    def _is_over(self) -> bool:
        return self.length.is_over(self.step, self.epoch)

    def _done(self) -> float:
        return self.length.done(self.step, self.epoch)

    def _stepped(self, batch: Batch) -> float:
        """One step of the optimizer; gives the loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (1 + math.cos(math.pi * self._done())) / 2
        outputs, taught = self._outputs(batch)
        value = self.objective(batch, outputs, taught)
        _check_finite(value, f"the loss is {float(value.detach()):.4g} in step {self.step}")
        by_group = self._by_group(batch, outputs, taught)
        self._descend(self.weights.lagrangian(value, by_group))
        self.weights.ascend(value, by_group)
        self.step += 1
        return float(value.detach())

    def _descend(self, value: Tensor) -> None:
        tensors = list(self.trained.values())
        if not value.requires_grad:
            raise NothingToTrainError("the loss depends on none of the parameters to train")
        gradients = torch.autograd.grad(value, tensors, allow_unused=True)
        for name, tensor, gradient in zip(self.trained, tensors, gradients, strict=True):
            if gradient is not None:
                _check_finite(gradient, f"the gradient of {name} is not finite, step {self.step}")
            tensor.grad = gradient
        if self.clip is not None:
            nn.utils.clip_grad_norm_(tensors, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _by_group(self, batch: Batch, outputs: Any, taught: Any) -> dict[int, Tensor]:
        if self.groups is None:
            return {}
        found = read_groups(self.groups, batch, self._likeliest(taught))
        losses = {}
        for group in torch.unique(found).tolist():
            rows = torch.nonzero(found == group).flatten()
            part = Batch((), {}, batch.criterion, rows_of(batch.targets, rows, len(found)))
            some = (rows_of(each, rows, len(found)) for each in (outputs, taught))
            losses[group] = self.objective(part, *some)
        return losses

    def _likeliest(self, taught: Any) -> Tensor | None:
        """The teacher's classes, where these are the groups."""
        if self.groups != "taught":
            return None
        scores = self.objective.scores(taught)
        return scores.argmax(class_axis(scores))

    def _outputs(self, batch: Batch) -> tuple[Any, Any]:
        taught = None
        if self.teacher is not None:
            with torch.no_grad():
                taught = batch.outputs(self.teacher, "training")
        return batch.outputs(self.module, "training"), taught

    @torch.no_grad()
    def _measure(self) -> Accuracy | None:
        """Loss and accuracy on the validation data; keeps the state where it is the best."""
        if self.validation is None:
            return None
        tally, values, rows = Tally(), 0.0, 0
        self.module.eval()
        for batch in self.validation:
            outputs, taught = self._outputs(batch)
            size = len(batch.targets) if isinstance(batch.targets, Tensor) else 1
            values += size * float(self.objective(batch, outputs, taught))
            rows += size
            if isinstance(batch.targets, Tensor):
                self._count(tally, outputs, batch.targets)
        if not rows:
            raise UsageError("the validation data holds no batch, or can be read only once")
        self.measured.append(values / rows)
        accuracy = tally.result()
        if self.best is None or self.measured[-1] < min(self.measured[:-1]):
            self.best = _Best(self.epoch, self._state(), accuracy)
        return accuracy

    def _count(self, tally: Tally, outputs: Any, targets: Tensor) -> None:
        with contextlib.suppress(UsageError):  # outputs without class scores have no accuracy
            tally.add(self.objective.scores(outputs), targets)

    def _state(self) -> State:
        tensors = [*self.trained.values(), *self.module.buffers()]
        return [(tensor, tensor.detach().clone()) for tensor in tensors]


@torch.no_grad()
def _restore(state: State) -> None:
    for tensor, value in state:
        tensor.copy_(value)


def _check_finite(value: Tensor, message: str) -> None:
    if not bool(value.detach().isfinite().all()):
        raise NonFiniteError(message, hint="a smaller lr; are data and targets finite?")
