"""Passes and pipelines: what a pass is, pipeline text <-> passes, running them.

A pass is a small frozen dataclass around a function from program to program:

    @dataclass(frozen=True)
    class Rematerialize(Pass):
        name: ClassVar[str] = "rematerialize"
        serves: ClassVar[tuple[str, ...]] = ("memory",)
        position: ClassVar[int] = Position.PLAN

        memory: Quantity | None = None

        def run(self, program: Program, context: PassContext) -> PassResult: ...

Its fields are its options; `canonicalize,rematerialize{memory=50%}` is the text of a pipeline and
reads back as the same passes.
"""

from __future__ import annotations

import dataclasses
import enum
import time
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from graphopt.arguments import format_value, read_value, split_top_level
from graphopt.budget import Budget, Quantity, field_names, read_field
from graphopt.errors import GraphoptError, PipelineError, suggest
from graphopt.ir.program import PassRecord
from graphopt.overlays import Overlay, section_overlays
from graphopt.plain import to_plain

if TYPE_CHECKING:
    from graphopt.ir.program import Program


class Position(enum.IntEnum):
    """Where in a pipeline a pass wants to stand; lower runs earlier."""

    CLEANUP = 0  # brings the captured graph into the form that other passes expect
    FORWARD = 30  # rewrites what the model computes
    BACKWARD = 60  # rewrites what is saved for the backward pass
    PLAN = 90  # plans execution of a graph that nothing changes any more


@dataclass(frozen=True)
class Preserves:
    """What a pass claims to leave as it was; the verifier checks every claim.

    Attributes:
        outputs: Allowed relative error of outputs (0.0: bit for bit), None: no claim.
        gradients: The same for every gradient.
        buffers: The same for buffers after a training step.
        shapes: Shapes, dtypes and structure of outputs.
        state_dict_keys: Keys of the state dict.
    """

    outputs: float | None = 0.0
    gradients: float | None = 0.0
    buffers: float | None = 0.0
    shapes: bool = True
    state_dict_keys: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    def approximate(self) -> Preserves:
        """The same without a claim on gradients, whose error the pass has measured itself."""
        return dataclasses.replace(self, gradients=None)


class Progress(Protocol):
    """Told what goes on: a message, and how much of it is done where that is known."""

    def __call__(self, message: str, fraction: float | None = None) -> None:
        """Report progress; ``fraction`` lies in [0, 1]."""


def silent(message: str, fraction: float | None = None) -> None:
    """The progress callback that says nothing."""


