"""How many bits Circa's comparisons can leave out of a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.batches import Batch
from graphopt.errors import InputMismatch, UsageError
from graphopt.ir.program import Program
from graphopt.private.circa import CircaMode, CircaSimulation, program_of, simulate
from graphopt.training.reading import arguments


@dataclass(frozen=True)
class CircaReport:
    """What a search found.

    Attributes:
        truncated_bits: The most low bits that can be left out; None: not even none can.
        loss: What that costs, of [0, 1]; where None, what comparing all bits costs.
        metric: ``accuracy``: right answers lost, by targets; ``agreement``: answers that differ
            from the exact model's.
        tolerance: The loss that was allowed.
        mode: ``poszero`` or ``negpass``.
        fraction_bits: Of fixed-point values.
        ring_bits: Of the shares.
        samples: Answers that were counted.
        tried: (truncated bits, loss), rising.
        exact: Nodes that compare and were evaluated exactly.
    """

    truncated_bits: int | None
    loss: float
    metric: str
    tolerance: float
    mode: str
    fraction_bits: int
    ring_bits: int
    samples: int
    tried: tuple[tuple[int, float], ...]
    exact: tuple[str, ...]


def search(
    model: nn.Module | Program,
    data: Iterable[Any],
    *,
    tolerance: float = 0.01,
    mode: CircaMode = "poszero",
    fraction_bits: int = 15,
    ring_bits: int = 31,
    seed: int = 0,
    most_batches: int = 64,
) -> CircaReport:
    """The most bits that Circa's comparisons can leave out within a tolerance.

    Bisection: the loss is taken to rise with the bits, and the one of the answer was measured.  All
    sizes draw the same numbers, so that a value which is faulty at fewer bits stays so at more.

    Args:
        model: A classifier: its output is one tensor ``[samples, classes]`` or
            ``[samples, classes, ...]``.
        data: Batches: what the model takes, or pairs ``(inputs, targets)`` with integer targets,
            whose accuracy counts then; of a model with two inputs ``((first, second), targets)``.
        tolerance: The loss of accuracy or agreement that is allowed, of [0, 1].
        mode: ``poszero`` or ``negpass``.
        fraction_bits: Of fixed-point values.
        ring_bits: Of the shares.
        seed: Of the faults; the global generator isn't touched.
        most_batches: How many batches are read.

    Raises:
        InputMismatch: There is no batch, or the output is no classes.
        UsageError: A tolerance, bits or a mode that there aren't.
        UnsupportedError: A value doesn't fit the ring.
    """
    if not 0 <= tolerance <= 1:
        raise UsageError(f"a tolerance of {tolerance}: it is a share of answers, 0 to 1")
    count = len(model.signature.inputs) if isinstance(model, Program) else arguments(model)
    batches = [_batch(each, count) for each in itertools.islice(data, most_batches)]
    if not batches:
        raise InputMismatch("data yields no batch", hint="give at least one")
    program = program_of(model, batches[0].args, batches[0].kwargs)
    options: Mapping[str, Any] = {
        "mode": mode, "fraction_bits": fraction_bits, "ring_bits": ring_bits, "seed": seed,
    }  # fmt: skip
    first = simulate(program, truncated_bits=0, **options)
    answers = _Answers(first, batches)
    losses: dict[int, float] = {}

    def fits(bits: int) -> bool:
        simulation = simulate(program, truncated_bits=bits, **options)
        losses[bits] = answers.loss(simulation)
        return losses[bits] <= tolerance

    best = _largest(fits, ring_bits - 1)
    return CircaReport(
        best, losses[0 if best is None else best], answers.metric, tolerance, mode, fraction_bits,
        ring_bits, answers.samples, tuple(sorted(losses.items())), first.exact,
    )  # fmt: skip


def _largest(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest number from 0 on that fits, where all less do too."""
    if not fits(0):
        return None
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _batch(batch: Any, count: int) -> Batch:
    """A batch as it was given; two tensors for a model of two inputs are no targets."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    pair = pair and (count != 2 or not isinstance(batch[0], Tensor))
    targets = batch[1] if pair else None
    if pair and isinstance(targets, Tensor) and not targets.is_floating_point():
        inputs = batch[0]
    else:
        inputs, targets = batch, None
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs), None, targets)
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    return Batch(args, {}, None, targets)


class _Answers:
    """The exact model's answers, and what others lose against them."""

    def __init__(self, simulation: CircaSimulation, batches: Sequence[Batch]) -> None:
        self.batches = batches
        self.exact = [_classes(simulation.exactly, each) for each in batches]
        self.by_targets = all(each.targets is not None for each in batches)
        self.samples = sum(each.numel() for each in self.exact)

    @property
    def metric(self) -> str:
        return "accuracy" if self.by_targets else "agreement"

    def loss(self, simulation: CircaSimulation) -> float:
        """The share of answers that is lost; below zero where accuracy rises."""
        simulation.restart()
        lost = 0
        for batch, exact in zip(self.batches, self.exact, strict=True):
            found = _classes(simulation.forward, batch)
            if self.by_targets:
                targets = batch.targets.to(found.device)
                if targets.shape != found.shape:
                    raise InputMismatch(
                        f"targets of shape {tuple(targets.shape)} for answers of shape "
                        f"{tuple(found.shape)}"
                    )
                lost += int((exact == targets).sum()) - int((found == targets).sum())
            else:
                lost += int((found != exact).sum())
        return lost / max(self.samples, 1)


@torch.no_grad()
def _classes(function: Callable[..., Any], batch: Batch) -> Tensor:
    outputs = function(*batch.args, **batch.kwargs)
    if not isinstance(outputs, Tensor) or outputs.dim() < 2 or not outputs.is_floating_point():
        raise InputMismatch(
            "the output isn't one tensor of scores by class",
            hint="wrap the model so that it returns its logits alone",
        )
    return outputs.argmax(1)
