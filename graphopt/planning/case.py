"""What a pass plans for: a program, the model that it came from, and the example inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from graphopt.comparison import Observation, observe
from graphopt.ir.mode import in_modes_of
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import Program
from graphopt.measure import StepMeasurement, measure_step
from graphopt.pipeline import PassContext
from graphopt.planning.rewrites import Rewrite, Way
from graphopt.planning.search import PlanSettings
from graphopt.planning.situation import CallKey, Situation
from graphopt.planning.traced import TracedCall, trace_call


@dataclass(frozen=True, eq=False)
class Case:
    """The example step of a program, or its forward pass where the model is in eval mode.

    Attributes:
        program: The program.
        context: The model and its inputs.
        hold_outputs: Whether the training loop keeps the outputs during backward.
    """

    program: Program
    context: PassContext
    hold_outputs: bool = False

    @cached_property
    def module(self) -> OptimizedModule:
        """The program as a module, without a plan, in the modes of the source."""
        return self.emitted(self.program.replace(planner=None))

    @cached_property
    def source(self) -> nn.Module:
        """The model; where there is only a program, its module."""
        given = self.context.source
        return self.program.replace(planner=None).emit() if given is None else given

    @cached_property
    def inputs(self) -> list[torch.Tensor]:
        """The flat example inputs."""
        return self.program.signature.flatten_inputs(self.context.args, self.context.kwargs)

    @property
    def training(self) -> bool:
        """Whether the example call is a training step."""
        return self.source.training

    @property
    def is_trainable(self) -> bool:
        """Whether anything requires a gradient."""
        return any(t.requires_grad for t in (*self.module.parameters(), *self.inputs))

    def settings(self, way: Way, budget: int | None = None, **options: Any) -> PlanSettings:
        """How to plan: by the context, but for the options that are given and not None."""
        context = self.context
        chosen = {name: value for name, value in options.items() if value is not None}
        common = {
            "time_limit": context.time_limit,
            "seed": context.seed,
            "cost_model": context.cost_model,
        }
        return PlanSettings(
            budget=budget,
            loss=context.loss,
            hold_outputs=self.hold_outputs,
            way=way,
            **{**common, **chosen},
        )

    def emitted(self, program: Program) -> OptimizedModule:
        """A module in the modes of the source."""
        return in_modes_of(program.emit(), self.source)

    @cached_property
    def key(self) -> CallKey:
        """What a plan for the example call depends on."""
        with torch.set_grad_enabled(self.training):
            return CallKey.of(self.module, self.inputs)

    @cached_property
    def _call(self) -> TracedCall:
        with torch.set_grad_enabled(self.training):
            return trace_call(
                self.program, self.module, self.key, self.inputs,
                loss=self.context.loss, hold_outputs=self.hold_outputs,
            )  # fmt: skip

    def situation(self, rewrites: Sequence[Rewrite] = ()) -> Situation:
        """The joint graph of the example call, traced once and rewritten each time."""
        with torch.set_grad_enabled(self.training):
            return self._call.situation(rewrites)

    def measure(self, module: nn.Module) -> StepMeasurement:
        """Bytes of the example step."""
        with torch.set_grad_enabled(self.training):
            return measure_step(
                module,
                self.context.args,
                self.context.kwargs,
                loss=self.context.loss,
                forward_only=not self.training,
                hold_outputs=self.hold_outputs,
            )

    def observe(self, program: Program) -> Observation:
        """Outputs and gradients of the example step, with the context's seed."""
        return observe(
            self.emitted(program),
            self.context.args,
            self.context.kwargs,
            training=None,
            loss=self.context.loss,
            seed=self.context.seed,
        )
