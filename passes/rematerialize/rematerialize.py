"""The pass `rematerialize`: plan, emit, measure, and tighten until the budget is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from graphopt import solvers
from graphopt.budget import Quantity, read_field
from graphopt.errors import BudgetError, BudgetInfeasible, NothingToTrainError
from graphopt.ir.program import Program
from graphopt.measure import StepMeasurement
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.planning.account import share_report
from graphopt.planning.case import Case
from graphopt.planning.draft import Draft
from graphopt.planning.planner import MemoryPlanner
from graphopt.planning.rewrites import Way
from graphopt.planning.search import TOLERANCE, Plan, PlanSettings, Search, make_problem
from graphopt.report import MemoryReport, PlanReport, ShareReport

_ATTEMPTS = 4
_UNLIMITED = 2**60


@dataclass(frozen=True)
class Rematerialize(Pass):
    """Recomputes values instead of keeping them, so that a step keeps a peak.

    The step is planned on its joint forward and backward graph and runs as planned; outputs,
    gradients and buffers are those of the model. Random draws are made once, statistics are
    updated once, effects happen once. After Bartan et al., "Moccasin: Efficient Tensor
    Rematerialization for Neural Networks" (ICML 2023).

    Attributes:
        memory: Peak bytes of one forward and backward above parameters, gradients and inputs, or
            a share of the source model's. In eval mode: of the forward pass under `no_grad`.
        scope: `activations`, or `step`: parameters, gradients and optimizer state count too.
        cost_model: `flops` (counted, the same on every machine), `analytic` (roofline) or
            `profiled` (every op is timed).
        hold_outputs: Whether the training loop keeps the model's outputs during backward.
        time_limit: Seconds for the search; None: the pipeline's.
        seed: Of the search; None: the pipeline's.
    """

    name: ClassVar[str] = "rematerialize"
    serves: ClassVar[tuple[str, ...]] = ("memory",)
    position: ClassVar[int] = Position.PLAN
    preserves: ClassVar[Preserves] = Preserves(outputs=1e-5, gradients=1e-5, buffers=1e-5)
    planners: ClassVar[tuple[type, ...]] = (MemoryPlanner,)

    memory: Quantity | None = None
    scope: str | None = None
    cost_model: str | None = None
    hold_outputs: bool = False
    time_limit: float | None = None
    seed: int | None = None

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plans the program for the example inputs.

        Raises:
            BudgetError: No budget was given.
            NothingToTrainError: A training step without anything that requires a gradient.
            BudgetInfeasible: No plan was found; carries the smallest budget that would do.
        """
        if self.memory is None:
            raise BudgetError("rematerialize needs a budget", hint="rematerialize{memory=50%}")
        return _Run(self, program, context).result(self.memory)

    def frontier(
        self, program: Program, context: PassContext, budgets: int | Sequence[Any] = 12
    ) -> list[tuple[int, float, float]]:
        """Memory against overhead, without choosing.

        Args:
            program: The program.
            context: Example inputs, loss, time limit for the whole curve.
            budgets: How many points between the step without recomputation and the smallest
                peak found, or the budgets themselves.

        Returns:
            `(peak bytes, overhead, lower bound on the overhead)` by falling peak.
        """
        return _Run(self, program, context).frontier(budgets)


@dataclass(frozen=True)
class _Found:
    """A plan that keeps the budget, and the program that runs it."""

    plan: Plan
    program: Program
    measured: StepMeasurement
    search: Search

    def share(self, before: StepMeasurement, way: Way) -> ShareReport:
        """What is saved between forward and backward, against the source model's step."""
        search = self.search
        return share_report(
            before, self.measured, way, search.situation, search.problem, self.plan.sequence
        )


