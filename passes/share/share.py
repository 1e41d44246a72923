"""The pass `share`: what backward needs is kept once, small, or made again by cheap ops."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from graphopt.ir.mode import in_modes_of
from graphopt.ir.program import Program
from graphopt.measure import StepMeasurement, measure_step
from graphopt.passes.share.account import account
from graphopt.passes.share.dead import UnreadOperand
from graphopt.passes.share.duplicates import Duplicates
from graphopt.passes.share.masks import PackedMasks, ReluSign
from graphopt.passes.share.pooling import PackedIndices
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.planning.planner import MemoryPlanner
from graphopt.planning.rewrites import Rewrite
from graphopt.planning.saving import saving_plan
from graphopt.planning.search import PlanSettings, make_problem
from graphopt.planning.situation import CallKey
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
    """

    name: ClassVar[str] = "share"
    position: ClassVar[int] = Position.BACKWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=1e-6, gradients=1e-5, buffers=1e-6)
    planners: ClassVar[tuple[type, ...]] = (MemoryPlanner,)
    rewrites: ClassVar[tuple[type, ...]] = EXACT

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Plans the training step of a model in training mode; others stay as they are."""
        module = program.replace(planner=None).emit()
        source: nn.Module = context.source if context.source is not None else module
        in_modes_of(module, source)
        inputs = program.signature.flatten_inputs(context.args, context.kwargs)
        trainable = any(t.requires_grad for t in (*module.parameters(), *inputs))
        if not source.training or not trainable:
            return PassResult(program, changed=False, report={})
        return _Run(program, context, module, source).result(inputs)


class _Run:
    def __init__(
        self, program: Program, context: PassContext, module: Any, source: nn.Module
    ) -> None:
        self.program, self.context = program, context
        self.module, self.source = module, source

    def result(self, inputs: list[torch.Tensor]) -> PassResult:
        """Measures, plans, emits and measures again."""
        context = self.context
        context.progress("measuring the source model")
        before = self._measure(self.source)
        settings = PlanSettings(
            budget=None,
            time_limit=context.time_limit,
            seed=context.seed,
            cost_model=context.cost_model,
            loss=context.loss,
            rewrites=tuple(rule() for rule in EXACT),
        )
        planner = MemoryPlanner(settings, training=True)
        key = CallKey.of(self.module, inputs)
        situation = planner.situation(self.module, key, inputs)
        problem = make_problem(situation, settings, context.progress)
        planner.adopt(key, situation, saving_plan(situation, problem))
        program = self.program.replace(planner=planner)
        context.progress("measuring the planned module")
        after = self._measure(in_modes_of(program.emit(), self.source))
        report = ShareReport(
            saved_before=before.saved,
            saved_after=after.saved,
            peak_before=before.peak,
            peak_after=after.peak,
            sites=account(situation, problem),
        )
        return PassResult(program, changed=True, report={"share": report})

    def _measure(self, module: nn.Module) -> StepMeasurement:
        return measure_step(module, self.context.args, self.context.kwargs, loss=self.context.loss)
