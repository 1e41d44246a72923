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
from graphopt.ir.mode import in_modes_of
from graphopt.ir.program import Program
from graphopt.measure import measure_step
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.planning.planner import MemoryPlanner
from graphopt.planning.rewrites import Rewrite
from graphopt.planning.search import Plan, PlanSettings, Search, make_problem
from graphopt.planning.situation import CallKey
from graphopt.report import MemoryReport, PlanReport

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


class _Run:
    def __init__(self, options: Rematerialize, program: Program, context: PassContext) -> None:
        solvers.prepare()  # compiles in the background while the model is measured and traced
        self.options = options
        self.program, self.context = program, context
        self.module = program.replace(planner=None).emit()
        source: nn.Module = context.source if context.source is not None else self.module
        self.source = source
        in_modes_of(self.module, source)
        self.training = source.training
        self.inputs = program.signature.flatten_inputs(context.args, context.kwargs)
        if self.training and not self._trainable():
            raise NothingToTrainError(
                "Neither a parameter nor an input requires a gradient, so that there is no "
                "training step to plan.",
                hint="Set requires_grad, or call .eval() for a budget on the forward pass.",
            )

    def _trainable(self) -> bool:
        tensors = (*self.module.parameters(), *self.inputs)
        return any(t.requires_grad for t in tensors)

    def result(self, memory: Quantity) -> PassResult:
        """Measures the source, plans, emits and measures again."""
        self.context.progress("measuring the source model")
        eager = self._measure(self.source)
        fixed = self._fixed_bytes()
        asked = memory.bytes_of(eager + fixed)
        share = (asked - fixed) / max(1, eager) if memory.relative else None
        settings = self._settings(max(0, asked - fixed), share)
        planner = MemoryPlanner(settings, self.training)
        with torch.set_grad_enabled(self.training):
            key = CallKey.of(self.module, self.inputs)
            situation = planner.situation(self.module, key, self.inputs)
            problem = make_problem(situation, settings, self.context.progress)
            search = Search(situation, problem, settings, self.context.progress)
            try:
                plan, measured, program = self._kept(planner, key, search, max(0, asked - fixed))
            except BudgetInfeasible as error:
                raise self._with_fixed(error, asked, fixed) from None
        return PassResult(
            program,
            changed=True,
            report={
                "memory": MemoryReport(
                    eager_peak=eager + fixed,
                    budget=asked,
                    predicted_peak=plan.peak + fixed,
                    measured_peak=measured + fixed,
                    scope=self.options.scope or "activations",
                    mode="train" if self.training else "eval",
                ),
                "plan": PlanReport(
                    status=plan.status,
                    overhead=plan.overhead,
                    lower_bound=plan.lower_bound,
                    gap=max(0.0, plan.overhead - plan.lower_bound),
                    recomputed_flops=plan.recomputed_flops,
                    step_flops=plan.step_flops,
                    seconds=plan.seconds,
                    cost_model=settings.cost_model,
                    scope=plan.scope,
                ),
            },
        )

    def frontier(self, budgets: int | Sequence[Any]) -> list[tuple[int, float, float]]:
        """Plans for falling budgets, each beginning with the one before."""
        unlimited = self._settings(_UNLIMITED)
        with torch.set_grad_enabled(self.training):
            key = CallKey.of(self.module, self.inputs)
            situation = MemoryPlanner(unlimited, self.training).situation(
                self.module, key, self.inputs
            )
            problem = make_problem(situation, unlimited, self.context.progress)
        search = Search(situation, problem, unlimited, self.context.progress)
        return [
            (plan.peak, plan.overhead, plan.lower_bound)
            for plan in search.sweep(self._budgets(budgets))
        ]

    def _budgets(self, budgets: int | Sequence[Any]) -> int | list[int]:
        if isinstance(budgets, int):
            return budgets
        quantities = [read_field("memory", b) for b in budgets]
        eager = self._measure(self.source) if any(q.relative for q in quantities) else None  # type: ignore[union-attr]
        return [q.bytes_of(eager) for q in quantities]  # type: ignore[union-attr]

    def _settings(self, budget: int, share: float | None = None) -> PlanSettings:
        options, context = self.options, self.context
        return PlanSettings(
            budget=budget,
            time_limit=options.time_limit or context.time_limit,
            seed=context.seed if options.seed is None else options.seed,
            cost_model=options.cost_model or context.cost_model,
            loss=context.loss,
            hold_outputs=options.hold_outputs,
            share=share,
            rewrites=self._rewrites(),
        )

    def _rewrites(self) -> tuple[Rewrite, ...]:
        """What a pass before this one does to the joint graph."""
        planner = self.program.planner
        return planner.settings.rewrites if isinstance(planner, MemoryPlanner) else ()

    def _kept(
        self, planner: MemoryPlanner, key: CallKey, search: Search, asked: int
    ) -> tuple[Plan, int, Program]:
        """Plans and measures until what runs keeps the budget."""
        allowed, start = asked, None
        attempts = 0
        while True:
            attempts += 1
            plan = search.plan(allowed, start=start)
            planner.adopt(key, search.situation, plan)
            program = self.program.replace(planner=planner)
            self.context.progress("measuring the planned module")
            measured = self._measure(in_modes_of(program.emit(), self.source))
            if measured <= asked:
                return plan, measured, program
            if not plan.keeps_budget or attempts == _ATTEMPTS:
                return self._unplanned(plan, asked, smallest=max(measured, plan.peak))
            allowed = max(0, allowed - (measured - asked))
            start = plan.sequence

    def _unplanned(self, plan: Plan, asked: int, smallest: int) -> tuple[Plan, int, Program]:
        """Without a plan, if that keeps the budget: autograd frees some things earlier."""
        program = self.program.replace(planner=None)
        measured = self._measure(in_modes_of(program.emit(), self.source))
        if measured > asked:
            raise plan.infeasible(asked, smallest)
        return plan.without_recomputation(measured), measured, program

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

    def _measure(self, module: nn.Module) -> int:
        with torch.set_grad_enabled(self.training):
            found = measure_step(
                module,
                self.context.args,
                self.context.kwargs,
                loss=self.context.loss,
                forward_only=not self.training,
                hold_outputs=self.options.hold_outputs,
            )
        return found.peak

    def _fixed_bytes(self) -> int:
        """What `scope=step` counts besides activations."""
        if self.options.scope != "step":
            return 0
        parameters = {p.untyped_storage().data_ptr(): p for p in self.source.parameters()}
        held = sum(p.nbytes for p in parameters.values())
        if self.training:
            held += sum(p.nbytes for p in parameters.values() if p.requires_grad)
        held += sum(b.nbytes for b in self.source.buffers())
        return held + _optimizer_bytes(self.context.optimizer, self.source)


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
