"""The pass `prune`: smaller operators that compute what the masked network computes."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import nn

from graphopt.batches import Batch, read_batch
from graphopt.budget import Quantity
from graphopt.comparison import Observation, observe, unequal
from graphopt.cost.flops import graph_flops
from graphopt.cost.sizes import values_of
from graphopt.errors import (
    BudgetError,
    BudgetInfeasible,
    InputMismatch,
    UnsupportedError,
    VerificationError,
    first_line,
)
from graphopt.ir.program import Program
from graphopt.ir.slices import Slices, blank
from graphopt.passes.prune.analysis import Analysis, analyse
from graphopt.passes.prune.costs import flops_cost, params_cost
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.distortion import Distortion
from graphopt.passes.prune.distortion import gains as curve_gains
from graphopt.passes.prune.importance import Calibration, Criterion, score
from graphopt.passes.prune.rewrite import masked, pruned
from graphopt.passes.prune.units import Reason
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.report import FrozenAxis, PruneReport
from graphopt.solvers.widths import (
    Allocation,
    Cost,
    Dimension,
    WidthProblem,
    allocate,
    by_threshold,
    uniform,
)

Scheme = Literal["uniform", "global", "solver"]

# The solver stops when it has proven that no allocation is worth this much more.
_TOLERANCE = 1e-4
# Differences between the pruned and the masked network that rounding explains: at least so much,
# and so many units of the least precise type.
_ROUNDING = 1e-5
_UNITS = 8
# How often widths are chosen again where the polynomial and the count differ.
_ATTEMPTS = 8
_BATCHES = 64
# Criteria that look at data, and estimate what the outputs or the loss lose.
_BY_GRADIENT = ("taylor", "taylor2")
_MEASURED = ("distortion", *_BY_GRADIENT)


@dataclass(frozen=True)
class Prune(Pass):
    """Removes channels, heads, hidden units until a budget of FLOPs or parameters is kept.

    What comes back computes exactly what the source computes with all parameters of the removed
    units set to zero. Norms over a pruned axis are written out with the full number of places.

    Attributes:
        flops: FLOPs of one forward on the example inputs.
        params: Parameters.
        bytes: Bytes of the parameters, read like a count or as a percentage.
        criterion: What a unit is worth, see `graphopt.passes.prune.importance.score`; ``auto``:
            ``taylor2`` with data, else ``l2``.
        allocation: ``uniform``: the same share of every dimension; ``global``: one threshold;
            ``solver``: the largest sum of the criterion, with a bound; ``auto``: ``solver`` with
            a criterion that looks at data, else ``uniform``, since magnitudes of different layers
            don't compare.
        round_to: Widths are multiples of it, or whole.
        min_keep: The least share of each dimension that is kept.
        rounds: With a criterion of gradients, how often units are ranked anew on what is left,
            while the limit comes down: first-order scores hold for small changes.
        freeze: Parameters that keep their sizes: names or globs, separated by blanks.
        norm: ``exact``: norms and means over a pruned axis are written out; ``freeze``: their axes
            are not pruned.
    """

    name: ClassVar[str] = "prune"
    serves: ClassVar[tuple[str, ...]] = ("flops", "params", "bytes")
    position: ClassVar[int] = Position.FORWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=None, gradients=None, buffers=None)

    flops: Quantity | None = None
    params: Quantity | None = None
    bytes: Quantity | None = None
    criterion: Literal["auto", "l2", "bn_scale", "taylor", "taylor2", "distortion", "random"] = (
        "auto"
    )
    allocation: Literal["auto", "uniform", "global", "solver"] = "auto"
    round_to: int = 1
    min_keep: float = 0.0
    rounds: int = 8
    freeze: str = ""
    norm: Literal["exact", "freeze"] = "exact"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses what to remove, removes it, counts, and compares with the masked network.

        Raises:
            BudgetInfeasible: What is frozen takes more; carries the smallest budget.
            BudgetError: There is no budget.
            InputMismatch: The model doesn't take the data.
        """
        if program.planner is not None:
            raise UnsupportedError(
                "pruning a program that carries a memory plan",
                hint="prune first: optimize(model, 'flops=50%,memory=50%') does",
            )
        if not (self.flops or self.params or self.bytes):
            raise BudgetError(
                "prune without a budget", hint="prune{flops=50%} or prune{params=50%}"
            )
        return _Run(self, program, context).result()


