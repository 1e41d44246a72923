"""The pass `relevance`: which inputs an output rests on, operator by operator."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from graphopt.budget import read_field
from graphopt.errors import UsageError
from graphopt.ir.program import Program
from graphopt.passes.relevance import patterns
from graphopt.passes.relevance.facts import Arrivals, node_facts
from graphopt.passes.relevance.module import ExplainedModule
from graphopt.passes.relevance.options import Options
from graphopt.passes.relevance.presets import PRESETS, composite_of
from graphopt.passes.relevance.target import check_target
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves

EMITTERS = ("auto", "explicit")


@dataclass(frozen=True)
class Relevance(Pass):
    """Layer-wise relevance propagation at the level of operators.

    Attributes:
        composite: Name of a composite, or its TOML.
        target: ``argmax`` or a class index.
    """

    name: ClassVar[str] = "relevance"
    serves: ClassVar[tuple[str, ...]] = ("explanation",)
    position: ClassVar[int] = Position.PLAN
    preserves: ClassVar[Preserves] = Preserves()

    composite: str = "cp-lrp"
    target: str = "argmax"

    def explain(
        self,
        program: Program,
        context: PassContext,
        *,
        composite: Any,
        target: Any,
        attribute: Sequence[str],
        memory_budget: Any,
        emitter: str = "auto",
        data: Iterable[Any] | None = None,
    ) -> ExplainedModule:
        """A module that explains a program's output (see `graphopt.explain`)."""
        if emitter not in EMITTERS:
            raise UsageError(
                f"there is no emitter {emitter!r}", hint=f"known: {', '.join(EMITTERS)}"
            )
        rules = composite_of(composite)
        if rules.lacks_patterns:
            rules = rules.with_patterns(_patterns(program, rules.name, data, len(context.args)))
        budget: Any = None if memory_budget is None else read_field("memory", memory_budget)
        options = Options(
            rules, check_target(target), _names(attribute), emitter == "explicit", budget
        )
        flat = program.signature.flatten_inputs(context.args, context.kwargs)
        return ExplainedModule(program.emit(), options, flat)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Changes nothing; reports the relevance of each value on the example inputs.

        Raises:
            UsageError: A composite or a target that there isn't.
            UnsupportedError: An operator without a rule.
        """
        found = node_facts(program, self._options(), context.args, context.kwargs)
        return PassResult(program, changed=False, report={"relevance": found})

    def arrivals(self, program: Program, context: PassContext) -> Arrivals:
        """What says which relevance arrives at each value of a program, for other passes."""
        return Arrivals(program, self._options(), context.args, context.kwargs)

    @staticmethod
    def composites() -> dict[str, str]:
        """The composites that come with graphopt: name -> TOML."""
        return {name: make().to_toml() for name, make in PRESETS.items()}

    def _options(self) -> Options:
        index = int(self.target) if self.target.lstrip("-").isdigit() else self.target
        return Options(composite_of(self.composite), check_target(index), ("inputs",))


def _names(attribute: Any) -> tuple[str, ...]:
    """Names of what gets a relevance; one alone may stand without a tuple."""
    names = (attribute,) if isinstance(attribute, str) else attribute
    if not isinstance(names, Sequence) or not all(isinstance(n, str) for n in names):
        raise UsageError(
            f"attribute={attribute!r} isn't known",
            hint="a tuple of names, such as attribute=('inputs', 'parameters')",
        )
    return tuple(names)


def _patterns(
    program: Program, composite: str, data: Iterable[Any] | None, arguments: int
) -> dict[str, Tensor]:
    if data is None:
        raise UsageError(
            f"the composite {composite!r} needs data to find its patterns in",
            hint="explain(..., data=batches), or a composite.with_patterns(...)",
        )
    if not isinstance(data, Iterable):
        raise UsageError(f"data={data!r} isn't known", hint="a list of batches, or a loader")
    return patterns.of_program(program, data, arguments)