@dataclass(frozen=True)
class PassContext:
    """What a pass may use besides the program; options given in the pass itself win over it.

    Attributes:
        args: Example positional inputs of the model, as the user gave them.
        kwargs: Example keyword inputs.
        source: The model that was captured (a copy of the user's), for the source's own figures,
            or None where there is only a program.
        budget: The whole budget.
        loss: ``loss(outputs)`` for outputs on the example inputs; None: the model's own scalar loss
            if its output has one, else the sum of its floating outputs.
        data_loss: The user's loss for batches of `data`: ``loss(outputs)``, or, where they are
            pairs, ``loss(outputs, targets)``; or None.
        data: Iterable of batches for passes that fit or calibrate, or None.
        optimizer: The optimizer whose state counts under ``memory_scope=step``, or None.
        time_limit: Seconds that a search may take.
        seed: Seed of everything random.
        cost_model: ``flops``, ``analytic`` or ``profiled``.
        progress: Told what goes on.
        ahead: The passes that will run afterwards.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: Any = None
    budget: Budget = field(default_factory=Budget)
    loss: Callable[[Any], Any] | None = None
    data_loss: Callable[..., Any] | None = None
    data: Iterable[Any] | None = None
    optimizer: Any = None
    time_limit: float = 60.0
    seed: int = 0
    cost_model: str = "flops"
    progress: Progress = silent
    ahead: tuple[Pass, ...] = ()


@dataclass(frozen=True)
class PassResult:
    """What a pass gives back.

    Attributes:
        program: The new program (the old one where nothing changed).
        changed: Whether anything changed.
        report: Sections of the report by name, such as ``{"plan": PlanReport(...)}``; each a
            dataclass or a mapping.
        preserves: What holds of this result, where that isn't what the pass claims of all.
    """

    program: Program
    changed: bool
    report: Mapping[str, Any] = field(default_factory=dict)
    preserves: Preserves | None = None


@dataclass(frozen=True)
class Pass:
    """Base of all passes; subclasses are frozen dataclasses whose fields are the options.

    Every option has a default and reads from text.  Options named like a budget field are read as
    quantities with units.

    Attributes:
        name: Name in pipelines and on the command line.
        serves: Budget fields (or ``"explanation"``) that this pass is chosen for.
        position: Where in a pipeline it wants to stand.
        always: Whether it belongs into every pipeline that a budget chooses.
        preserves: What it claims to leave as it was.
        planners: Planner classes that its programs may carry (for loading saved programs).
        rewrites: Classes of the joint-graph rewrites that these may use.
    """

    name: ClassVar[str] = ""
    serves: ClassVar[tuple[str, ...]] = ()
    position: ClassVar[int] = Position.FORWARD
    always: ClassVar[bool] = False
    preserves: ClassVar[Preserves] = Preserves()
    planners: ClassVar[tuple[type, ...]] = ()
    rewrites: ClassVar[tuple[type, ...]] = ()

    def __post_init__(self) -> None:
        for name, hint in option_types(type(self)).items():
            value = getattr(self, name)
            if value is None:
                continue
            if name in field_names():
                object.__setattr__(self, name, read_field(name, value))
            else:
                _check_choice(type(self), name, value, hint)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Transform ``program`` without changing it.

        Raises:
            GraphoptError: What can't be done, by node, op and user line.
        """
        raise TypeError(f"pass {self.name!r} has no run method")

    @classmethod
    def from_budget(cls, budget: Budget) -> Pass:
        """The pass with the options that ``budget`` asks for.

        A field of the budget sets the option of the same name; ``memory_scope`` sets the option
        ``scope`` of a pass that serves ``memory``.
        """
        options: dict[str, Any] = {}
        for name, value in budget.items().items():
            known = option_types(cls)
            if name in known:
                options[name] = value
                continue
            for served in cls.serves:
                short = name.removeprefix(f"{served}_")
                if short != name and short in known:
                    options[short] = value
        return cls(**options)

    @classmethod
    def facts(cls, report: Mapping[str, Any]) -> tuple[Overlay, ...]:
        """What the pass reports of single nodes, for views to draw.

        Args:
            report: The plain sections of its report, as in `PassRecord`.
        """
        sections = ((n, data) for n, data in report.items() if isinstance(data, Mapping))
        found = (section_overlays(name, data) for name, data in sections)
        return tuple(overlay for overlays in found for overlay in overlays)

    def options(self) -> dict[str, Any]:
        """Options that differ from their defaults."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if getattr(self, f.name) != _default(f)
        }

    def __str__(self) -> str:
        pairs = ",".join(f"{k}={format_value(v)}" for k, v in self.options().items())
        return f"{self.name}{{{pairs}}}" if pairs else self.name


def option_types(cls: type[Pass]) -> dict[str, Any]:
    """Option name -> annotated type, in the order of declaration."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def _default(f: dataclasses.Field[Any]) -> Any:
    if f.default_factory is not dataclasses.MISSING:
        return f.default_factory()
    return f.default


def _check_choice(cls: type[Pass], name: str, value: Any, hint: Any) -> None:
    choices = [c for part in _alternatives(hint) for c in _literals(part)]
    if callable(value) and any(typing.get_origin(p) is Callable for p in _alternatives(hint)):
        return
    if choices and value not in choices:
        known = ", ".join(map(str, choices))
        raise PipelineError(
            f"{cls.name}{{{name}={value}}}: not one of {known}",
            hint=suggest(str(value), map(str, choices)),
        )


