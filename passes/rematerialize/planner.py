"""The planner that an optimised module carries: from a call to the planned step that serves it."""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graphopt.errors import UnsupportedError
from graphopt.passes.rematerialize.problem import Problem
from graphopt.passes.rematerialize.search import Plan, PlanSettings, Search, make_problem
from graphopt.passes.rematerialize.situation import CallKey, Situation, make_situation
from graphopt.runtime.execute import BudgetWarning, CompiledStep
from graphopt.runtime.lower import lower
from graphopt.solvers import check

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule

log = logging.getLogger("graphopt")

# A training loop waits for the plan of a call of another kind.
_REPLAN_SECONDS = 20.0


@dataclass
class MemoryPlanner:
    """Plans by call key; what is not planned yet is planned at its first call.

    A plan is a sequence of tasks of the call's joint graph. It is structural: it holds for every
    size, and it is all that is saved; graphs are traced anew when first needed.

    Attributes:
        settings: The budget and how to plan.
        training: Whether steps are budgeted (else forward passes under `no_grad`).
        plans: Call key -> plan.
    """

    kind: ClassVar[str] = "rematerialize"

    settings: PlanSettings
    training: bool = True
    plans: dict[CallKey, Plan] = field(default_factory=dict)
    _ready: dict[CallKey, tuple[Situation, CompiledStep]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def runner(
        self, module: OptimizedModule, inputs: list[torch.Tensor]
    ) -> Callable[[list[torch.Tensor]], Sequence[Any]] | None:
        """What runs this call; None where the budget says nothing about such a call.

        Where something that a plan depends on was changed (a `requires_grad`, a dtype, autocast),
        the call is planned anew; a `BudgetWarning` says if the budget cannot be kept then.
        """
        key = CallKey.of(module, inputs)
        if key.differentiable != self.training or not self._same_mode(key):
            return None
        if key not in self._ready:
            self._prepare(module, key, inputs)
        _, compiled = self._ready[key]
        return partial(compiled, partial(_fetch, module))

    def _same_mode(self, key: CallKey) -> bool:
        return any(key.training == planned.training for planned in self.plans) or not self.plans

    def _prepare(
        self, module: OptimizedModule, key: CallKey, inputs: Sequence[torch.Tensor]
    ) -> None:
        situation = self.situation(module, key, inputs)
        plan = self.plans.get(key)
        if plan is not None and plan.fingerprint == situation.fingerprint:
            self.adopt(key, situation, plan)
            return
        problem = make_problem(situation, self.settings)
        allowed = self._allowed(problem)
        plan = self._transferred(situation, problem, allowed)
        if plan is None:
            limit = min(_REPLAN_SECONDS, self.settings.time_limit)
            log.warning(
                "graphopt: planning a kind of call that was not planned before (dtype, frozen "
                "parameters, autocast, mode of a part); this takes up to %.0f s, once", limit
            )  # fmt: skip
            plan = Search(situation, problem, self.settings).plan(allowed, time_limit=limit)
        if plan.peak > self.settings.budget:
            warnings.warn(
                f"A call of another kind (dtype, frozen parameters, autocast) than the one "
                f"planned takes at least {plan.peak:,} bytes: the budget of "
                f"{self.settings.budget:,} bytes does not hold for it.",
                BudgetWarning,
                stacklevel=4,
            )
        self.adopt(key, situation, plan, problem)

    def _allowed(self, problem: Problem) -> int:
        """The budget of a call of another kind."""
        if self.settings.share is None:
            return self.settings.budget
        peak = check(problem.graph, range(len(problem.graph.tasks))).peak
        return min(self.settings.budget, int(self.settings.share * peak))

    def _transferred(self, situation: Situation, problem: Problem, allowed: int) -> Plan | None:
        """A plan of another key that fits this graph and keeps the budget."""
        for plan in self.plans.values():
            if plan.fingerprint == situation.fingerprint:
                found = check(problem.graph, plan.sequence, order="free")
                if found.ok and found.peak <= allowed:
                    return dataclasses.replace(plan, peak=found.peak)
        return None

    def situation(
        self, module: OptimizedModule, key: CallKey, inputs: Sequence[torch.Tensor]
    ) -> Situation:
        """The joint graph of such a call."""
        return make_situation(
            module.program,
            module,
            key,
            inputs,
            loss=self.settings.loss,
            hold_outputs=self.settings.hold_outputs,
        )

    def adopt(
        self, key: CallKey, situation: Situation, plan: Plan, problem: Problem | None = None
    ) -> None:
        """Uses a plan for calls of one key."""
        if problem is None:
            problem = situation.problem(lambda _: 0)
        step = lower(situation.view, situation.storage, problem.sequence_of_steps(plan.sequence))
        self.plans[key] = plan
        self._ready[key] = situation, CompiledStep(step, situation.forward, situation.views)

    def predict_peak(self, inputs: Sequence[torch.Tensor]) -> int:
        """Peak bytes of a planned call with inputs of other sizes; nothing of the model runs.

        Raises:
            UnsupportedError: A copied or loaded module, before its first step.
        """
        if not self._ready:
            raise UnsupportedError(
                "A copied or loaded module knows its graphs from its first step on.",
                hint="Run one step, then ask again.",
            )
        key, (situation, _) = next(iter(self._ready.items()))
        symbols = situation.symbols(inputs)
        problem = situation.problem(lambda _: 0, symbols=symbols)
        return check(problem.graph, self.plans[key].sequence).peak

    # -- copies and files ----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> MemoryPlanner:
        return MemoryPlanner(self.settings, self.training, dict(self.plans))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; a loss given as a function is not saved, its plans are."""
        return {
            "settings": self.settings.to_dict(),
            "training": self.training,
            "plans": [
                {"key": dataclasses.asdict(key), "plan": plan.to_dict()}
                for key, plan in self.plans.items()
            ],
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MemoryPlanner:
        """Reads what `to_dict` wrote."""
        return cls(
            PlanSettings.from_dict(data["settings"]),
            bool(data["training"]),
            {_key(e["key"]): Plan.from_dict(e["plan"]) for e in data["plans"]},
        )


def _key(data: dict[str, Any]) -> CallKey:
    return CallKey(
        training=tuple(data["training"]),
        grad=data["grad"],
        **{
            name: tuple(tuple(entry) for entry in data[name])
            for name in ("parameters", "inputs", "autocast")
        },
    )


def _fetch(module: OptimizedModule, operand: Any) -> torch.Tensor:
    path, _, name = operand.name.rpartition(".")
    return getattr(module.get_submodule(path), name)
