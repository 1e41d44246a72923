"""What was found about a method, and a file of it, which later calls go on from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.passes.relevance.judging import (
    Estimate,
    Localisation,
    PerturbationCurves,
    estimate,
)
from tests.benchmarks.faithful_tasks import Task


@dataclass(frozen=True, eq=False)
class Row:
    """What was found about a method.

    Attributes:
        curves: Its perturbation curves.
        seconds: That the attribution took for all samples.
        located: Against the known truth, or None.
        hits: The hit rate of each sample, or None.
        left_out: Rank correlation with leave-one-out of each sample, or None.
        untrained: The same with the relevance of random parameters, or None.
    """

    curves: PerturbationCurves
    seconds: float
    located: Localisation | None = None
    hits: Tensor | None = None
    left_out: Tensor | None = None
    untrained: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form: means, and what each sample gave."""
        each = {name: getattr(self, name) for name in _EACH}
        return {
            "curves": self.curves.to_dict(),
            "localisation": self.located and self.located.to_dict(),
            "seconds": self.seconds,
            **{n: None if v is None else estimate(v).to_dict() for n, v in each.items()},
            "samples": {
                "morf": self.curves.morf.tolist(),
                "lerf": self.curves.lerf.tolist(),
                **{n: None if v is None else v.tolist() for n, v in each.items()},
            },
        }

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Row:
        """The row that gave such a form."""
        samples, curves, located = given["samples"], given["curves"], given["localisation"]
        if located is not None:
            estimates = {n: Estimate(**v) for n, v in located.items() if isinstance(v, dict)}
            located = Localisation(k=located["k"], chance=located["chance"], **estimates)
        return cls(
            PerturbationCurves(
                tuple(curves["shares"]), _tensor(samples["morf"]), _tensor(samples["lerf"]),
                curves["output"],
            ),
            given["seconds"],
            located,
            **{n: None if samples[n] is None else _tensor(samples[n]) for n in _EACH},
        )  # fmt: skip


_EACH = ("hits", "left_out", "untrained")


def _tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def write(path: Path, found: Mapping[str, tuple[Task, Mapping[str, Row]]]) -> None:
    """Write the rows of each section as JSON."""
    figures = {
        section: {
            "samples": len(task.targets),
            "task": _digest(task),
            "methods": {name: row.to_dict() for name, row in rows.items()},
        }
        for section, (task, rows) in found.items()
    }
    path.write_text(json.dumps(figures, indent=1), encoding="utf-8")


def read(path: Path, task: Task) -> dict[str, Row]:
    """The rows of a task in a file.

    Raises:
        ValueError: They are of other samples, steps or removals, or of another network.
    """
    section = json.loads(path.read_text(encoding="utf-8")).get(task.name)
    if section is None:
        return {}
    if section["task"] != _digest(task):
        raise ValueError(f"{path}: {task.name} was measured on other samples or steps")
    return {name: Row.from_dict(row) for name, row in section["methods"].items()}


def _digest(task: Task) -> str:
    """What results hang on, up to rounding: samples, steps, removals and the network's kind."""
    found = hashlib.blake2b(digest_size=16)
    removal = task.removal
    shapes = [(n, tuple(p.shape)) for n, p in task.model.named_parameters()]
    found.update(repr((task.steps, removal.units, removal.baseline, shapes)).encode())
    for value in (*task.inputs, task.targets, removal.allowed):
        if value is not None:
            found.update(value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()
