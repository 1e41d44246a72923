"""The pass `share`: what backward needs is kept once, small, or made again by cheap ops."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

from graphopt.budget import Quantity
from graphopt.comparison import Observation
from graphopt.ir.program import Program
from graphopt.measure import StepMeasurement
from graphopt.passes.share.approximate import (
    Choice,
    as_rewrites,
    gradient_error,
    longest,
    moves,
)
from graphopt.passes.share.compressed import QuantisedOperand
from graphopt.passes.share.dead import UnreadOperand
from graphopt.passes.share.duplicates import Duplicates
from graphopt.passes.share.masks import PackedMasks, ReluSign
from graphopt.passes.share.pooling import PackedIndices
from graphopt.passes.share.steps import StepDerivative
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.planning.account import account, kept_values, share_report
from graphopt.planning.case import Case
from graphopt.planning.draft import Draft
from graphopt.planning.planner import MemoryPlanner
from graphopt.planning.problem import Problem
from graphopt.planning.rewrites import Rewrite, Way
from graphopt.planning.saving import saving_plan
from graphopt.planning.search import Plan, make_problem
from graphopt.planning.situation import Situation
from graphopt.report import ShareRefusal, ShareReport

EXACT: tuple[type[Rewrite], ...] = (
    Duplicates,
    UnreadOperand,
    ReluSign,
    PackedMasks,
    PackedIndices,
)
_IDLE = "it saves nothing: something reads the value as it is"


@dataclass(frozen=True)
class Share(Pass):
    """Saves less for the backward pass, without more FLOPs.

    Of what the backward pass reads, memory-bound ops (elementwise ones, copies, normalisations)
    are run again from what is kept, and what is kept is the least there is; masks take one bit an
    element, indices of max pooling one byte, and operands of which only sizes count nothing. The
    gradients are those of the model unless an error is granted. After Yang et al., "Reducing
    Fine-Tuning Memory Overhead by Approximate and Memory-Sharing Backpropagation" (ICML 2024),
    whose shared norm outputs are a case of it: a norm's output and the linear's input that it is
    are made again from one value.

    Attributes:
        gradient_error: How far gradients may be off, ``||g - g_exact|| / ||g_exact||`` over all
            that is trained, measured on the example inputs. If granted, what backward reads is
            kept in eight or four bits an element, or in two where a step function can stand for
            an activation's derivative.
    """

    name: ClassVar[str] = "share"
    serves: ClassVar[tuple[str, ...]] = ("memory",)
    position: ClassVar[int] = Position.BACKWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=1e-6, gradients=1e-5, buffers=1e-6)
    planners: ClassVar[tuple[type, ...]] = (MemoryPlanner, Draft)
    rewrites: ClassVar[tuple[type, ...]] = (*EXACT, StepDerivative, QuantisedOperand)

    gradient_error: Quantity | None = None

    @property
    def granted(self) -> float:
        """The gradient error granted, as a fraction."""
        given = self.gradient_error
        if given is None:
            return 0.0
        return given.amount / 100 if given.relative else given.amount

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plans the training step of a model in training mode; others stay as they are.

        Where a pass ahead plans the step, the rewrites are handed to it.
        """
        case = Case(program, context)
        if not case.training or not case.is_trainable:
            return PassResult(program, changed=False, report={})
        run = _Run(case)
        if any(MemoryPlanner in pass_.planners for pass_ in context.ahead):
            return PassResult(program.replace(planner=Draft(run.ways(self.granted))), changed=False)
        return run.result(self.granted)


@dataclass(frozen=True)
class _Planned:
    """A program with its plan, and what it was planned on."""

    program: Program
    situation: Situation
    problem: Problem
    plan: Plan

    def idle(self, nodes: Set[str]) -> frozenset[str]:
        """Those of some values of which as much is kept as without a plan."""
        sites = account(self.situation, self.problem, self.plan.sequence)
        return frozenset(
            s.node for s in sites if s.node in nodes and s.bytes_after >= s.bytes_before
        )


