"""The pass `sparsify`: the same sizes, with zeros in place of the weights that matter least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from graphopt.budget import Quantity
from graphopt.errors import BudgetError, PipelineError, UnsupportedError
from graphopt.ir.masks import Mask
from graphopt.ir.program import Program
from graphopt.ir.rebind import with_replaced
from graphopt.passes.prune.masks.choice import Chooser, Chosen
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.report import SparsifyReport


@dataclass(frozen=True)
class Sparsify(Pass):
    """Masks weights until a number of them is left; nothing changes its size.

    Weights are those of the matrices that products read (linear layers, convolutions, matrix
    products, recurrent cells; a tied one counts once); biases, norms and tables that are only
    looked up are neither masked nor counted.

    Attributes:
        weights: Weights that are kept, as a count or as a share of all of them. With a pattern it
            may be left out; given, those matrices get the pattern for which it costs least.
        pattern: Empty: any weights; ``n:m``: at most n of each m that follow each other along the
            axis that is summed over (of a convolution its input channels). Matrices whose axis is
            no multiple of m stay dense.
        method: ``uniform``: the same share of each matrix; ``global``: one threshold for all;
            ``layerwise``: by measured curves of distortion and dynamic programming (Xu et al.
            2023), unless one of the former measures better; ``icbs``: ``global``, then block
            coordinate descent on a quadratic model of the loss (Rosenberg et al. 2024); ``auto``:
            ``layerwise`` with data, else ``global``.
        criterion: How weights are ranked, see `graphopt.passes.prune.masks.criteria.score`;
            ``auto``: ``taylor2`` with data, else ``magnitude``.
        floor: The least that each matrix keeps, as a share of what ``uniform`` would leave of it.
        rounds: How often ``icbs`` draws up its model anew.
        freeze: Parameters that stay dense: names or globs, separated by blanks.
    """

    name: ClassVar[str] = "sparsify"
    serves: ClassVar[tuple[str, ...]] = ("weights",)
    position: ClassVar[int] = Position.FORWARD
    preserves: ClassVar[Preserves] = Preserves(outputs=None, gradients=None, buffers=None)

    weights: Quantity | None = None
    pattern: str = ""
    method: Literal["auto", "uniform", "global", "layerwise", "icbs"] = "auto"
    criterion: Literal["auto", "magnitude", "taylor", "taylor2", "random"] = "auto"
    floor: float = 0.1
    rounds: int = 3
    freeze: str = ""

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses masks, sets weights to zero, counts and measures what is left.

        Raises:
            BudgetInfeasible: What stays dense is more; carries the smallest budget.
            BudgetError: There is neither a budget nor a pattern.
            InputMismatch: The model doesn't take the data.
            UnsupportedError: There is nothing to mask, or the program carries a memory plan.
            PipelineError: An option is out of range, or names a parameter that there isn't.
        """
        if program.planner is not None:
            raise UnsupportedError(
                "masking a program that carries a memory plan",
                hint="mask first: optimize(model, 'weights=50%,memory=50%') does",
            )
        if self.weights is None and not self.pattern:
            raise BudgetError(
                "sparsify without a budget", hint="sparsify{weights=50%} or sparsify{pattern=2:4}"
            )
        if not (0 <= self.floor <= 1 and self.rounds >= 1):
            raise PipelineError("sparsify: floor lies between 0 and 1, rounds is at least 1")
        chooser = Chooser(self, program, context)
        chosen = chooser.chosen()
        masked = _masked(program, chooser, chosen)
        context.progress("measuring the masked model")
        report = _report(masked, chooser, chosen)
        changed = report.weights_after < sum(map(chooser.left, chooser.matrices))
        return PassResult(masked, changed, {"sparsify": report})


def _masked(program: Program, chooser: Chooser, chosen: Chosen) -> Program:
    """The program with zeros, and its masks."""
    masks, replaced = dict(program.masks or {}), {}
    for matrix in chooser.free:
        kept = chosen.kept.get(matrix.name)
        if kept is None or bool(kept.all()):
            continue
        pattern = str(chooser.pattern) if matrix.name in chosen.patterned else ""
        mask = Mask.of(kept, pattern, matrix.axis)
        masks.update(dict.fromkeys(matrix.names, mask))
        replaced[id(matrix.parameter)] = _zeroed(matrix.parameter, kept)
    return with_replaced(program, replaced).replace(masks=masks or None)


def _zeroed(parameter: nn.Parameter, kept: Tensor) -> nn.Parameter:
    values = parameter.detach().masked_fill(~kept.to(parameter.device), 0)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


def _report(program: Program, chooser: Chooser, chosen: Chosen) -> SparsifyReport:
    masks: Mapping[str, Mask] = program.masks or {}
    left = {
        m.name: int(masks[m.name].kept.sum()) if m.name in masks else m.size
        for m in chooser.matrices
    }
    gap = None
    if chosen.objective is not None and chosen.bound is not None:
        gap = chosen.objective - chosen.bound
    kept = {name: mask.kept for name, mask in masks.items() if name in chooser.trial.weights}
    return SparsifyReport(
        weights_before=chooser.whole,
        weights_after=sum(left.values()),
        method=chooser.method,
        criterion=chooser.criterion,
        pattern=str(chooser.pattern or ""),
        matrices=tuple((m.name, m.size, left[m.name]) for m in chooser.matrices),
        dense=tuple(chooser.dense.items()),
        distortion=chooser.trial.distortion(kept),
        objective=chosen.objective,
        bound=chosen.bound,
        gap=gap,
    )
