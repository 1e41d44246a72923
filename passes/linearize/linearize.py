"""The pass `linearize`: fewer non-linearities, gathered so that a protocol pays for them alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from graphopt.budget import Quantity
from graphopt.errors import BudgetError, UnsupportedError, UsageError
from graphopt.ir.program import Program
from graphopt.ir.randomness import kept_random_state, seed_torch
from graphopt.overlays import Overlay
from graphopt.passes.linearize.choice import Granularity
from graphopt.passes.linearize.facts import overlays
from graphopt.passes.linearize.levels import CKKS
from graphopt.passes.linearize.modes import training_names
from graphopt.passes.linearize.run import Run
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves


@dataclass(frozen=True)
class Linearize(Pass):
    """Replaces non-linearities by polynomials until a budget is kept.

    What is kept of a site is gathered, evaluated and put back, so that only it is compared.
    Replacements are fitted on calibration data one after the other; no weight is trained.

    Attributes:
        relus: Elements of one sample that non-linearities may evaluate.
        relu_sites: Calls of non-linearities that may evaluate any.
        pi_latency: Communication seconds of one private inference on the example inputs, as
            `graphopt.private.predict` tells them; a percentage is one of the source's.
        levels: Multiplicative levels along every path under homomorphic encryption (CKKS), as
            `graphopt.private.predict` tells them; nothing is compared there, so that every site is
            replaced.
        protocol: For `pi_latency`; ``ckks`` asks for what `levels` does, whatever the limit is on.
        network: For `pi_latency`: ``lan``, ``wan``, or ``bits a second,round-trip seconds``.
        replacement: ``auto``, or one of them. ``auto`` is what does the least damage: of
            ``affine`` and ``poly2``; of higher degrees too where seconds or levels are limited, so
            that their products count.
        select: How what is kept is chosen: ``fisher`` (scores that need no labels); ``datafree``
            (the same on noise, by BatchNorm's statistics, even where there is data); ``snl``
            (slopes trained together with a throw-away copy of the weights); ``autorep`` (indicators
            with hysteresis, likewise); ``bcd`` (blocks are tried and removed one by one);
            ``deepreduce`` (stages are culled, then thinned); ``random``.
        granularity: What is kept or replaced as one.
        rounds: In how many rounds ``fisher`` scores anew on what is left.
        norms: Whether BatchNorms that see other values get new running statistics.
        couple: Modules (by their paths) or calls that choose alike, with ``*``; several groups of
            them with ``|`` in between.
        max_growth: How many times the source's range a site's may become before the replacements
            in front of it are withdrawn and the choice is made anew.
        softmax: What becomes of softmaxes in attention, those inside of PyTorch's one op too:
            ``keep``; ``quad``, MPCFormer's ``(x + c)^2`` over its sum, with c fitted for each call;
            ``relu``, ``relu(x)`` over its sum, whose elements count against `relus` and
            `relu_sites` and can't be replaced. It needs no budget beside it. Rows that are masked
            wholly, or whose sum is zero, give zeros.
        centered: Whether these take scores less their row's mean, which changes no softmax and
            needs no communication; without, they are as published.
        steps: How many steps ``snl`` and ``autorep`` train at most.
        trials: Blocks that ``bcd`` tries for each one that it removes.
    """

    name: ClassVar[str] = "linearize"
    serves: ClassVar[tuple[str, ...]] = ("relus", "relu_sites", "pi_latency", "levels")
    position: ClassVar[int] = Position.FORWARD
    preserves: ClassVar[Preserves] = Preserves(
        outputs=None, gradients=None, buffers=None, state_dict_keys=False
    )

    relus: Quantity | None = None
    relu_sites: Quantity | None = None
    pi_latency: Quantity | None = None
    levels: Quantity | None = None
    protocol: Literal["crypten", "cheetah", "semi2k", "aby3", "gc", "ckks"] = "crypten"
    network: str = "lan"
    replacement: Literal["auto", "identity", "affine", "poly2", "poly3", "poly4"] = "auto"
    select: Literal["fisher", "datafree", "snl", "autorep", "bcd", "deepreduce", "random"] = (
        "fisher"
    )
    granularity: Granularity = "element"
    rounds: int = 4
    norms: bool = True
    couple: str | None = None
    max_growth: float = 10.0
    softmax: Literal["keep", "relu", "quad"] = "keep"
    centered: bool = True
    steps: int = 600
    trials: int = 8

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses what to keep, fits the rest, rewrites, and counts.

        Raises:
            BudgetInfeasible: What can't be replaced takes more; carries the smallest budget.
            BudgetError: There is no budget.
            UsageError: Rounds, steps or trials below 1, or no growth at all.
            NonFiniteError: A method that trains met NaN.
            UnsupportedError: A plan, non-linearities that depend on the mode, or neither data nor
                BatchNorm.
            VerificationError: Activations escape.
        """
        if program.planner is not None:
            raise UnsupportedError(
                "linearizing a program that carries a memory plan",
                hint="linearize first: optimize(model, 'relus=25%,memory=60%') does",
            )
        for name in ("rounds", "steps", "trials"):
            if getattr(self, name) < 1:
                raise UsageError(f"linearize{{{name}={getattr(self, name)}}}: at least 1 is needed")
        if not self.max_growth > 0:
            raise UsageError(f"linearize{{max_growth={self.max_growth}}}: more than 0 is needed")
        training_names(program)
        if program.eval_module is not None and self.softmax != "keep":
            raise UnsupportedError(
                f"softmax={self.softmax} in a model whose forward branches on self.training",
                hint="branch on an argument or a constant instead",
            )
        limits = [getattr(self, name) for name in self.serves]
        if self.softmax == "keep" and all(limit is None for limit in limits):
            raise BudgetError("linearize without a budget", hint="linearize{relus=10%}")
        if self.softmax != "keep" and (self.levels is not None or self.protocol == CKKS):
            raise UnsupportedError(
                f"softmax={self.softmax} under {CKKS}: sums can't be divided by there",
                hint="softmax is for protocols that divide, such as crypten",
            )
        with kept_random_state():
            seed_torch(context.seed)  # models may draw in eval mode, too
            return Run(self, program, context).result()

    @classmethod
    def facts(cls, report: Mapping[str, Any]) -> tuple[Overlay, ...]:
        """Which non-linearities were kept, and how much of each."""
        return (*super().facts(report), *overlays(report.get("linearize", {})))

    @staticmethod
    def sweep(model: Any, example_inputs: Sequence[Any] = (), **options: Any) -> Any:
        """What accuracy costs under several budgets; see `graphopt.passes.linearize.sweep`."""
        from graphopt.passes.linearize.pareto import sweep

        return sweep(model, example_inputs, **options)
