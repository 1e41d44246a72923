"""The network with gates at its non-linearities, beside the source: run, compared, trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.errors import NonFiniteError
from graphopt.ir.aliases import is_written, writes_to_values
from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import Value, call, interpret
from graphopt.passes.linearize.calibration import Reference, samples_at_once
from graphopt.passes.linearize.distillation import distance, floating
from graphopt.passes.linearize.methods.groups import Groups
from graphopt.passes.linearize.replacements import approximated
from graphopt.passes.linearize.sites import Site, read_by
from graphopt.passes.linearize.task import Task

Changed = Callable[[Site, Tensor], None]
TEMPERATURE = 4.0
_WEIGHTS_RATE = 1e-3  # SNL's, of Adam


@dataclass(frozen=True)
class Lesson:
    """Some samples, and the source's floating outputs for them."""

    inputs: list[Tensor]
    taught: list[Tensor]


@torch.no_grad()
def lessons(reference: Reference, sites: tuple[Site, ...]) -> list[Lesson]:
    """The calibration inputs in the portions of one step."""
    at_once = samples_at_once(sum(site.per_sample for site in sites))
    graph = reference.module.graph
    return [
        Lesson(part, floating(interpret(graph, part, reference.attribute)))
        for index in range(len(reference.inputs))
        for part in reference.parts(index, at_once)
    ]


@dataclass(frozen=True)
class Student:
    """A network in which every group has a gate ``h``: ``h f(x) + (1 - h) r(x)``.

    Attributes:
        reference: The graph.
        groups: Its groups.
        coefficients: Of each site's replacement.
        attribute: Gives weights, in place of the source's.
    """

    reference: Reference
    groups: Groups
    coefficients: Mapping[Site, Tensor | None]
    attribute: Value

    def outputs(
        self, inputs: list[Tensor], gates: Tensor, told: Changed | None = None
    ) -> list[Tensor]:
        """Floating outputs.

        Args:
            inputs: Flat inputs.
            gates: Of all groups, ``[groups]``.
            told: Given each site and ``r(x) - f(x)`` there, ``[free, positions, free]``.
        """
        by_node = {site.name: site for site in self.groups.sites}
        own = self.groups.split(gates)
        graph = self.reference.module.graph
        apart = writes_to_values(graph)  # then autograd may not keep what is written later

        def run(node: fx.Node, value: Value) -> Any:
            site = by_node.get(node.name)
            if site is None:
                return self.reference.run(node, value)
            x = value(read_by(node))
            x = x.clone() if apart else x
            exact = call(node, lambda each: x if each is read_by(node) else value(each))
            known, kept = site.flat(self._replaced(site, x)), site.flat(exact)
            if told is not None:
                told(site, known - kept)
            places = self.groups.of_positions[site].to(gates.device)
            gate = own[site].to(exact.dtype)[places].view(1, -1, 1)
            return (known + gate * (kept - known)).view(exact.shape)

        return floating(interpret(graph, inputs, self.attribute, run))

    def _replaced(self, site: Site, x: Tensor) -> Tensor:
        return approximated(site, self.groups.kinds[site], self.coefficients[site], x)

    @torch.no_grad()
    def changes(self, lessons: Sequence[Lesson], gates: Tensor) -> Tensor:
        """The squared change that a replacement makes to its own value, summed: ``[groups]``."""
        total = {site: gates.new_zeros(len(own)) for site, own in self.groups.split(gates).items()}

        def told(site: Site, change: Tensor) -> None:
            places = self.groups.of_positions[site].to(gates.device)
            total[site].index_add_(0, places, change.to(gates.dtype).square().sum((0, 2)))

        for lesson in lessons:
            self.outputs(lesson.inputs, gates, told)
        return torch.cat(list(total.values()))

    def lost(self, lesson: Lesson, gates: Tensor) -> Tensor:
        """The distance to the source, a scalar."""
        return distance(self.outputs(lesson.inputs, gates), lesson.taught, TEMPERATURE)


