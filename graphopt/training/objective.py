"""What brief training makes small: a loss on labels, the distance to a teacher, fair to groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.batches import Batch
from graphopt.comparison import probe_loss
from graphopt.errors import InputMismatch, UsageError

Scores = Callable[[Any], Tensor]
Groups = Callable[[Any], Tensor] | Literal["taught"]
Imitated = Literal["scores", "values"]

# A variance that is a smaller share of the mean square says nothing but rounding.
_LEAST_SPREAD = 1e-6


def class_scores(outputs: Any) -> Tensor:
    """The class scores (logits) among a model's outputs.

    Returns:
        ``outputs.logits`` where there is such a thing, else the only floating tensor.

    Raises:
        UsageError: There are several, or none.
    """
    named = outputs.get("logits") if isinstance(outputs, Mapping) else None
    found = getattr(outputs, "logits", named)
    if isinstance(found, Tensor):
        return found
    leaves = [
        leaf
        for leaf in pytree.tree_leaves(outputs)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(leaves) != 1:
        raise UsageError(
            f"the model gives {len(leaves)} floating tensors: which are the class scores?",
            hint="say it: scores=lambda outputs: outputs[0]",
        )
    return leaves[0]


def class_axis(scores: Tensor) -> int:
    """The axis of the classes: 1 of images (N, C, H, W), the last of all else."""
    return 1 if scores.dim() > 3 else -1


def distillation_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` (Hinton et al. 2015).

    Args:
        student: Class scores, (N, C), (N, L, C) or (N, C, H, W).
        teacher: The teacher's, of the same shape.
        temperature: T.

    Returns:
        The mean over everything but the classes, a scalar.

    Raises:
        InputMismatch: The shapes differ.
    """
    if student.shape != teacher.shape:
        raise InputMismatch(
            f"the teacher gives scores of shape {tuple(teacher.shape)}, the model of "
            f"{tuple(student.shape)}"
        )
    axis = class_axis(student)
    mine = F.log_softmax(student / temperature, axis)
    aims = F.log_softmax(teacher.to(student.dtype) / temperature, axis)
    apart = F.kl_div(mine, aims, reduction="none", log_target=True).sum(axis)
    return temperature**2 * apart.mean()


def matching_loss(outputs: Any, taught: Any) -> Tensor:
    """Squared distance from a teacher's outputs, relative to their spread: nothing is a class.

    Each floating tensor counts ``mean((y - t)^2) / var(t)``, with the variance over all elements
    of the batch's t, so that neither the unit nor the size of an output matters.

    Args:
        outputs: Tensors in any structure.
        taught: The teacher's, of the same structure and shapes.

    Returns:
        The mean over the floating tensors, a scalar.

    Raises:
        InputMismatch: Structures or shapes differ.
        UsageError: There is no floating tensor.
    """
    mine, aims = (_floating(each) for each in (outputs, taught))
    shapes = [[tuple(t.shape) for t in each] for each in (mine, aims)]
    if shapes[0] != shapes[1]:
        raise InputMismatch(f"the teacher gives {shapes[1]}, the model {shapes[0]}")
    if not mine:
        raise UsageError("the model gives no floating tensor to imitate")
    parts = [F.mse_loss(y, t.to(y.dtype)) / _spread(t) for y, t in zip(mine, aims, strict=True)]
    return torch.stack(parts).mean()


def _floating(outputs: Any) -> list[Tensor]:
    leaves = pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _spread(values: Tensor) -> float:
    """The variance over all elements; what hardly varies is measured by its size instead."""
    values = values.detach().double()
    size = float(values.square().mean())
    variance = float(values.var(correction=0)) if values.numel() > 1 else size
    return variance if variance > _LEAST_SPREAD * size else size or 1.0