@dataclass(frozen=True)
class _Chosen:
    """What is removed, and the last round's problem and solution."""

    problem: WidthProblem
    allocation: Allocation
    removed: frozenset[int]


class _Run:
    """One run of the pass."""

    def __init__(self, options: Prune, program: Program, context: PassContext) -> None:
        self.options, self.program, self.context = options, program, context
        context.progress("finding what can be pruned")
        self.analysis = analyse(program, compensates=options.norm == "exact")
        self._freeze()
        self.dimensions = Dimensions(self.analysis)
        with_data = context.data is not None
        automatic: Criterion = "taylor2" if with_data else "l2"
        self.criterion: Criterion = automatic if options.criterion == "auto" else options.criterion
        best: Scheme = "solver" if self.criterion in _MEASURED else "uniform"
        self.scheme: Scheme = best if options.allocation == "auto" else options.allocation

    def result(self) -> PassResult:
        """Choose, rewrite, check, report."""
        compensated: list[str] = []
        chosen, small = self._chosen(compensated)
        self._check(small, chosen.removed)
        small = small.replace(slices=self._slices(chosen.removed))
        report = self._report(small, chosen, compensated)
        return PassResult(small, changed=bool(chosen.removed), report={"prune": report})

    def _chosen(self, compensated: list[str]) -> tuple[_Chosen, Program]:
        """What to remove: in rounds, for each of which the units that are left are ranked anew."""
        limits = self._limits()
        costs = [self._cost(name, limit) for name, limit in limits.items()]
        alive: Sequence[Sequence[int]] = [dim.units for dim in self.dimensions.all]
        rounds = self.options.rounds if self.criterion in _BY_GRADIENT else 1
        for number in range(1, rounds):
            left = [1 - (1 - self._share(c)) * number / rounds for c in costs]
            scaled = [
                Cost(c.name, c.terms, c.limit * share / self._share(c))
                for c, share in zip(costs, left, strict=True)
            ]
            problem, ranked = self._problem(scaled, alive)
            alive = _best(ranked, self._allocated(problem, limits, rounds))
        problem, ranked = self._problem(costs, alive)
        attempts = 0
        while True:
            allocation = self._allocated(problem, limits, rounds)
            removed = self.dimensions.removed(_best(ranked, allocation))
            compensated.clear()
            small = pruned(self.program, self.analysis, removed, compensated)
            over = _over(_counted(small), limits)
            if not over:
                return _Chosen(problem, allocation, removed), small
            attempts += 1
            if attempts == _ATTEMPTS:
                raise self._infeasible(allocation, limits)
            problem = _tightened(problem, over)

    @cached_property
    def _full(self) -> dict[str, int]:
        return _counted(self.program)

    def _share(self, cost: Cost) -> float:
        """A limit as a share of what the program has, at most all of it."""
        return min(1.0, cost.limit / (self._full[cost.name] or 1))

    def _freeze(self) -> None:
        patterns = self.options.freeze.split()
        for slot in self.analysis.slots.values():
            for pattern in patterns:
                if fnmatchcase(slot.path, pattern):
                    for labels in slot.value.axes:
                        self.analysis.units.freeze(labels, Reason(f"freeze={pattern}"))

    def _limits(self) -> dict[str, float]:
        asked = {name: getattr(self.options, name) for name in self._full}
        return {name: q.of(self._full[name]) for name, q in asked.items() if q is not None}

    def _scores(self, alive: Sequence[Sequence[int]]) -> dict[int, float]:
        """What each unit is worth where only some are left."""
        self.context.progress(f"ranking units by {self.criterion}")
        batches = self._batches if self.criterion in _MEASURED else ()
        removed = self.dimensions.removed(alive)
        program = masked(self.program, self.analysis, removed) if removed else self.program
        try:
            calibration = Calibration(program, batches, self.context.seed)
            return score(self.criterion, self.dimensions, calibration)
        except (RuntimeError, TypeError, ValueError) as error:
            if not batches:
                raise
            raise InputMismatch(
                f"the model fails on the calibration data: {first_line(error)}",
                hint="a batch is what the model takes, or a pair (inputs, targets)",
            ) from error

    @cached_property
    def _batches(self) -> list[Batch]:
        """The data; without any the example inputs."""
        context = self.context
        if context.data is None:
            return [Batch(context.args, dict(context.kwargs), context.loss)]
        some = itertools.islice(context.data, _BATCHES)
        return [read_batch(batch, context.data_loss, len(context.args)) for batch in some]

    def _problem(
        self, costs: Sequence[Cost], alive: Sequence[Sequence[int]]
    ) -> tuple[WidthProblem, list[list[int]]]:
        """The widths to choose, and the units that are left, the best first."""
        options, scores = self.options, self._scores(alive)
        ranked = [sorted(units, key=lambda unit: -scores[unit]) for units in alive]
        dimensions = []
        for dim, units, worth in zip(
            self.dimensions.all, ranked, self._gains(scores, ranked), strict=True
        ):
            least = min(len(units), max(1, int(np.ceil(options.min_keep * dim.width))))
            dimensions.append(Dimension(dim.name, worth, least, step=options.round_to))
        return WidthProblem(tuple(dimensions), tuple(costs)), ranked

    def _gains(
        self, scores: Mapping[int, float], ranked: Sequence[Sequence[int]]
    ) -> list[tuple[float, ...]]:
        """What each unit more of each dimension is worth."""
        if self.criterion != "distortion":
            return [tuple(scores[unit] for unit in units) for units in ranked]
        measured = Distortion(self.program, self.dimensions, self._batches)
        curves = measured.curves(scores, self.context.progress)
        return [
            curve_gains(dim, *curve) for dim, curve in zip(self.dimensions.all, curves, strict=True)
        ]

    def _cost(self, name: str, limit: float) -> Cost:
        if name == "flops":
            return flops_cost(self.program, self.dimensions, limit)
        return params_cost(self.program, self.dimensions, limit, in_bytes=name == "bytes")

    def _allocated(
        self, problem: WidthProblem, limits: Mapping[str, float], rounds: int
    ) -> Allocation:
        self.context.progress(f"choosing widths ({self.scheme})")
        if self.scheme == "uniform":
            found = uniform(problem)
        elif self.scheme == "global":
            found = by_threshold(problem)
        else:
            limit, seed = self.context.time_limit / rounds, self.context.seed
            found = allocate(problem, time_limit=limit, seed=seed, tolerance=_TOLERANCE)
        if found.status == "infeasible":
            raise self._infeasible(found, limits)
        return found

    def _infeasible(self, found: Allocation, limits: Mapping[str, float]) -> BudgetInfeasible:
        over = [
            (name, cost)
            for (name, limit), cost in zip(limits.items(), found.costs, strict=True)
            if cost > limit
        ]
        name, smallest = over[0] if over else (next(iter(limits)), None)
        frozen = [f"{axis.parameter} axis {axis.axis}, {axis.reason}" for axis in self._frozen()]
        return BudgetInfeasible(
            f"no pruning keeps {name} at {limits[name]:,.0f}",
            field=name,
            requested=limits[name],
            smallest=smallest,
            obstacle="; ".join(frozen[:5]) or "every dimension keeps a unit",
            proven=found.status == "infeasible",
        )

    def _check(self, small: Program, removed: frozenset[int]) -> None:
        """Compare with the masked network on the example inputs, in eval mode."""
        self.context.progress("comparing with the masked network")
        twin = masked(self.program, self.analysis, removed)
        expected = self._observe(twin)
        worst = unequal(
            expected,
            self._observe(small),
            {"outputs": _rounding(small), "gradients": None, "buffers": None},
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
        names = _names(self.program)
        for key, slot in self.analysis.slots.items():
            places = _kept_places(self.analysis, slot.value.axes, removed)
            for name in names.get(key, [slot.path]) if places else ():
                kept[name], shapes[name] = places, tuple(slot.tensor.shape)
        earlier = self.program.slices
        full = None if earlier is not None else blank(self.program.emit())
        return Slices(kept, shapes, full).after(earlier)

    def _frozen(self) -> list[FrozenAxis]:
        return [FrozenAxis(path, axis, str(why)) for path, axis, why in self.analysis.frozen()]

    def _report(self, small: Program, chosen: _Chosen, compensated: Sequence[str]) -> PruneReport:
        removed, allocation = chosen.removed, chosen.allocation
        before, after = self._full, _counted(small)
        whole = sum(sum(d.gains) for d in chosen.problem.dimensions) or 1.0
        slots = [slot for slot in self.analysis.slots.values() if slot.is_trained]
        kept = {s.path: _kept_places(self.analysis, s.value.axes, removed) for s in slots}
        return PruneReport(
            **{f"{name}_before": count for name, count in before.items()},
            **{f"{name}_after": count for name, count in after.items()},
            criterion=self.criterion,
            allocation=self.scheme,
            value=allocation.value / whole,
            bound=allocation.bound / whole if self.scheme == "solver" else None,
            dimensions=tuple(
                (d.name, d.width, w)
                for d, w in zip(self.dimensions.all, allocation.widths, strict=True)
            ),
            frozen=tuple(self._frozen()),
            kept={n: {str(a): p for a, p in axes.items()} for n, axes in kept.items() if axes},
            compensated=tuple(dict.fromkeys(compensated)),
        )


def _counted(program: Program) -> dict[str, int]:
    """FLOPs of one forward, parameters and their bytes."""
    parameters = {id(p): p for p in program.skeleton.root.parameters()}.values()
    return {
        "flops": graph_flops(program.module.graph),
        "params": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _rounding(program: Program) -> float:
    """The relative error that a program's least precise type explains."""
    values = (value for node in program.module.graph.nodes for value in values_of(node))
    types = {v.dtype for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()}
    finest = [torch.finfo(t).eps for t in types]
    return max(
        [_ROUNDING, *(_UNITS * eps for eps in finest if eps > torch.finfo(torch.float32).eps)]
    )


def _over(have: Mapping[str, int], limits: Mapping[str, float]) -> dict[str, float]:
    """For each limit that is passed, by how much."""
    return {name: have[name] / limit for name, limit in limits.items() if have[name] > limit}


def _best(ranked: Sequence[Sequence[int]], allocation: Allocation) -> list[Sequence[int]]:
    """The units that are kept; of equal ones the first."""
    return [units[:width] for units, width in zip(ranked, allocation.widths, strict=True)]


def _tightened(problem: WidthProblem, over: Mapping[str, float]) -> WidthProblem:
    costs = [Cost(c.name, c.terms, c.limit / over.get(c.name, 1.0)) for c in problem.costs]
    return WidthProblem(problem.dimensions, tuple(costs))


def _names(program: Program) -> dict[int, list[str]]:
    """All names of each parameter and buffer."""
    names: dict[int, list[str]] = {}
    root: nn.Module = program.skeleton.root
    for name, tensor in itertools.chain(
        root.named_parameters(remove_duplicate=False), root.named_buffers(remove_duplicate=False)
    ):
        names.setdefault(id(tensor), []).append(name)
    return names


def _kept_places(
    analysis: Analysis, axes: Sequence[Any], removed: frozenset[int]
) -> dict[int, tuple[int, ...]]:
    """Axis -> places that stay, for axes that lose any."""
    masks = {axis: analysis.units.kept(labels, removed) for axis, labels in enumerate(axes)}
    return {
        axis: tuple(np.flatnonzero(mask).tolist()) for axis, mask in masks.items() if not mask.all()
    }
