"""The pass `prune`: smaller operators that compute what the masked network computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from graphopt.budget import Quantity
from graphopt.comparison import Observation, observe, unequal
from graphopt.cost.sizes import values_of
from graphopt.errors import BudgetError, PipelineError, UnsupportedError, VerificationError
from graphopt.ir.masks import Masks
from graphopt.ir.program import Program
from graphopt.ir.slices import Slices, blank
from graphopt.passes.prune.analysis import analyse
from graphopt.passes.prune.choice import Chooser, Chosen
from graphopt.passes.prune.criteria import Name, UserFunction
from graphopt.passes.prune.names import Freeze, all_names
from graphopt.passes.prune.rewrite import masked
from graphopt.passes.prune.units import Reason
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.report import PruneReport

# Differences between the pruned and the masked network that rounding explains: at least so much,
# and so many units of the least precise type.
_ROUNDING = 1e-5
_UNITS = 8


@dataclass(frozen=True)
class Prune(Pass):
    """Removes channels, heads, hidden units until a budget of FLOPs or parameters is kept.

    What comes back computes exactly what the source computes with all parameters of the removed
    units set to zero. Norms over a pruned axis are written out with the full number of places.

    Attributes:
        flops: FLOPs of one forward on the example inputs.
        params: Parameters.
        bytes: Bytes of the parameters, read like a count or as a percentage.
        latency: Seconds of one forward in eval mode on the example inputs, measured on this
            machine with the threads and on the device that are set; a percentage is one of the
            source's seconds, timed in turns with the result.
        criterion: What a unit is worth: a name of `graphopt.passes.prune.criteria.CRITERIA`, or,
            in Python, a function that gets a `DimensionView` and gives each of its units a score,
            not negative, larger is more; ``auto``: ``taylor2`` with data, else ``l2``.
        allocation: ``uniform``: the same share of every dimension; ``global``: one threshold;
            ``pq``: shares by how unequal a dimension's units are
            (`graphopt.passes.prune.sparsity`); ``solver``: the largest sum of the criterion, with a
            bound; ``auto``: ``solver`` with a criterion that estimates what is lost, else
            ``uniform``, since magnitudes of different layers don't compare.
        round_to: Widths are multiples of it, or whole; None: of what fills vector registers (16,
            of dimensions narrower than 64 8, than 32 1), with a limit on seconds always, else where
            that loses next to nothing of the criterion and of the budget.
        min_keep: The least share of each dimension that is kept.
        caps: Bounds on the kept shares of dimensions by globs of their parameters' names:
            ``encoder.*:25%..75% head.*:100%``; also ``fc.weight:0:50%..``, of one axis.
        refine: How often the data may be gone through to improve widths by measuring: one dimension
            gets wider, others narrower, and what measures better on the data is kept.
        rounds: With a criterion of gradients, how often units are ranked anew on what is left,
            while the limit comes down: first-order scores hold for small changes.
        freeze: Parameters that keep their sizes: names or globs, separated by blanks; of a tied one
            any name.
        norm: ``exact``: norms and means over a pruned axis are written out; ``freeze``: their axes
            are not pruned.
    """

    name: ClassVar[str] = "prune"
    serves: ClassVar[tuple[str, ...]] = ("flops", "params", "bytes", "latency")
    position: ClassVar[int] = Position.FORWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=None, gradients=None, buffers=None)

    flops: Quantity | None = None
    params: Quantity | None = None
    bytes: Quantity | None = None
    latency: Quantity | None = None
    criterion: Name | UserFunction = "auto"
    allocation: Literal["auto", "uniform", "global", "pq", "solver"] = "auto"
    round_to: int | None = None
    min_keep: float = 0.0
    caps: str = ""
    refine: int = 0
    rounds: int = 16
    freeze: str = ""
    norm: Literal["exact", "freeze"] = "exact"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses what to remove, removes it, counts, and compares with the masked network.

        Raises:
            BudgetInfeasible: What is frozen takes more; carries the smallest budget.
            BudgetError: There is no budget.
            InputMismatch: The model doesn't take the data.
            PipelineError: An option is out of range, or names a parameter that there isn't.
        """
        if program.planner is not None:
            raise UnsupportedError(
                "pruning a program that carries a memory plan",
                hint="prune first: optimize(model, 'flops=50%,memory=50%') does",
            )
        if not (self.flops or self.params or self.bytes or self.latency):
            raise BudgetError(
                "prune without a budget", hint="prune{flops=50%} or prune{params=50%}"
            )
        return Run(self, program, context).result()


