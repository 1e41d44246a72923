"""The pass `relevance`: which inputs an output rests on, operator by operator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.budget import read_field
from graphopt.ir.program import Program
from graphopt.passes.relevance.module import ExplainedModule, Options
from graphopt.passes.relevance.presets import composite_of
from graphopt.passes.relevance.target import check_target
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves


@dataclass(frozen=True)
class Relevance(Pass):
    """Layer-wise relevance propagation at the level of operators.

    Attributes:
        composite: Name of a composite, or its TOML.
        attribute: What gets a relevance.
    """

    name: ClassVar[str] = "relevance"
    serves: ClassVar[tuple[str, ...]] = ("explanation",)
    position: ClassVar[int] = Position.PLAN
    preserves: ClassVar[Preserves] = Preserves()

    composite: str = "cp-lrp"

    def explain(
        self,
        program: Program,
        context: PassContext,
        *,
        composite: Any,
        target: Any,
        attribute: tuple[str, ...],
        memory_budget: Any,
        emitter: str = "auto",
    ) -> ExplainedModule:
        """A module that explains a program's output (see `graphopt.explain`)."""
        budget: Any = None if memory_budget is None else read_field("memory", memory_budget)
        options = Options(
            composite_of(composite), check_target(target), attribute, emitter == "explicit", budget
        )
        flat = program.signature.flatten_inputs(context.args, context.kwargs)
        return ExplainedModule(program.emit(), options, flat)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Changes nothing; reports the relevance of each value on the example inputs."""
        return PassResult(program, changed=False)
