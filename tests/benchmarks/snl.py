"""Selective Network Linearization (Cho et al., ICML 2022), as the paper trains it: a rival.

Every element of every ReLU gets a slope a, ``a relu(x) + (1 - a) x``. Slopes and weights are
trained together on labels, distillation and ``penalty * sum |a|``; the penalty grows by a tenth
after an epoch without a new least count of slopes above 0.01 (not in the first five). Once few
enough are left, or the epochs are over, the largest slopes become one, all others zero, and the
weights are tuned further. Everything is trained on labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from graphopt.training import distillation_loss

Batches = Iterable[tuple[Tensor, Tensor]]
_RELUS = (torch.relu, F.relu, Tensor.relu)
_THRESHOLD, _GROWTH, _PATIENT = 1e-2, 1.1, 5
_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Settings:
    """How the slopes are trained.

    Attributes:
        rate: Adam's rate for weights; the paper's is 1e-3.
        slope_rate: The same for slopes; the paper's is 1e-3.
        penalty: The first one; the paper's is 1e-5.
        epochs: At most so many.
    """

    rate: float = 1e-3
    slope_rate: float = 1e-3
    penalty: float = 1e-5
    epochs: int = 12


PAPER = Settings()
# The paper takes up to 2,000 epochs; so few steps can't bring a slope from 1 to 0 at its rate.
HASTENED = Settings(slope_rate=1e-2, penalty=1e-3)


class Sloped(nn.Module):
    """A network whose ReLUs have slopes, one for each element of a call.

    Attributes:
        network: The network; its ReLUs are the calls of ``torch.relu`` and the like.
        slopes: By the order of the calls, ``[1, channels, height, width]``.
    """

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        with torch.no_grad(), _Intercepted(lambda _, x: F.relu(x)) as seen:
            self.network(example)
        self.slopes = nn.ParameterList(torch.ones(1, *shape[1:]) for shape in seen.shapes)

    def forward(self, x: Tensor) -> Any:
        """The network's output."""
        with _Intercepted(self._sloped):
            return self.network(x)

    def _sloped(self, index: int, x: Tensor) -> Tensor:
        return x + self.slopes[index] * (F.relu(x) - x)

    def count(self) -> int:
        """Slopes that are not as good as zero."""
        return sum(int((slope > _THRESHOLD).sum()) for slope in self.slopes)

    @torch.no_grad()
    def binarize(self, budget: int) -> None:
        """The largest slopes become one, the others zero, and none is trained any more."""
        largest = torch.cat([slope.flatten() for slope in self.slopes]).topk(budget)
        chosen = torch.zeros(sum(slope.numel() for slope in self.slopes))
        chosen[largest.indices] = 1.0
        parts = chosen.split([slope.numel() for slope in self.slopes])
        for slope, part in zip(self.slopes, parts, strict=True):
            slope.copy_(part.view_as(slope))
            slope.requires_grad_(False)


class _Intercepted(TorchFunctionMode):
    """Calls of ReLU, numbered, go to a function of their number and input."""

    def __init__(self, function: Callable[[int, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.shapes: list[torch.Size] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _RELUS:
            return func(*args, **(kwargs or {}))
        self.shapes.append(args[0].shape)
        return self.function(len(self.shapes) - 1, args[0])


def linearized(
    network: nn.Module, batches: Batches, example: Tensor, budget: int, settings: Settings
) -> tuple[Sloped, int]:
    """A network with so many ReLUs, before its last fine-tuning, and how many epochs it took."""
    student = Sloped(network, example).train()
    optimizer = torch.optim.Adam(
        [
            {"params": student.network.parameters(), "lr": settings.rate},
            {"params": student.slopes.parameters(), "lr": settings.slope_rate},
        ]
    )
    penalty, least, taken = settings.penalty, student.count(), 0
    for taken in range(1, settings.epochs + 1):
        for images, labels in batches:
            loss = loss_of(student, network, images, labels)
            loss = loss + penalty * sum(slope.abs().sum() for slope in student.slopes)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        count = student.count()
        if count <= budget:
            break
        if count >= least and taken >= _PATIENT:
            penalty *= _GROWTH
        least = min(least, count)
    student.binarize(budget)
    return student, taken


def loss_of(student: nn.Module, teacher: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Labels and distillation, as the paper adds them up."""
    scores = student(images)
    with torch.no_grad():
        taught = teacher(images)
    return F.cross_entropy(scores, labels) + distillation_loss(scores, taught, _TEMPERATURE)


def tuned(
    student: Sloped, teacher: nn.Module, batches: Batches, epochs: int, rate: float
) -> Sloped:
    """The weights trained further, by SGD whose rate falls to zero as a cosine does."""
    student.train()
    weights = [p for p in student.network.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(weights, rate, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(epochs, 1))
    for _ in range(epochs):
        for images, labels in batches:
            optimizer.zero_grad()
            loss_of(student, teacher, images, labels).backward()
            optimizer.step()
        schedule.step()
    return student.eval()
