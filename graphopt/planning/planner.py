"""The planner that an optimised module carries: from a call to the planned step that serves it."""

from __future__ import annotations

import dataclasses
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from graphopt.errors import UnsupportedError
from graphopt.planning.problem import Problem
from graphopt.planning.saving import saving_plan
from graphopt.planning.search import (
    Plan,
    PlanSettings,
    Search,
    make_problem,
    predicted_peak,
)
from graphopt.planning.situation import CallKey, Situation
from graphopt.planning.steps import StepReader
from graphopt.planning.traced import trace_call
from graphopt.runtime.execute import BudgetWarning, CompiledStep
from graphopt.runtime.lower import lower
from graphopt.runtime.plan import Operand
from graphopt.solvers import check

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule

log = logging.getLogger("graphopt")

# A training loop waits for the plan of a call of another kind.
_REPLAN_SECONDS = 20.0
# Tracing patches torch for the whole process.
_TRACING = threading.RLock()


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
    _used: dict[CallKey, tuple[int, ...]] = field(default_factory=dict, repr=False, compare=False)
    _seen: Counter[tuple[CallKey, tuple[int, ...]]] = field(
        default_factory=Counter, repr=False, compare=False
    )
    _ready: dict[tuple[CallKey, tuple[int, ...] | None], CompiledStep] = field(
        default_factory=dict, repr=False, compare=False
    )
    _situations: dict[CallKey, Situation] = field(default_factory=dict, repr=False, compare=False)

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
        which = key, self._used.get(key)
        compiled = self._ready.get(which)
        if compiled is None:
            with _TRACING:
                compiled = self._ready.get(which) or self._prepare(module, key, inputs)
        return partial(compiled, _Fetch(module))

    def _same_mode(self, key: CallKey) -> bool:
        """Whether the whole module is in the planned mode; parts of it may differ."""
        return not self.plans or any(key.training[0] == k.training[0] for k in self.plans)

    def _prepare(
        self, module: OptimizedModule, key: CallKey, inputs: Sequence[torch.Tensor]
    ) -> CompiledStep:
        plan = self.plans.get(key)
        used = self._used.get(key) or self._planned_outputs(plan)
        situation = self.situation(module, key, inputs, used)
        if plan is not None and plan.fingerprint == situation.fingerprint:
            return self.adopt(key, situation, plan)
        problem = make_problem(situation, self.settings)
        if self.settings.budget is None:
            return self.adopt(key, situation, saving_plan(situation, problem))
        allowed = self._allowed(problem, self.settings.budget)
        plan = self._transferred(situation, problem, allowed)
        if plan is None:
            limit = min(_REPLAN_SECONDS, self.settings.time_limit)
            log.warning(
                "graphopt: planning a kind of call that was not planned before (dtype, frozen "
                "parameters, autocast, mode of a part, loss); this takes up to %.0f s, once", limit
            )  # fmt: skip
            plan = Search(situation, problem, self.settings).plan(allowed, time_limit=limit)
        if plan.peak > self.settings.budget:
            warnings.warn(
                f"A call of another kind (dtype, frozen parameters, autocast, loss) than the one "
                f"planned takes at least {plan.peak:,} bytes: the budget of "
                f"{self.settings.budget:,} bytes does not hold for it.",
                BudgetWarning,
                stacklevel=4,
            )
        return self.adopt(key, situation, plan)

    def _planned_outputs(self, plan: Plan | None) -> tuple[int, ...] | None:
        """The outputs that get a gradient; a loss given as a function isn't saved, they are."""
        if plan is None and self.settings.loss is None:
            plan = next(iter(self.plans.values()), None)
        return plan.differentiable if plan is not None else None

    def _allowed(self, problem: Problem, budget: int) -> int:
        """The budget of a call of another kind."""
        if self.settings.share is None:
            return budget
        peak = check(problem.graph, range(len(problem.graph.tasks))).peak
        return min(budget, int(self.settings.share * peak))

    def _transferred(self, situation: Situation, problem: Problem, allowed: int) -> Plan | None:
        """A plan of another key that fits this graph and keeps the budget."""
        for plan in self.plans.values():
            if plan.fingerprint == situation.fingerprint:
                peak = predicted_peak(plan, problem)
                if peak is not None and peak <= allowed:
                    return dataclasses.replace(plan, peak=peak)
        return None

    def situation(
        self,
        module: OptimizedModule,
        key: CallKey,
        inputs: Sequence[torch.Tensor],
        differentiable: Sequence[int] | None = None,
    ) -> Situation:
        """The joint graph of such a call; of the outputs that get a gradient, if not the loss's."""
        call = trace_call(
            module.program,
            module,
            key,
            inputs,
            loss=self.settings.loss,
            differentiable=differentiable,
            hold_outputs=self.settings.hold_outputs,
        )
        return call.situation(self.settings.way.rewrites)

    def adopt(self, key: CallKey, situation: Situation, plan: Plan) -> CompiledStep:
        """Uses a plan for calls of one key."""
        reader = StepReader(situation.view)
        steps = [reader.read(task) for task in plan.tasks]
        sequence = [steps[task] for task in plan.sequence]
        compiled = CompiledStep(
            lower(situation.view, situation.storage, sequence, stepping=situation.stepping),
            situation.unplanned,
            situation.views,
            on_other_loss=partial(self._other_loss, key),
        )
        self.plans[key] = plan
        self._ready[key, self._used.get(key)] = compiled
        self._situations[key] = situation
        return compiled

    def _other_loss(self, key: CallKey, used: frozenset[int]) -> None:
        """A loss turned out to be another one: if it comes again, calls are planned for it."""
        outputs = tuple(sorted(used))
        self._seen[key, outputs] += 1
        if self._seen[key, outputs] > 1:
            self._used[key] = outputs

    def predict_peak(self, inputs: Sequence[torch.Tensor]) -> int:
        """Peak bytes of a planned call with inputs of other sizes.

        The model does not run, but each of its ops is tried by itself at these sizes.

        Raises:
            UnsupportedError: A copied or loaded module, before its first step; or sizes for which
                the steps of the plan are other ones.
        """
        if not self._situations:
            raise UnsupportedError(
                "A copied or loaded module knows its graphs from its first step on.",
                hint="Run one step, then ask again.",
            )
        key, situation = next(iter(self._situations.items()))
        problem = situation.problem(lambda _: 0, symbols=situation.symbols(inputs))
        peak = predicted_peak(self.plans[key], problem)
        if peak is None:
            raise UnsupportedError("The peak at these sizes can't be predicted.")
        return peak

    # -- copies and files ----------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ready": {}, "_situations": {}}

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
        stepping=data["stepping"],
        **{
            name: tuple(tuple(entry) for entry in data[name])
            for name in ("parameters", "inputs", "autocast")
        },
    )


class _Fetch:
    """The tensors behind a module's parameters and buffers, each looked up once a call."""

    def __init__(self, module: OptimizedModule) -> None:
        self.module = module
        self.found: dict[str, torch.Tensor] = {}

    def __call__(self, operand: Operand) -> torch.Tensor:
        tensor = self.found.get(operand.name)
        if tensor is None:
            owner: Any = self.module
            *path, name = operand.name.split(".")
            for part in path:
                owner = owner._modules[part]
            tensor = self.found[operand.name] = getattr(owner, name)
        return tensor
