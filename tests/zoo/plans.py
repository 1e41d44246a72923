"""Planning zoo models and measuring what comes back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

import graphopt
from tests.zoo.memory import Footprint, step_footprint
from tests.zoo.registry import ZooModel, plain_loss

BUDGETS = (80, 60, 50, 40)
UNLIMITED = "memory=64GiB"


@dataclass
class Planned:
    """An optimised module and the step that it really makes."""

    module: Any
    measured: Footprint

    @property
    def budget(self) -> int:
        """Bytes asked for."""
        return self.module.report.to_dict()["memory"]["budget"]

    @property
    def predicted(self) -> int:
        """Bytes that the plan predicted."""
        return self.module.report.to_dict()["memory"]["predicted_peak"]


def optimized(
    entry: ZooModel, budget: str, *, time_limit: float = 4.0, model: nn.Module | None = None
) -> Any:
    """``graphopt.optimize`` of a zoo model under a budget such as ``memory=50%``."""
    args, kwargs = entry.inputs()
    source = entry.model() if model is None else model
    return graphopt.optimize(source, budget, args, example_kwargs=kwargs, time_limit=time_limit)


def feasible(
    entry: ZooModel, percent: float = 50, *, time_limit: float = 2.0, model: nn.Module | None = None
) -> Any:
    """The module at this share of eager's peak, else at the smallest budget that can be met."""
    try:
        return optimized(entry, f"memory={percent:g}%", time_limit=time_limit, model=model)
    except graphopt.BudgetInfeasible as error:
        least = _smallest(error)
    return optimized(entry, f"memory={least}", time_limit=time_limit, model=model)


def _smallest(error: graphopt.BudgetInfeasible) -> int:
    assert error.smallest is not None, "the error names no budget that could be met"
    return int(error.smallest)


def measured(entry: ZooModel, module: Any) -> Planned:
    """Measure a planned module by the tests' own means."""
    args, kwargs = entry.inputs()
    return Planned(module, step_footprint(module, args, kwargs, plain_loss))