class Weights:
    """A copy of the parameters to train and throw away; tied ones stay tied."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.copies: dict[int, Tensor] = {}
        self.by_path: dict[str, tuple[Tensor, torch.dtype]] = {}
        for node in reference.module.graph.find_nodes(op="get_attr"):
            path = str(node.target)
            value = lookup(reference.module, path)
            trainable = isinstance(value, nn.Parameter) and value.is_floating_point()
            if trainable and not is_written(node):
                self.by_path[path] = self._copy(value), value.dtype

    def _copy(self, value: Tensor) -> Tensor:
        if id(value) not in self.copies:
            wide = value if value.dtype == torch.float64 else value.float()
            self.copies[id(value)] = wide.detach().clone().requires_grad_()
        return self.copies[id(value)]

    def attribute(self, node: fx.Node) -> Any:
        """The value of a ``get_attr`` node."""
        path = str(node.target)
        if path not in self.by_path:
            return self.reference.attribute(node)
        copy, dtype = self.by_path[path]
        return copy.to(dtype)


class Course:
    """Trains a row of numbers, by which gates are set, and a copy of the weights.

    Args:
        task: The task.
        groups: Its groups.
        row: What is trained, ``[groups]``.
        rate: Adam's, for the row.
        name: What is trained, to say so.
    """

    def __init__(self, task: Task, groups: Groups, row: Tensor, rate: float, name: str) -> None:
        self.task, self.row, self.name = task, row, name
        weights = Weights(task.reference)
        coefficients = {
            site: task.survey.options[site][groups.kinds[site]] for site in groups.sites
        }
        self.student = Student(task.reference, groups, coefficients, weights.attribute)
        self.lessons = lessons(task.reference, groups.sites)
        self.trained = [row, *weights.copies.values()]
        portions = [{"params": [row], "lr": rate}, {"params": self.trained[1:]}]
        self.optimizer = torch.optim.Adam([p for p in portions if p["params"]], lr=_WEIGHTS_RATE)
        self.generator = torch.Generator().manual_seed(task.seed)
        self.steps = 0

    @torch.no_grad()
    def everything(self) -> float:
        """What is lost where nothing is kept: the unit of penalties; 1 where that is no number."""
        none = torch.zeros_like(self.row)
        found = [float(self.student.lost(each, none)) for each in self.lessons]
        mean = sum(found) / len(found)
        return mean if 0 < mean < math.inf else 1.0

    @property
    def over(self) -> bool:
        """Whether no step is left."""
        return self.steps >= self.task.steps

    def epoch(self, gates: Callable[[], Tensor], penalty: Callable[[], Tensor]) -> None:
        """One pass through the calibration inputs, or what is left of the steps.

        Args:
            gates: Of all groups, from the row.
            penalty: What is added to the distillation loss.

        Raises:
            NonFiniteError: The loss or a gradient is NaN or infinite.
        """
        for place in torch.randperm(len(self.lessons), generator=self.generator).tolist():
            if self.over:
                return
            self.task.progress(f"training {self.name}", self.steps / self.task.steps)
            with torch.enable_grad():
                loss = self.student.lost(self.lessons[place], gates()) + penalty()
                found = torch.autograd.grad(loss, self.trained, allow_unused=True)
            self._check(loss, found)
            for tensor, gradient in zip(self.trained, found, strict=True):
                tensor.grad = gradient
            self.optimizer.step()
            self.steps += 1

    def _check(self, loss: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        values = [loss, *(g for g in gradients if g is not None)]
        if not all(bool(v.isfinite().all()) for v in values):
            raise NonFiniteError(
                f"training {self.name} gave NaN or infinity in step {self.steps + 1}",
                hint="take select=fisher, which trains nothing, or replacement=affine",
            )


def device_of(reference: Reference) -> torch.device:
    """Where the program's tensors are."""
    values = [*reference.module.parameters(), *(t for batch in reference.inputs for t in batch)]
    return values[0].device if values else torch.device("cpu")