@dataclass(frozen=True)
class Objective:
    """The loss of a batch.

    Attributes:
        has_loss: Whether batches carry a loss of the user's.
        distils: Whether there is a teacher.
        temperature: Of the distillation.
        label_share: Weight of the user's loss beside a teacher, in [0, 1]; the teacher's is the
            rest.
        scores: Finds the class scores among outputs.
        imitated: Whether these are imitated, by `distillation_loss`, or all ``values``, by
            `matching_loss`.
    """

    has_loss: bool
    distils: bool
    temperature: float
    label_share: float
    scores: Scores
    imitated: Imitated = "scores"

    def __call__(self, batch: Batch, outputs: Any, taught: Any) -> Tensor:
        """The objective, a scalar.

        Args:
            batch: The batch; its loss takes the outputs, and its targets.
            outputs: The model's.
            taught: The teacher's, or None.
        """
        if not self.distils:
            return batch.loss(outputs, probe_loss)
        apart = self._apart(outputs, taught)
        if not self.has_loss or self.label_share == 0:
            return apart
        labels = batch.loss(outputs, probe_loss)
        return self.label_share * labels + (1 - self.label_share) * apart

    def _apart(self, outputs: Any, taught: Any) -> Tensor:
        """The distance from the teacher."""
        if self.imitated == "values":
            return matching_loss(outputs, taught)
        return distillation_loss(self.scores(outputs), self.scores(taught), self.temperature)


@dataclass
class GroupWeights:
    """Multipliers that keep the loss of every group at or below the mean loss, by dual ascent.

    The Lagrangian of ``min L`` subject to ``L_g <= L`` for each group g is
    ``L + sum_g w_g (L_g - L)``; after each step ``w_g`` becomes ``max(0, w_g + rate (L_g - L))``.
    A network that was made smaller loses most on classes that are few or hard, and this is the
    counterweight. Where the weights add up to more than 1 the Lagrangian asks for a larger mean
    loss, and has no minimum; held at ``sum_g w_g <= 1`` it is the dual of
    ``min L + max(0, max_g (L_g - L))``, whose minimum is that of the largest of the losses (group
    DRO; Sagawa et al. 2020).

    Attributes:
        rate: Step of the ascent; 0 leaves all weights at zero.
        limit: Of the sum of the weights, kept by Euclidean projection.
        weights: Group -> multiplier.
    """

    rate: float
    limit: float = math.inf
    weights: dict[int, float] = field(default_factory=dict)

    def lagrangian(self, mean: Tensor, losses: Mapping[int, Tensor]) -> Tensor:
        """The loss to descend on.

        Args:
            mean: The loss L of the batch.
            losses: The losses L_g of the groups in it.
        """
        total = mean
        for group, loss in losses.items():
            weight = self.weights.get(group, 0.0)
            if weight:
                total = total + weight * (loss - mean)
        return total

    def ascend(self, mean: Tensor, losses: Mapping[int, Tensor]) -> None:
        """Raise the weights of groups above the mean, lower those below."""
        for group, loss in losses.items():
            moved = self.weights.get(group, 0.0) + self.rate * float(loss.detach() - mean.detach())
            self.weights[group] = max(0.0, moved)
        if sum(self.weights.values()) > self.limit:
            self._project()

    def _project(self) -> None:
        """Move to the nearest weights that keep the limit: all down by as much, down to zero."""
        total = down = 0.0
        for count, weight in enumerate(sorted(self.weights.values(), reverse=True), 1):
            if weight <= (total + weight - self.limit) / count:
                break
            total += weight
            down = (total - self.limit) / count
        self.weights = {group: max(0.0, w - down) for group, w in self.weights.items()}


def rows_of(value: Any, rows: Tensor, size: int) -> Any:
    """The same tree with some rows of all tensors that have as many as the batch."""

    def some(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() and leaf.shape[0] == size
        return leaf[rows.to(leaf.device)] if whole else leaf

    return pytree.tree_map(some, value)


def read_groups(groups: Groups, batch: Batch, likeliest: Tensor | None = None) -> Tensor:
    """The group of each row of a batch, (N,) int64.

    Args:
        groups: A function of the targets, or ``taught``.
        batch: The batch.
        likeliest: The teacher's classes, which are the groups under ``taught``.

    Raises:
        UsageError: Groups are not one whole number per row.
    """
    if groups == "taught":
        found = likeliest
    elif batch.targets is None:
        raise UsageError("groups need targets", hint="data of pairs (inputs, targets)")
    else:
        found = groups(batch.targets)
    if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
        raise UsageError(
            "groups gives one whole number for each row of the targets",
            hint="for example groups=lambda targets: targets, the class itself",
        )
    return found.detach().to(torch.int64).cpu()
