"""Run a model on inputs of which some units are removed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from graphopt.errors import InputMismatch, NonFiniteError, UsageError
from graphopt.ir.untouched import restored
from graphopt.passes.relevance.judging.baselines import baseline_of
from graphopt.passes.relevance.judging.units import Units, units_of

Model = Callable[..., Any]
Targets = Tensor | int | Literal["argmax"]

OUTPUTS = ("logit", "probability")


@dataclass(frozen=True, eq=False)
class Removal:
    """How parts of the input are removed, and what is watched meanwhile.

    Faithfulness depends on it (Blücher et al. 2024), so methods are compared under one.

    Attributes:
        units: What is removed as one: a patch's side, ``positions``, ``elements`` or a tensor of
            labels; see `units_of`.
        baseline: What stands in its place: ``zero``, ``mean``, ``blur``, a number, the id of a
            mask token or a tensor; see `baseline_of`.
        argument: Which of the inputs is perturbed.
        allowed: Which units may be removed, such as an attention mask without special tokens:
            of the shapes of a relevance, zero or False for what stays; None: all.
        output: ``logit``: the target's output as the model gives it; ``probability``: after
            softmax.
        batch_size: How many perturbed samples the model sees at once.
    """

    units: Any = None
    baseline: Any = "zero"
    argument: int = 0
    allowed: Tensor | None = None
    output: str = "logit"
    batch_size: int = 64


@dataclass(frozen=True, eq=False)
class Experiment:
    """A model on some samples, of which units can be removed.

    Attributes:
        model: Takes the inputs, gives ``(batch, classes)``.
        inputs: All of them; tensors have the samples on axis 0.
        argument: Which of them is perturbed.
        units: Its units.
        baseline: What stands in the place of what is removed; of its shape.
        allowed: ``(samples, units)``, bool.
        targets: ``(samples,)``: the class that is watched.
        relevance: ``(samples, units)``, float64; zeros where none was given.
        output: ``logit`` or ``probability``.
        batch_size: Rows at once.
    """

    model: Model
    inputs: tuple[Any, ...]
    argument: int
    units: Units
    baseline: Tensor
    allowed: Tensor
    targets: Tensor
    relevance: Tensor
    output: str
    batch_size: int

    def scores(self, rows: int, removed_in: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        """What the model gives for the targets on perturbed samples.

        Args:
            rows: How many perturbed samples.
            removed_in: Rows -> which sample each is of, ``(rows,)``, and which units it lacks,
                ``(rows, units)``, bool.

        Returns:
            ``(rows,)``, float64.
        """
        perturbed = self.inputs[self.argument]
        found = []
        for part in torch.arange(rows, device=perturbed.device).split(self.batch_size):
            samples, removed = removed_in(part)
            removed = removed & self.allowed[samples]
            batch = [_rows(value, samples, self.units.batch) for value in self.inputs]
            batch[self.argument] = self.units.perturb(
                perturbed[samples], self.baseline[samples], removed
            )
            found.append(_scores(self.model, batch, self.targets[samples], self.output))
        return torch.cat(found)

    def untouched_scores(self) -> Tensor:
        """On the samples as they are: ``(samples,)``, float64."""
        nothing = torch.zeros_like(self.allowed)
        return self.scores(self.units.batch, lambda rows: (rows, nothing[rows]))


@contextlib.contextmanager
def experiment(
    model: Model,
    inputs: Any,
    targets: Targets,
    removal: Removal | None,
    relevance: Tensor | None = None,
) -> Iterator[Experiment]:
    """Prepare a model and samples; inside, a module is in eval mode and no gradient is kept.

    Args:
        model: A module or any callable: ``model(*inputs) -> (batch, classes)`` or ``(batch,)``.
        inputs: A tensor or a sequence of inputs; what is no tensor is handed on as it is.
        targets: ``argmax`` of the model's own output, a class or one for each sample.
        removal: How parts are removed; None: positions, by zero.
        relevance: What is judged, if anything.

    Raises:
        UsageError: A malformed removal, or a target out of range.
        InputMismatch: Inputs of different batches, a relevance of another shape, or an output
            that isn't one row a sample.
        NonFiniteError: NaN or infinity in the relevance or the outputs.
    """
    removal = removal or Removal()
    inputs = _as_inputs(inputs)
    perturbed = _perturbed(inputs, removal)
    units = units_of(perturbed, removal.units)
    baseline = baseline_of(perturbed, removal.baseline)
    allowed = _allowed(units, removal.allowed, perturbed.device)
    zeros = allowed.new_zeros(allowed.shape, dtype=torch.float64)
    values = zeros if relevance is None else units.gather(relevance).to(allowed.device)
    with evaluating(model), torch.no_grad():
        chosen = targets_of(model, inputs, targets, removal.batch_size)
        yield Experiment(
            model, inputs, removal.argument, units, baseline, allowed, chosen, values,
            removal.output, removal.batch_size,
        )  # fmt: skip


@contextlib.contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put a module into eval mode, and leave it and the random state as they were."""
    if not isinstance(model, nn.Module):
        yield
        return
    with restored(model):
        model.eval()
        yield


