"""The pass `share`: what backward needs is kept once, small, or made again by cheap ops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import nn

from graphopt.budget import Quantity
from graphopt.comparison import Observation, observe
from graphopt.ir.mode import in_modes_of
from graphopt.ir.program import Program
from graphopt.measure import StepMeasurement, measure_step
from graphopt.passes.share.account import account
from graphopt.passes.share.approximate import (
    FittedSite,
    as_rewrite,
    fitted_sites,
    gradient_error,
    most_sites,
)
from graphopt.passes.share.dead import UnreadOperand
from graphopt.passes.share.duplicates import Duplicates
from graphopt.passes.share.masks import PackedMasks, ReluSign
from graphopt.passes.share.pooling import PackedIndices
from graphopt.passes.share.steps import StepDerivative
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.planning.planner import MemoryPlanner
from graphopt.planning.problem import Problem
from graphopt.planning.rewrites import Rewrite
from graphopt.planning.saving import saving_plan
from graphopt.planning.search import PlanSettings, make_problem
from graphopt.planning.situation import CallKey, Situation
from graphopt.report import ShareReport

EXACT: tuple[type[Rewrite], ...] = (
    Duplicates,
    UnreadOperand,
    ReluSign,
    PackedMasks,
    PackedIndices,
)


@dataclass(frozen=True)
class Share(Pass):
    """Saves less for the backward pass, without more FLOPs.

    Of what the backward pass reads, memory-bound ops (elementwise ones, copies, normalisations)
    are run again from what is kept, and what is kept is the least there is; masks take one bit an
    element, indices of max pooling one byte, and operands of which only sizes count nothing. The
    gradients are those of the model. After Yang et al., "Reducing Fine-Tuning Memory Overhead by
    Approximate and Memory-Sharing Backpropagation" (ICML 2024), whose shared norm outputs are
    a case of it: a norm's output and the linear's input that it is are made again from one value.

    Attributes:
        gradient_error: How far gradients may be off, ``||g - g_exact|| / ||g_exact||`` over all
            that is trained, measured on the example inputs. If granted, activations whose input
            nothing else needs keep a code of two bits an element instead.
    """

    name: ClassVar[str] = "share"
    position: ClassVar[int] = Position.BACKWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=1e-6, gradients=1e-5, buffers=1e-6)
    planners: ClassVar[tuple[type, ...]] = (MemoryPlanner,)
    rewrites: ClassVar[tuple[type, ...]] = (*EXACT, StepDerivative)

    gradient_error: Quantity | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.granted > 0:  # which the pass measures itself
            claims = Preserves(outputs=1e-6, gradients=None, buffers=1e-6)
            object.__setattr__(self, "preserves", claims)

    @property
    def granted(self) -> float:
        """The gradient error granted, as a fraction."""
        given = self.gradient_error
        if given is None:
            return 0.0
        return given.amount / 100 if given.relative else given.amount

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plans the training step of a model in training mode; others stay as they are."""
        module = program.replace(planner=None).emit()
        source: nn.Module = context.source if context.source is not None else module
        in_modes_of(module, source)
        inputs = program.signature.flatten_inputs(context.args, context.kwargs)
        trainable = any(t.requires_grad for t in (*module.parameters(), *inputs))
        if not source.training or not trainable:
            return PassResult(program, changed=False, report={})
        return _Run(program, context, module, source, inputs).result(self.granted)


@dataclass(frozen=True)
class _Planned:
    """A program with its plan, and what it was planned on."""

    program: Program
    situation: Situation
    problem: Problem


@dataclass
class _Run:
    program: Program
    context: PassContext
    module: Any
    source: nn.Module
    inputs: list[torch.Tensor]

    def result(self, granted: float) -> PassResult:
        """Measures, plans, emits and measures again."""
        self.context.progress("measuring the source model")
        before = self._measure(self.source)
        planned = self._planned()
        error, cosine = 0.0, 1.0
        if granted > 0 and (sites := self._chosen(planned.situation, granted)):
            planned = self._planned(sites)
            error, cosine = gradient_error(self._exact, self._observe(planned.program))
        self.context.progress("measuring the planned module")
        after = self._measure(in_modes_of(planned.program.emit(), self.source))
        report = ShareReport(
            saved_before=before.saved,
            saved_after=after.saved,
            peak_before=before.peak,
            peak_after=after.peak,
            gradient_error=error,
            gradient_cosine=cosine,
            sites=account(planned.situation, planned.problem),
        )
        return PassResult(planned.program, changed=True, report={"share": report})

    def _planned(self, sites: Sequence[FittedSite] = ()) -> _Planned:
        context = self.context
        rules = [rule() for rule in EXACT]
        settings = PlanSettings(
            budget=None,
            time_limit=context.time_limit,
            seed=context.seed,
            cost_model=context.cost_model,
            loss=context.loss,
            rewrites=(as_rewrite(sites), *rules) if sites else tuple(rules),
        )
        planner = MemoryPlanner(settings, training=True)
        key = CallKey.of(self.module, self.inputs)
        situation = planner.situation(self.module, key, self.inputs)
        problem = make_problem(situation, settings, context.progress)
        planner.adopt(key, situation, saving_plan(situation, problem))
        return _Planned(self.program.replace(planner=planner), situation, problem)

    def _chosen(self, situation: Situation, granted: float) -> list[FittedSite]:
        """The sites that may be approximate together."""
        sites = fitted_sites(situation, self.module, self.inputs, self.context.seed)

        def measured(some: Sequence[FittedSite]) -> float:
            self.context.progress(f"measuring the gradient error of {len(some)} sites")
            got = self._observe(self._planned(some).program)
            return gradient_error(self._exact, got)[0]

        return most_sites(sites, granted, measured)

    @cached_property
    def _exact(self) -> Observation:
        return self._observe(self.program.replace(planner=None))

    def _observe(self, program: Program) -> Observation:
        context = self.context
        return observe(
            in_modes_of(program.emit(), self.source),
            context.args,
            context.kwargs,
            training=None,
            loss=context.loss,
            seed=context.seed,
        )

    def _measure(self, module: nn.Module) -> StepMeasurement:
        return measure_step(module, self.context.args, self.context.kwargs, loss=self.context.loss)
