"""Which weights are kept: by one of several methods, within a number of weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from graphopt.errors import BudgetInfeasible, UnsupportedError
from graphopt.ir.program import Program
from graphopt.passes.prune.masks import layerwise, surgeon
from graphopt.passes.prune.masks.criteria import Criterion, score
from graphopt.passes.prune.masks.matrices import Matrix, matrices
from graphopt.passes.prune.masks.patterns import Pattern, above_threshold, best, uniform
from graphopt.passes.prune.masks.trial import Trial
from graphopt.passes.prune.names import Freeze
from graphopt.pipeline import PassContext
from graphopt.solvers.surviving import Survival

Method = Literal["uniform", "global", "layerwise", "icbs"]


@dataclass(frozen=True)
class Chosen:
    """The masks, and what is proven of them.

    Attributes:
        kept: Matrix -> bool tensor, of all matrices that may be masked.
        objective: What the method predicts, or None.
        bound: A lower bound on that.
        patterned: The matrices that have the pattern.
    """

    kept: dict[str, Tensor]
    objective: float | None = None
    bound: float | None = None
    patterned: frozenset[str] = field(default_factory=frozenset)


class Chooser:
    """Chooses masks for a program.

    Attributes:
        matrices: All weights that could be masked.
        free: Those of them that may be.
        dense: Parameters that stay dense, and why.
        pattern: What groups look like, or None.
        freeze: What stays dense.
        method: How it is decided.
        criterion: How weights are ranked.
    """

    def __init__(self, options: Any, program: Program, context: PassContext) -> None:
        """Choose for a program.

        Args:
            options: The pass `Sparsify`.
            program: The program.
            context: Data, loss, limits.

        Raises:
            UnsupportedError: Nothing may be masked.
            PipelineError: A malformed pattern; `freeze` names a parameter that there isn't.
        """
        self.options, self.program, self.context = options, program, context
        self.pattern = Pattern.parse(options.pattern)
        self.freeze = Freeze.read(options.freeze, program)
        self.matrices = matrices(program)
        self.dense: dict[str, str] = _unread(program, self.matrices)
        self.free = [m for m in self.matrices if self._may(m)]
        if not self.free:
            raise UnsupportedError(
                f"there is nothing to mask ({self._frozen or 'no product reads a parameter'})",
                hint="products with parameters of two or more axes are masked; see freeze, pattern",
            )
        given = context.data is not None
        automatic: Method = "layerwise" if given else "global"
        self.method: Method = automatic if options.method == "auto" else options.method
        ranked: Criterion = "taylor2" if given else "magnitude"
        self.criterion: Criterion = ranked if options.criterion == "auto" else options.criterion

    def chosen(self) -> Chosen:
        """The masks.

        Raises:
            BudgetInfeasible: What stays dense alone is more than the limit.
        """
        pattern = self.pattern
        found = self._unstructured() if pattern is None else self._patterned(pattern)
        return self._operated(found) if self.method == "icbs" else found

    @cached_property
    def trial(self) -> Trial:
        """A copy of the model with the data."""
        return Trial(self.program, self.matrices, self.context)

    @cached_property
    def whole(self) -> int:
        """Weights of all matrices."""
        return sum(m.size for m in self.matrices)

    @cached_property
    def alive(self) -> dict[str, Tensor]:
        """What earlier masks keep."""
        masks = self.program.masks or {}
        return {m.name: masks[m.name].kept for m in self.matrices if m.name in masks}

    @cached_property
    def limit(self) -> int:
        """Weights that may be kept in all matrices."""
        asked = self.options.weights
        return self.whole if asked is None else math.floor(asked.of(self.whole) + 1e-9)

    def _may(self, matrix: Matrix) -> bool:
        misfit = self.pattern and self.pattern.misfit(matrix)
        reason = self.freeze.reason(matrix.names) or misfit
        if reason:
            self.dense[matrix.name] = reason
        return not reason

    @property
    def _frozen(self) -> str:
        """Some of what stays dense, and why, for errors."""
        return "; ".join(f"{name}: {why}" for name, why in list(self.dense.items())[:5])

    def left(self, matrix: Matrix) -> int:
        """Weights of a matrix that earlier masks keep."""
        kept = self.alive.get(matrix.name)
        return matrix.size if kept is None else int(kept.sum())

    @cached_property
    def _scores(self) -> dict[str, Tensor]:
        self.context.progress(f"ranking weights by {self.criterion}")
        trial = self.trial if self.criterion in ("taylor", "taylor2") else None
        found = score(self.criterion, self.matrices, trial, self.alive, self.context.seed)
        return {m.name: found[m.name] for m in self.free}

    def _infeasible(self, smallest: int, obstacle: str) -> BudgetInfeasible:
        return BudgetInfeasible(
            f"no masks keep weights at {self.limit:,}",
            field="weights", requested=self.limit, smallest=smallest, obstacle=obstacle,
            proven=True,
        )  # fmt: skip

    def _beside(self) -> int:
        """Weights of matrices that stay as they are."""
        free = {m.name for m in self.free}
        return sum(self.left(m) for m in self.matrices if m.name not in free)

    # -- without a pattern -------------------------------------------------------------------------

    def _unstructured(self) -> Chosen:
        beside = self._beside()
        left = {m.name: self.left(m) for m in self.free}
        count = min(self.limit - beside, sum(left.values()))
        if count < 1:
            raise self._infeasible(beside + 1, self._frozen or "a weight has to stay")
        share = self.options.floor * count / sum(left.values())
        least = {name: math.floor(share * size) for name, size in left.items()}
        solved: Survival | None = None
        if self.method == "uniform":
            counts = dict(zip(left, uniform(list(left.values()), count), strict=True))
        elif self.method == "layerwise":
            curves = layerwise.curves(
                self.free, self._scores, left, self.trial, self.context.progress
            )
            limit = self.context.time_limit
            counts, solved = layerwise.allocated(curves, least, count, limit)
        else:
            counts = above_threshold(self._scores, count, least)
        kept = {name: best(self._scores[name], n) for name, n in counts.items()}
        if solved is None:
            return Chosen(kept)
        plain = [
            dict(zip(left, uniform(list(left.values()), count), strict=True)),
            above_threshold(self._scores, count, least),
        ]
        return self._measured(Chosen(kept, solved.loss, solved.bound), plain)

    def _measured(self, found: Chosen, others: list[dict[str, int]]) -> Chosen:
        """The masks, or ones of plain counts where these measure better.

        Distortions of single matrices need not add up; then nothing is predicted.
        """
        plain = [{n: best(self._scores[n], c) for n, c in counts.items()} for counts in others]
        masks = [found, *map(Chosen, plain)]
        return min(masks, key=lambda each: self.trial.distortion({**self.alive, **each.kept}))

    # -- with a pattern ----------------------------------------------------------------------------

    def _patterned(self, pattern: Pattern) -> Chosen:
        grouped = {m.name: self._grouped(pattern, m) for m in self.free}
        if self.options.weights is None:
            return Chosen(grouped, patterned=frozenset(grouped))
        beside = self._beside()
        smallest = beside + sum(int(kept.sum()) for kept in grouped.values())
        if smallest > self.limit:
            raise self._infeasible(smallest, self._frozen or f"pattern={pattern} keeps as much")
        names, solved = layerwise.patterned(
            self.free, beside, self._losses(grouped), pattern, self.limit,
            self.context.time_limit,
        )  # fmt: skip
        kept = {n: mask for n, mask in grouped.items() if n in names}
        return Chosen(kept, solved.loss, solved.bound, frozenset(names))

    def _grouped(self, pattern: Pattern, matrix: Matrix) -> Tensor:
        assert matrix.axis is not None
        kept = pattern.best(self._scores[matrix.name], matrix.axis)
        alive = self.alive.get(matrix.name)
        return kept if alive is None else kept & alive

    def _losses(self, grouped: Mapping[str, Tensor]) -> dict[str, float]:
        """What is lost where one matrix alone gets the pattern."""
        if self.method == "layerwise":
            return {name: self.trial.distortion({name: kept}) for name, kept in grouped.items()}
        return {
            name: float(self._scores[name][~kept].clamp_min(0).double().sum())
            for name, kept in grouped.items()
        }

    # -- exchanging weights ------------------------------------------------------------------------

    def _operated(self, found: Chosen) -> Chosen:
        free = [m for m in self.free if m.name in found.kept]
        groups = {
            m.name: self.pattern.groups(m)
            if self.pattern is not None
            else torch.zeros(m.parameter.shape, dtype=torch.int64)
            for m in free
        }
        done = surgeon.operate(
            free, found.kept, groups, self.alive, self.trial,
            rounds=self.options.rounds,
            time_limit=self.context.time_limit,
            progress=self.context.progress,
        )  # fmt: skip
        last = done.selections[-1]
        return Chosen(done.kept, last.cost - last.start, last.bound - last.start, found.patterned)


def _unread(program: Program, found: list[Matrix]) -> dict[str, str]:
    """Parameters of two or more axes that no product reads."""
    known = {id(m.parameter) for m in found}
    return {
        name: "no product reads it"
        for name, p in program.skeleton.root.named_parameters()
        if p.dim() > 1 and id(p) not in known
    }