@dataclass(frozen=True)
class _Tried:
    """Approximate rewrites, their error and cosine, and the values for which they save nothing."""

    rewrites: tuple[Rewrite, ...]
    error: tuple[float, float]
    idle: frozenset[str]


@dataclass
class _Run:
    case: Case

    def ways(self, granted: float) -> tuple[Way, ...]:
        """The exact rewrites; with approximate ones as well, where an error is granted."""
        exact = tuple(rule() for rule in EXACT)
        if granted <= 0:
            return (Way(exact),)
        asked = Way((*exact, StepDerivative()))  # without a site; says where it fits
        way = self._within(granted, self._planned(asked), exact)
        return (asked, way) if way is not None else (asked,)

    def _within(self, granted: float, planned: _Planned, exact: Sequence[Rewrite]) -> Way | None:
        """The way that saves most with a gradient error that is granted."""
        case, problem = self.case, planned.problem
        owners = {v: node for node, v in problem.value_of.items()}
        values = kept_values(problem, planned.plan.sequence)
        kept = [owners[v] for v in sorted(values) if v in owners]
        names = [node.name for node in kept]
        found = moves(planned.situation, kept, case.module, case.inputs, case.context.seed)
        refused: list[ShareRefusal] = []
        while found:
            tried = self._longest(found, granted, exact, names, planned.situation.original)
            if tried is None or not tried.idle:
                return tried and Way(tried.rewrites, *tried.error, tuple(refused))
            refused += [ShareRefusal(node, "few bits", _IDLE) for node in sorted(tried.idle)]
            found = [choice for choice in found if choice.node not in tried.idle]
        return Way(tuple(exact), refused=tuple(refused)) if refused else None

    def _longest(
        self,
        found: Sequence[Choice],
        granted: float,
        exact: Sequence[Rewrite],
        names: Sequence[str],
        graph: str,
    ) -> _Tried | None:
        """As many of a row of choices as the error that is granted allows."""
        tried: dict[int, _Tried] = {}

        def error(count: int) -> float:
            self.case.context.progress(f"measuring the gradient error of {count} approximations")
            rewrites = as_rewrites(found[:count], exact, names, graph)
            planned = self._planned(Way(rewrites))
            measured = gradient_error(self._exact, self.case.observe(planned.program))
            idle = planned.idle({choice.node for choice in found[:count]})
            tried[count] = _Tried(rewrites, measured, idle)
            return measured[0]

        return tried.get(longest(len(found), granted, error))

    def result(self, granted: float) -> PassResult:
        """Measures, plans, emits and measures again."""
        progress = self.case.context.progress
        progress("measuring the source model")
        before = self.case.measure(self.case.source)
        *_, way = self.ways(granted)
        planned = self._planned(way)
        progress("measuring the planned module")
        after = self.case.measure(self.case.emitted(planned.program))
        if after.saved >= before.saved:  # there is nothing to gain, not even what a plan needs
            return PassResult(self.case.program, False, {"share": _unchanged(before)})
        report = share_report(
            before, after, way, planned.situation, planned.problem, planned.plan.sequence
        )
        claims = Share.preserves.approximate() if way.gradient_error else None
        return PassResult(planned.program, True, {"share": report}, claims)

    def _planned(self, way: Way) -> _Planned:
        case = self.case
        settings = case.settings(way)
        planner = MemoryPlanner(settings, training=True)
        situation = case.situation(way.rewrites)
        problem = make_problem(situation, settings, case.context.progress)
        plan = saving_plan(situation, problem)
        planner.adopt(case.key, situation, plan)
        return _Planned(case.program.replace(planner=planner), situation, problem, plan)

    @cached_property
    def _exact(self) -> Observation:
        return self.case.observe(self.case.program.replace(planner=None))


def _unchanged(step: StepMeasurement) -> ShareReport:
    return ShareReport(step.saved, step.saved, step.peak, step.peak)