class _Run:
    def __init__(self, options: Rematerialize, program: Program, context: PassContext) -> None:
        solvers.prepare()  # compiles in the background while the model is measured and traced
        self.options, self.context = options, context
        self.case = case = Case(program, context, options.hold_outputs)
        if case.training and not case.is_trainable:
            raise NothingToTrainError(
                "Neither a parameter nor an input requires a gradient, so that there is no "
                "training step to plan.",
                hint="Set requires_grad, or call .eval() for a budget on the forward pass.",
            )

    def result(self, memory: Quantity) -> PassResult:
        """Measures the source, plans, emits and measures again."""
        self.context.progress("measuring the source model")
        eager = self.case.measure(self.case.source)
        fixed = self._fixed_bytes()
        asked = memory.bytes_of(eager.peak + fixed)
        allowed = max(0, asked - fixed)
        share = (asked - fixed) / max(1, eager.peak) if memory.relative else None
        try:
            ways = self._ways() if allowed < eager.peak else (Way(),)
            way, found = self._best(ways, allowed, share)
        except BudgetInfeasible as error:
            raise self._with_fixed(error, asked, fixed) from None
        plan = found.plan
        report = {
            "memory": MemoryReport(
                eager_peak=eager.peak + fixed,
                budget=asked,
                predicted_peak=plan.peak + fixed,
                measured_peak=found.measured.peak + fixed,
                scope=self.options.scope or "activations",
                mode="train" if self.case.training else "eval",
            ),
            "plan": PlanReport(
                status=plan.status,
                overhead=plan.overhead,
                lower_bound=plan.lower_bound,
                gap=max(0.0, plan.overhead - plan.lower_bound),
                recomputed_flops=plan.recomputed_flops,
                step_flops=plan.step_flops,
                seconds=plan.seconds,
                cost_model=self.options.cost_model or self.context.cost_model,
                scope=plan.scope,
            ),
        }
        if way.rewrites and self.case.training:
            report["share"] = found.share(eager, way)
        claims = self.options.preserves.approximate() if way.gradient_error else None
        return PassResult(found.program, changed=True, report=report, preserves=claims)

    def frontier(self, budgets: int | Sequence[Any]) -> list[tuple[int, float, float]]:
        """Plans for falling budgets, each beginning with the one before."""
        exact, *_ = sorted(self._ways(), key=lambda way: way.gradient_error)
        search, _ = self._search(self._settings(_UNLIMITED, exact))
        return [
            (plan.peak, plan.overhead, plan.lower_bound)
            for plan in search.sweep(self._budgets(budgets))
        ]

    def _budgets(self, budgets: int | Sequence[Any]) -> int | list[int]:
        if isinstance(budgets, int):
            return budgets
        quantities = [read_field("memory", b) for b in budgets]
        relative = any(q.relative for q in quantities)  # type: ignore[union-attr]
        eager = self.case.measure(self.case.source).peak if relative else None
        return [q.bytes_of(eager) for q in quantities]  # type: ignore[union-attr]

    def _ways(self) -> tuple[Way, ...]:
        """How joint graphs may be rewritten: what a pass before this one proposes or does."""
        planner = self.case.program.planner
        if isinstance(planner, Draft):
            return planner.ways
        return (planner.settings.way if isinstance(planner, MemoryPlanner) else Way(),)

    def _best(self, ways: Sequence[Way], allowed: int, share: float | None) -> tuple[Way, _Found]:
        """The way and the plan that recompute least; a later way only if it is really shorter."""
        best: tuple[Way, _Found] | None = None
        refused: list[BudgetInfeasible] = []
        for way in ways:
            settings = self._settings(allowed, way, share, parts=len(ways))
            try:
                found = self._found(settings)
            except BudgetInfeasible as error:
                refused.append(error)
                continue
            if best is None or found.plan.overhead < best[1].plan.overhead - TOLERANCE:
                best = way, found
            if found.plan.overhead <= TOLERANCE:
                break
        if best is None:
            raise min(refused, key=lambda error: error.smallest or 0)
        return best if best[1].program.planner is not None else (Way(), best[1])

    def _settings(
        self, budget: int, way: Way, share: float | None = None, parts: int = 1
    ) -> PlanSettings:
        options = self.options
        return self.case.settings(
            way,
            budget,
            time_limit=(options.time_limit or self.context.time_limit) / parts,
            seed=options.seed,
            cost_model=options.cost_model,
            share=share,
        )

    def _search(self, settings: PlanSettings) -> tuple[Search, MemoryPlanner]:
        planner = MemoryPlanner(settings, self.case.training)
        situation = self.case.situation(settings.way.rewrites)
        with torch.set_grad_enabled(self.case.training):
            problem = make_problem(situation, settings, self.context.progress)
        return Search(situation, problem, settings, self.context.progress), planner

    def _found(self, settings: PlanSettings) -> _Found:
        """Plans and measures until what runs keeps the budget."""
        search, planner = self._search(settings)
        asked = allowed = settings.budget or 0
        start, attempts = None, 0
        while True:
            attempts += 1
            plan = search.plan(allowed, start=start)
            with torch.set_grad_enabled(self.case.training):
                planner.adopt(self.case.key, search.situation, plan)
            program = self.case.program.replace(planner=planner)
            self.context.progress("measuring the planned module")
            measured = self.case.measure(self.case.emitted(program))
            if measured.peak <= asked:
                return _Found(plan, program, measured, search)
            if not plan.keeps_budget or attempts == _ATTEMPTS:
                return self._unplanned(plan, search, asked, max(measured.peak, plan.peak))
            allowed = max(0, allowed - (measured.peak - asked))
            start = plan.sequence

    def _unplanned(self, plan: Plan, search: Search, asked: int, smallest: int) -> _Found:
        """Without a plan, if that keeps the budget: autograd frees some things earlier."""
        program = self.case.program.replace(planner=None)
        measured = self.case.measure(self.case.emitted(program))
        if measured.peak > asked:
            raise plan.infeasible(asked, smallest)
        return _Found(plan.without_recomputation(measured.peak), program, measured, search)

    @staticmethod
    def _with_fixed(error: BudgetInfeasible, asked: int, fixed: int) -> BudgetInfeasible:
        """In the figures of the scope `step`, parameters and the like included."""
        return BudgetInfeasible(
            f"No plan keeps a peak of {asked:,} bytes.",
            field=error.field,
            requested=asked,
            smallest=int(error.smallest or 0) + fixed,
            obstacle=error.obstacle,
            proven=error.proven or asked < fixed,
            bound=int(error.bound or 0) + fixed,
        )

    def _fixed_bytes(self) -> int:
        """What `scope=step` counts besides activations."""
        if self.options.scope != "step":
            return 0
        source = self.case.source
        parameters = {p.untyped_storage().data_ptr(): p for p in source.parameters()}
        held = sum(p.nbytes for p in parameters.values())
        if self.case.training:
            held += sum(p.nbytes for p in parameters.values() if p.requires_grad)
        held += sum(b.nbytes for b in source.buffers())
        return held + _optimizer_bytes(self.context.optimizer, source)


def _optimizer_bytes(optimizer: Any, source: nn.Module) -> int:
    """Bytes of the state of an optimizer, as it is or as its first step would make it."""
    if optimizer is None:
        return 0
    tensors = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    if tensors:
        return sum(t.nbytes for t in tensors)
    return _fresh_optimizer_bytes(optimizer)


def _fresh_optimizer_bytes(optimizer: Any) -> int:
    groups: list[Mapping[str, Any]] = optimizer.param_groups
    clones = []
    for group in groups:
        parameters = [p.detach().clone().requires_grad_() for p in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        clones.append({**group, "params": parameters})
    twin = type(optimizer)(clones)
    twin.step()
    return sum(
        value.nbytes
        for state in twin.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