def _literals(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is Literal else ()


def _alternatives(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.get_args(hint)
    return (hint,)


def make_pass(cls: type[Pass], options: Mapping[str, str]) -> Pass:
    """Build a pass from the text of its options.

    Raises:
        PipelineError: Unknown option, or a value that doesn't fit its type.
        BudgetError: A malformed quantity.
    """
    known = option_types(cls)
    values: dict[str, Any] = {}
    for raw, text in options.items():
        name = raw.replace("-", "_")
        if name not in known:
            listed = ", ".join(known) or "none"
            raise PipelineError(
                f"pass {cls.name!r} has no option {raw!r}",
                hint=suggest(name, known) or f"its options: {listed}",
            )
        quantity = name in field_names() or Quantity in _alternatives(known[name])
        try:
            values[name] = text if quantity else read_value(text, _alternatives(known[name]))
        except ValueError as error:
            raise PipelineError(f"{cls.name}{{{raw}={text}}}: {error}") from None
    return cls(**values)


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run; prints as text that `parse` reads back."""

    passes: tuple[Pass, ...]

    @classmethod
    def parse(cls, text: str, lookup: Callable[[str], type[Pass]]) -> Pipeline:
        """Read ``name,name{option=value,...},...``.

        Args:
            text: The pipeline.
            lookup: Finds the class of a pass by name (`graphopt.registry.get`).

        Raises:
            PipelineError: Malformed text, unknown pass or option.
        """
        if not text.strip():
            raise PipelineError("an empty pipeline", hint="for example canonicalize")
        return cls(tuple(_parse_pass(part, lookup) for part in split_top_level(text)))

    def run(
        self,
        program: Program,
        context: PassContext,
        instruments: Sequence[Any] = (),
    ) -> Program:
        """Run the passes one after the other.

        Args:
            program: What to start from; it is not changed.
            context: What the passes may use.
            instruments: `graphopt.instruments.Instrument`s that watch the run.

        Returns:
            The program that the last pass gave, with one `PassRecord` more per pass.

        Raises:
            GraphoptError: From a pass or an instrument.
        """
        for instrument in instruments:
            instrument.start(program, context)
        for index, (pass_, here) in enumerate(self.steps(context)):
            context.progress(f"pass {pass_}", index / len(self.passes))
            program = _run_pass(pass_, program, here, instruments)
        for instrument in instruments:
            instrument.finish(program)
        context.progress("passes done", 1.0)
        return program

    def steps(self, context: PassContext) -> Iterator[tuple[Pass, PassContext]]:
        """The passes in order, each with the context that knows what is ahead of it."""
        for index, pass_ in enumerate(self.passes):
            ahead = (*self.passes[index + 1 :], *context.ahead)
            yield pass_, dataclasses.replace(context, ahead=ahead)

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))


def _run_pass(
    pass_: Pass, program: Program, context: PassContext, instruments: Sequence[Any]
) -> Program:
    for instrument in instruments:
        instrument.before(pass_, program)
    start = time.perf_counter()
    result = pass_.run(program, context)
    seconds = time.perf_counter() - start
    if not isinstance(result, PassResult):
        raise GraphoptError(f"pass {pass_.name!r} gave {type(result).__name__}, not a PassResult")
    for instrument in instruments:
        instrument.after(pass_, program, result, seconds)
    record = PassRecord(
        name=pass_.name,
        spec=str(pass_),
        changed=result.changed,
        seconds=seconds,
        report={name: to_plain(section) for name, section in result.report.items()},
    )
    return result.program.replace(history=(*result.program.history, record))


def _parse_pass(text: str, lookup: Callable[[str], type[Pass]]) -> Pass:
    name, brace, rest = text.strip().partition("{")
    cls = lookup(name.strip())
    if not brace:
        return make_pass(cls, {})
    if not rest.endswith("}"):
        raise PipelineError(f"malformed pass {text!r}", hint="name{option=value,...}")
    options: dict[str, str] = {}
    for pair in split_top_level(rest[:-1]) if rest[:-1].strip() else []:
        key, equals, value = pair.partition("=")
        key = key.strip()
        if not equals or not key:
            raise PipelineError(f"malformed option {pair!r} of {name}", hint="option=value")
        if key in options:
            raise PipelineError(f"option {key!r} of {name} is given twice")
        options[key] = value.strip()
    return make_pass(cls, options)
