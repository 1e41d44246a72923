"""What was done and what it cost: dataclasses -> JSON -> a table.

The same data feeds the terminal, the HTML view and the tests.  Bytes are plain integers; FLOPs
count a multiply-add as 2; ratios are plain fractions (0.1 is ten percent).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from graphopt.derived import derived
from graphopt.errors import UnsupportedError
from graphopt.plain import human_bytes, human_count, to_plain

if TYPE_CHECKING:
    from graphopt.ir.program import PassRecord, Program

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class MemoryReport:
    """Section ``memory``: peak bytes above the start of a warmed-up step, gradients allocated.

    Attributes:
        eager_peak: The source model's own peak.
        budget: What was allowed, in bytes.
        predicted_peak: The plan's own figure, made before the result was measured.
        measured_peak: The allocator's figure of the module that is returned.
        scope: ``activations`` or ``step`` (parameters, gradients, optimizer state count too).
        mode: ``train`` (one forward and backward) or ``eval`` (the forward alone).
    """

    eager_peak: int
    budget: int
    predicted_peak: int
    measured_peak: int
    scope: str = "activations"
    mode: str = "train"


@dataclass(frozen=True)
class PlanReport:
    """Section ``plan``: the plan of one forward and backward.

    Attributes:
        status: ``optimal``, ``feasible``.
        overhead: Added duration, as a fraction of the step without recomputation.
        lower_bound: Proven lower bound on ``overhead``.
        gap: ``overhead - lower_bound``.
        recomputed_flops: FLOPs done more than once.
        step_flops: FLOPs of one forward and backward without recomputation.
        seconds: Time spent planning.
        cost_model: ``flops``, ``analytic`` or ``profiled``.
        scope: For which plans ``lower_bound`` and ``optimal`` hold.
    """

    status: str
    overhead: float
    lower_bound: float
    gap: float
    recomputed_flops: int
    step_flops: int
    seconds: float
    cost_model: str = "flops"
    scope: str = ""


@dataclass(frozen=True)
class ShareSite:
    """A value that the backward pass needs.

    Attributes:
        node: Its node in the joint graph.
        rule: What was done.
        bytes_before: Bytes that autograd keeps of it.
        bytes_after: Bytes that the plan keeps.
    """

    node: str
    rule: str
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class ShareRefusal:
    """A value for which a rule fits and was not applied.

    Attributes:
        node: Its node in the joint graph.
        rule: The rule.
        reason: Why it was not.
    """

    node: str
    rule: str
    reason: str


@dataclass(frozen=True)
class ShareReport:
    """Section ``share``: what is saved between forward and backward.

    Attributes:
        saved_before: The source model's live bytes after forward and loss.
        saved_after: The same of the module that is returned.
        peak_before: The source model's peak.
        peak_after: The same of the module that is returned.
        sites: The values that backward needs.
        gradient_error: Measured ``||g - g_exact|| / ||g_exact||`` over all that is trained.
        gradient_cosine: Cosine of the gradient and the exact one.
        refused: Rules that fit somewhere and were not applied, and why.
    """

    saved_before: int
    saved_after: int
    peak_before: int
    peak_after: int
    sites: tuple[ShareSite, ...] = ()
    gradient_error: float = 0.0
    gradient_cosine: float = 1.0
    refused: tuple[ShareRefusal, ...] = ()


@dataclass(frozen=True)
class FrozenAxis:
    """An axis of a parameter of which nothing can be removed.

    Attributes:
        parameter: The parameter's name.
        axis: The axis.
        reason: Why, by node and operator.
    """

    parameter: str
    axis: int
    reason: str


@dataclass(frozen=True)
class Refinement:
    """What measuring widths on data gained.

    Attributes:
        measure: ``loss`` (the user's) or ``distortion`` (squared distance of the outputs, relative
            to their spread), of the masked network.
        before: On all batches, with the widths that the allocation gave.
        after: The same with the widths that were taken.
        evaluations: How often the batches were gone through, parts of them added up.
    """

    measure: str
    before: float
    after: float
    evaluations: float


@dataclass(frozen=True)
class PruneReport:
    """Section ``prune``: what was removed.  FLOPs are those of one forward on the example inputs.

    Attributes:
        flops_before: The source's FLOPs.
        flops_after: FLOPs of the module that is returned, counted on its graph.
        params_before: The source's parameters; a tied one counts once.
        params_after: Parameters of the module that is returned.
        bytes_before: Their bytes.
        bytes_after: The same afterwards.
        criterion: How units were ranked.
        allocation: How widths were chosen.
        value: The criterion's sum over what is kept, as a share of what there was; with several
            rounds of the last one.
        bound: Proven upper bound on ``value`` for this budget; None where nothing was proven.
        dimensions: Name, full width and width of each prunable dimension.
        frozen: Axes that can't be pruned, and why.
        kept: Parameter -> axis -> places that are kept.
        compensated: Norms and means that are written out so that they equal the masked network's.
        latency_before: With a limit on seconds: the source's, lower quartile; else None.
        latency_after: The same of the module that is returned, timed in turns with the source; for
            a limit in per cent, in units in which the source still takes `latency_before`.
        refinement: What measured refinement of the widths gained, if it was asked for.
    """

    flops_before: int
    flops_after: int
    params_before: int
    params_after: int
    bytes_before: int
    bytes_after: int
    criterion: str
    allocation: str
    value: float
    bound: float | None
    dimensions: tuple[tuple[str, int, int], ...] = ()
    frozen: tuple[FrozenAxis, ...] = ()
    kept: Mapping[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    compensated: tuple[str, ...] = ()
    latency_before: float | None = None
    latency_after: float | None = None
    refinement: Refinement | None = None


@dataclass(frozen=True)
class SparsifyReport:
    """Section ``sparsify``: which weights were masked.

    Attributes:
        weights_before: Weights of all matrices that can be masked, masked already or not; a tied
            one counts once.
        weights_after: Those that no mask zeroes, counted in the module that is returned.
        method: How it was decided how many each matrix keeps, and which.
        criterion: How weights of a matrix were ranked.
        pattern: ``n:m``, or empty.
        matrices: Name, weights, and weights kept of each.
        dense: Parameters of two or more axes of which nothing was masked, and why.
        distortion: Measured: mean squared distance of the outputs from the dense model's on the
            calibration data, relative to their spread.
        objective: What the method brings down, as it predicts it: ``layerwise``: the distortion;
            ``icbs``: the change of the loss from the masks that it starts with; with a pattern on
            some matrices the loss of the criterion, or the distortion. None: nothing is predicted.
        bound: Proven lower bound on ``objective`` under the method's own model.
        gap: ``objective - bound``.
    """

    weights_before: int
    weights_after: int
    method: str
    criterion: str
    pattern: str
    matrices: tuple[tuple[str, int, int], ...]
    dense: tuple[tuple[str, str], ...]
    distortion: float | None
    objective: float | None = None
    bound: float | None = None
    gap: float | None = None


@dataclass(frozen=True)
class Report:
    """What was done to a model.

    Attributes:
        budget: The budget that was asked for, as fields of text.
        passes: One record per pass that ran, in order.
        predictor: ``predictor(args, kwargs)`` gives the plan's peak bytes for other inputs; not
            part of the JSON form.
        module: The pruned or masked module that the report is of, or None; likewise.
    """

    budget: Mapping[str, str] = field(default_factory=dict)
    passes: tuple[PassRecord, ...] = ()
    predictor: Callable[[tuple[Any, ...], Mapping[str, Any]], int] | None = field(
        default=None, repr=False, compare=False
    )
    module: Any = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, program: Program, budget: Mapping[str, str] | None = None) -> Report:
        """The report of a program: its history, and its planner for predictions."""
        predict = getattr(program.planner, "predict_peak", None)
        predictor = None if predict is None else Predictor(program.planner, program.signature)
        return cls(dict(budget or {}), program.history, predictor)

    @property
    def sections(self) -> dict[str, dict[str, Any]]:
        """Sections by name; where two passes report the same one, the last wins."""
        merged: dict[str, dict[str, Any]] = {}
        for record in self.passes:
            merged.update({name: dict(section) for name, section in record.report.items()})
        return merged

    @property
    def pipeline(self) -> str:
        """The passes as pipeline text."""
        return ",".join(record.spec for record in self.passes)

    @property
    def seconds(self) -> float:
        """Seconds spent in passes."""
        return sum(record.seconds for record in self.passes)

    def __getitem__(self, section: str) -> dict[str, Any]:
        return self.sections[section]

    def predict_peak(self, *args: Any, **kwargs: Any) -> int:
        """Peak bytes of a planned step on other inputs, without running it.

        Args:
            *args: Inputs as the module takes them.
            **kwargs: Keyword inputs.

        Returns:
            Predicted peak in bytes above the start of the step.

        Raises:
            UnsupportedError: The module has no plan.
        """
        if self.predictor is None:
            raise UnsupportedError(
                "this module has no memory plan to predict from",
                hint="optimize with a memory budget first",
            )
        return self.predictor(args, kwargs)

    def masked_module(self) -> Any:
        """The full-size twin of a pruned module: the same weights, and zeros for what was removed.

        Returns:
            An `OptimizedModule` of the source's sizes that shares nothing with the pruned one.

        Raises:
            UnsupportedError: Nothing was pruned, or the module comes from a file.
        """
        from graphopt.ir.slices import masked_twin

        if self.module is None:
            raise UnsupportedError("nothing was pruned", hint="ask for fewer flops or params")
        return masked_twin(self.module)

    def masks(self) -> dict[str, Any]:
        """Which weights are kept: parameter name -> bool tensor of its shape, False where zeroed.

        Only parameters of which something was zeroed have one. What was zero by itself counts as
        kept.
        """
        if self.module is None:
            return {}
        masks = self.module.program.masks or {}
        names = [name for name, _ in self.module.named_parameters()]
        return {name: masks[name].kept for name in names if name in masks}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; the keys of sections are stable within a ``schema_version``."""
        return {
            "schema_version": SCHEMA_VERSION,
            "budget": dict(self.budget),
            "pipeline": self.pipeline,
            "passes": [
                {"pass": r.spec, "changed": r.changed, "seconds": r.seconds} for r in self.passes
            ],
            **self.sections,
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(to_plain(self.to_dict()), indent=2, allow_nan=False)

    def table(self) -> Any:
        """The report as a `rich` renderable."""
        return render(self)

    def __str__(self) -> str:
        return as_text(self.table())

    def _repr_html_(self) -> str:
        return derived("report_html", self)


@dataclass(frozen=True)
class Predictor:
    """Asks a planner for the peak of a call; an ordinary object, so that it pickles.

    Attributes:
        planner: The planner of a program, which has ``predict_peak(flat_inputs)``.
        signature: The program's signature.
    """

    planner: Any
    signature: Any

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
        """Peak bytes of a call with these inputs."""
        return int(self.planner.predict_peak(self.signature.flatten_inputs(args, kwargs)))


_BYTE_KEYS = ("peak", "budget", "bytes", "saved")
_SHARE_KEYS = ("overhead", "lower_bound", "gap")


def human_value(key: str, value: Any) -> str:
    """Text of one report value for people, by the unit that its key implies."""
    if value is None:
        return "-"
    if isinstance(value, (list, tuple, dict)):
        return f"{len(value)} entries"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if any(part in key for part in _BYTE_KEYS):
        return human_bytes(value)
    if key in _SHARE_KEYS:
        return f"{100 * value:.2f} %"
    if "seconds" in key:
        return f"{value:.2f} s"
    if "latency" in key:
        return f"{1e3 * value:.3g} ms"
    if "flops" in key or "params" in key:
        return human_count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def render(report: Report) -> Any:
    """Tables of a report: one of the passes, one of each section."""
    from rich.console import Group
    from rich.table import Table

    passes = Table(title="passes", title_justify="left")
    for column in ("pass", "changed", "seconds"):
        passes.add_column(column, justify="right" if column == "seconds" else "left")
    for record in report.passes:
        passes.add_row(record.spec, "yes" if record.changed else "no", f"{record.seconds:.2f}")
    tables = [passes]
    for name, section in report.sections.items():
        table = Table("", name, title_justify="left", show_header=True)
        for key, value in section.items():
            table.add_row(key.replace("_", " "), human_value(key, value))
        tables.append(table)
    return Group(*tables)


def as_text(renderable: Any, width: int = 100) -> str:
    """A `rich` renderable as plain text."""
    import io

    from rich.console import Console

    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(renderable)
    return out.getvalue().rstrip()