def targets_of(model: Model, inputs: Sequence[Any], targets: Targets, batch_size: int) -> Tensor:
    """The class that is watched in each sample, ``(samples,)``."""
    first = next(value for value in inputs if isinstance(value, Tensor))
    rows = torch.arange(len(first), device=first.device)
    if isinstance(targets, str):
        if targets != "argmax":
            raise UsageError(f"targets={targets!r}", hint="'argmax', a class or a tensor of them")
        found = [
            _outputs(model, [_rows(v, part, len(first)) for v in inputs]).argmax(1)
            for part in rows.split(batch_size)
        ]
        return torch.cat(found)
    chosen = torch.as_tensor(targets, device=first.device)
    if chosen.is_floating_point() or chosen.dtype == torch.bool or chosen.dim() > 1:
        raise UsageError("targets must be classes: an integer, or one for each sample")
    if chosen.dim() and len(chosen) != len(first):
        raise InputMismatch(f"{len(chosen)} targets for {len(first)} samples")
    return chosen.long().expand(len(first)).contiguous()


def _as_inputs(inputs: Any) -> tuple[Any, ...]:
    found = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    batches = {len(value) for value in found if isinstance(value, Tensor) and value.dim()}
    if len(batches) != 1:
        raise InputMismatch(
            f"inputs must agree on the batch (axis 0); theirs are {sorted(batches)}"
            if batches
            else "no input is a tensor with a batch"
        )
    return found


def _perturbed(inputs: tuple[Any, ...], removal: Removal) -> Tensor:
    if removal.output not in OUTPUTS:
        raise UsageError(f"output={removal.output!r}", hint=f"one of {OUTPUTS}")
    if not isinstance(removal.batch_size, int) or removal.batch_size < 1:
        raise UsageError(f"batch_size={removal.batch_size!r} must be a positive integer")
    if not 0 <= removal.argument < len(inputs):
        raise UsageError(f"argument={removal.argument}, but there are {len(inputs)} inputs")
    return inputs[removal.argument]


def _allowed(units: Units, allowed: Tensor | None, device: torch.device) -> Tensor:
    if allowed is None:
        return torch.ones(units.batch, units.count, dtype=torch.bool, device=device)
    found = units.gather(allowed, what="allowed").to(device) > 0
    empty = (~found.any(1)).nonzero().flatten().tolist()
    if empty:
        raise UsageError(f"samples {empty[:8]} have no unit that may be removed")
    return found


def _rows(value: Any, rows: Tensor, batch: int) -> Any:
    batched = isinstance(value, Tensor) and value.dim() and len(value) == batch
    return value[rows.to(value.device)] if batched else value


def _outputs(model: Model, batch: Sequence[Any]) -> Tensor:
    out = model(*batch)
    rows = len(next(value for value in batch if isinstance(value, Tensor) and value.dim()))
    if not isinstance(out, Tensor) or out.dim() not in (1, 2) or len(out) != rows:
        shape = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise InputMismatch(
            f"the model gives {shape} for {rows} samples",
            hint="it must give (batch, classes) or (batch,); wrap it, such as "
            "lambda ids: model(ids).logits",
        )
    out = out.detach().to(torch.float64)
    if not torch.isfinite(out).all():
        raise NonFiniteError("the model gives NaN or infinity")
    return out.unsqueeze(1) if out.dim() == 1 else out


def _scores(model: Model, batch: Sequence[Any], targets: Tensor, output: str) -> Tensor:
    out = _outputs(model, batch)
    if int(targets.min()) < 0 or int(targets.max()) >= out.shape[1]:
        raise UsageError(
            f"target {int(targets.max())} is out of range: the model has {out.shape[1]} classes"
        )
    out = out.softmax(1) if output == "probability" else out
    return out.gather(1, targets.to(out.device)[:, None])[:, 0]