class Run:
    """One run of the pass.

    Attributes:
        chooser: Says what is removed.
    """

    def __init__(self, options: Prune, program: Program, context: PassContext) -> None:
        """Analyse a program; nothing is chosen yet.

        Raises:
            PipelineError: An option is out of range, or names a parameter that there isn't.
        """
        _check(options)
        self.options, self.program, self.context = options, program, context
        context.progress("finding what can be pruned")
        self.analysis = analyse(program, compensates=options.norm == "exact")
        self._freeze()
        self.chooser = Chooser(options, program, context, self.analysis)

    def result(self) -> PassResult:
        """Choose, rewrite, check, report."""
        return self.finished(self.chooser.chosen())

    def finished(self, chosen: Chosen) -> PassResult:
        """Check the program without what was chosen, and report."""
        self._check(chosen.program, chosen.removed)
        removed = chosen.removed
        small = chosen.program.replace(slices=self._slices(removed), masks=self._masks(removed))
        report = self._report(chosen)
        return PassResult(small, changed=bool(chosen.removed), report={"prune": report})

    def _freeze(self) -> None:
        freeze, names = Freeze.read(self.options.freeze, self.program), all_names(self.program)
        for key, slot in self.analysis.slots.items():
            reason = freeze.reason(names.get(key, [slot.path]))
            for labels in slot.value.axes if reason else ():
                self.analysis.units.freeze(labels, Reason(str(reason)))

    def _check(self, small: Program, removed: frozenset[int]) -> None:
        """Compare with the masked network on the example inputs, in eval mode."""
        self.context.progress("comparing with the masked network")
        twin = masked(self.program, self.analysis, removed)
        expected = self._observe(twin)
        worst = unequal(
            expected,
            self._observe(small),
            {"outputs": rounding(small), "gradients": None, "buffers": None},
            lambda: self._observe(twin),
        )
        if worst is not None:
            raise VerificationError(
                f"the pruned network differs from the masked one: {worst.name} by "
                f"{worst.error:.3g} (relative)",
                claim="outputs",
                pass_name=Prune.name,
                hint="this is a defect of a pruning rule; please report it",
            )

    def _observe(self, program: Program) -> Observation:
        context = self.context
        module = copy.deepcopy(program.emit())
        return observe(
            module, context.args, context.kwargs, training=False, loss=context.loss,
            seed=context.seed,
        )  # fmt: skip

    def _slices(self, removed: frozenset[int]) -> Slices:
        kept, shapes = {}, {}
        names = all_names(self.program)
        for key, slot in self.analysis.slots.items():
            places = self.analysis.kept(slot, removed)
            for name in names.get(key, [slot.path]) if places else ():
                kept[name], shapes[name] = places, tuple(slot.tensor.shape)
        earlier = self.program.slices
        full = None if earlier is not None else blank(self.program.emit())
        return Slices(kept, shapes, full).after(earlier)

    def _masks(self, removed: frozenset[int]) -> Masks | None:
        """What earlier masks keep of what is left."""
        found = dict(self.program.masks or {})
        names = all_names(self.program)
        for key, slot in self.analysis.slots.items():
            places = self.analysis.kept(slot, removed)
            for name in names.get(key, []) if places else ():
                if name in found:
                    found[name] = found[name].narrow(places)
        return found or None

    def _report(self, chosen: Chosen) -> PruneReport:
        removed, allocation = chosen.removed, chosen.allocation
        before, after = self.chooser.full, chosen.have
        whole = sum(sum(d.gains) for d in chosen.problem.dimensions) or 1.0
        slots = [slot for slot in self.analysis.slots.values() if slot.is_trained]
        kept = {s.path: self.analysis.kept(s, removed) for s in slots}
        return PruneReport(
            **{f"{name}_before": count for name, count in before.items()},
            **{f"{name}_after": count for name, count in after.items()},
            criterion=self.chooser.criterion.name,
            allocation=self.chooser.scheme,
            value=allocation.value / whole,
            bound=allocation.bound / whole if self.chooser.scheme == "solver" else None,
            dimensions=tuple(
                (d.name, d.width, w)
                for d, w in zip(self.chooser.dimensions.all, allocation.widths, strict=True)
            ),
            frozen=tuple(self.chooser.frozen()),
            kept={n: {str(a): p for a, p in axes.items()} for n, axes in kept.items() if axes},
            compensated=tuple(dict.fromkeys(chosen.compensated)),
            refinement=chosen.refinement,
        )


def rounding(program: Program) -> float:
    """The relative error that a program's least precise type explains."""
    values = (value for node in program.module.graph.nodes for value in values_of(node))
    types = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
    finest = [torch.finfo(t).eps for t in types]
    return max(
        [_ROUNDING, *(_UNITS * eps for eps in finest if eps > torch.finfo(torch.float32).eps)]
    )


def _check(options: Prune) -> None:
    """Refuse numbers that make no sense.

    Raises:
        PipelineError: Says which.
    """
    sound = {
        "round_to": options.round_to is None or options.round_to >= 1,
        "min_keep": 0 <= options.min_keep <= 1,
        "refine": options.refine >= 0,
        "rounds": options.rounds >= 1,
    }
    for name, holds in sound.items():
        if not holds:
            raise PipelineError(
                f"prune: {name}={getattr(options, name)} is out of range",
                hint="round_to and rounds are at least 1, refine 0; min_keep lies between 0 and 1",
            )
