"""The pass `linearize`: fewer non-linearities, gathered so that a protocol pays for them alone."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

from torch import Tensor

from graphopt.budget import Quantity
from graphopt.errors import BudgetError, BudgetInfeasible, UnsupportedError
from graphopt.ir.program import Program
from graphopt.passes.linearize.calibration import reference
from graphopt.passes.linearize.choice import (
    Granularity,
    Limits,
    Structure,
)
from graphopt.passes.linearize.coupling import coupled
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.latency import BY_SECONDS, PrivateLatency
from graphopt.passes.linearize.levels import BY_LEVELS, CKKS, Levels
from graphopt.passes.linearize.ranges import InRange, escapes, grown, in_range
from graphopt.passes.linearize.refit import Refitted, Survey, refit, survey
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.report import LinearizeReport, SiteReport
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.selection import METHODS, Selected, Task
from graphopt.passes.linearize.sites import Site, sites
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves

# Elements of the largest site that calibration keeps at once, times some.
_ELEMENTS = 1 << 26


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
            (the same on noise, by BatchNorm's statistics, even where there is data); ``random``.
        granularity: What is kept or replaced as one.
        rounds: In how many rounds ``fisher`` scores anew on what is left.
        norms: Whether BatchNorms that see other values get new running statistics.
        couple: Modules (by their paths) or calls that choose alike, with ``*``; several groups of
            them with ``|`` in between.
        max_growth: How many times the source's range a site's may become before the replacements
            in front of it are withdrawn and the choice is made anew.
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
    select: Literal["fisher", "datafree", "random"] = "fisher"
    granularity: Granularity = "element"
    rounds: int = 4
    norms: bool = True
    couple: str | None = None
    max_growth: float = 10.0

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses what to keep, fits the rest, rewrites, and counts.

        Raises:
            BudgetInfeasible: What can't be replaced takes more; carries the smallest budget.
            BudgetError: There is no budget.
            UnsupportedError: A plan, two graphs, or neither data nor BatchNorm.
            VerificationError: Activations escape.
        """
        if program.planner is not None:
            raise UnsupportedError(
                "linearizing a program that carries a memory plan",
                hint="linearize first: optimize(model, 'relus=25%,memory=60%') does",
            )
        if program.eval_module is not None:
            raise UnsupportedError(
                "linearizing a model whose forward branches on self.training",
                hint="branch on an argument or a constant instead",
            )
        if all(getattr(self, name) is None for name in self.serves):
            raise BudgetError("linearize without a budget", hint="linearize{relus=10%}")
        return _Run(self, program, context).result()


class _Run:
    """One run of the pass."""

    def __init__(self, options: Linearize, program: Program, context: PassContext) -> None:
        self.options, self.program, self.context = options, program, context
        self.sites = [site for site in sites(program) if site.family.name != "softmax"]
        self.free = [site for site in self.sites if site.fixed is None]
        self.total = sum(site.per_sample for site in self.sites)

    def result(self) -> PassResult:
        """Choose, fit, rewrite, report."""
        limits = self._limits()
        if self._kept_already(limits):
            return PassResult(self.program, changed=False, report={"linearize": self._as_it_is()})
        context = self.context
        context.progress("calibrating")
        source = context if self.options.select != "datafree" else _without_data(context)
        largest = max(site.per_sample for site in self.free)
        calibrated = reference(self.program, source, max(1, _ELEMENTS // largest))
        found = survey(calibrated, {site: self._kinds(site) for site in self.free})
        task = Task(
            calibrated, found, limits, {} if self.promise is None else self.promise.prices,
            self.options.granularity, self.options.rounds,
            context.time_limit / self.options.rounds, context.seed, context.progress,
            self._structure(),
        )  # fmt: skip
        method = METHODS["fisher" if self.options.select == "datafree" else self.options.select]
        chosen = self._in_range(task, self._within(task, method(task)))
        refitted = chosen.refitted
        replaced = list(refitted.replacements.values())
        changed = linearized(self.program, replaced, refitted.statistics)
        report = self._report(changed, found, chosen)
        return PassResult(changed, changed=True, report={"linearize": report})

    def _in_range(self, task: Task, selected: Selected) -> InRange:
        """The choice refitted, or another one where ranges grow too far."""

        def choose(damage: Damage) -> Selected | None:
            found = selected.again(task, damage, task.limits)
            return self._kept(task, found, damage)

        def fit(chosen: Selected) -> Refitted:
            self.context.progress("fitting replacements one after the other")
            return refit(task.reference, chosen.replacements, self.options.norms)

        return in_range(task, selected, choose, fit, self.options.max_growth)

    def _structure(self) -> Structure:
        edges = () if self.depth is None else self.depth.edges
        names = self.options.couple
        together = coupled(self.free, names, self.options.granularity) if names else ()
        return Structure(edges, together)

    @cached_property
    def depth(self) -> Levels | None:
        """Levels of programs without comparisons; None where nobody asks for them."""
        return Levels.asked(
            self.program, self.context, self.free, self._kinds, self.options.levels,
            self.options.pi_latency, self.options.protocol, self.options.network,
        )  # fmt: skip

    def _limits(self) -> Limits:
        relus, relu_sites = self.options.relus, self.options.relu_sites
        fixed = [site for site in self.sites if site.fixed is not None]
        if self.depth is not None:
            self.depth.check(fixed)
            return Limits(0, levels=self.depth.limit)
        limits = Limits(
            None if relus is None else math.floor(relus.of(self.total) + 1e-9),
            None if relu_sites is None else math.floor(relu_sites.of(len(self.sites)) + 1e-9),
            None if self.promise is None else self.promise.cost(),
        )
        left = limits.without(fixed)
        for field, limit, least in (
            ("relus", left.relus, sum(site.per_sample for site in fixed)),
            ("relu_sites", left.relu_sites, len(fixed)),
        ):
            if limit is not None and limit < 0:
                raise BudgetInfeasible(
                    f"no linearization keeps {field} at {getattr(limits, field):,}",
                    field=field,
                    requested=getattr(limits, field),
                    smallest=least,
                    obstacle="; ".join(f"{s.name}: {s.fixed}" for s in fixed[:5]),
                    proven=True,
                )
        return left

    @cached_property
    def promise(self) -> Levels | PrivateLatency | None:
        """A limit that a prediction of the whole program has to keep, if there is one."""
        asked = self.options
        if self.depth is not None or asked.pi_latency is None:
            return self.depth
        return PrivateLatency(
            self.program, self.context, asked.protocol, asked.network, self.free, self._kinds,
            asked.pi_latency,
        )  # fmt: skip

    def _within(self, task: Task, selected: Selected) -> Selected:
        """The selection whose program, predicted whole, keeps the limits."""
        found = self._kept(task, selected, selected.damage)
        if found is not None:
            return found
        if isinstance(self.promise, PrivateLatency):
            raise self.promise.too_slow(self.promise.fewest(task).seconds)
        raise BudgetInfeasible(
            f"no linearization found within {self.options}",
            field=next(f for f in self.options.serves if getattr(self.options, f) is not None),
            obstacle="sites that choose alike" if self.options.couple else "levels along paths",
        )

    def _kept(self, task: Task, selected: Selected, damage: Damage) -> Selected | None:
        """The selection, or one made anew by these damages, that keeps the limits; None: no."""
        if self.promise is not None:
            return self.promise.within(task, selected, damage)
        return selected if selected.answer.found else None

    def _kept_already(self, limits: Limits) -> bool:
        if self.promise is not None and not self.promise.kept_already():
            return False
        elements = sum(site.per_sample for site in self.free)
        return (limits.relus is None or elements <= limits.relus) and (
            limits.relu_sites is None or len(self.free) <= limits.relu_sites
        )

    def _kinds(self, site: Site) -> tuple[Kind, ...]:
        asked = self.options.replacement
        auto: tuple[Kind, ...] = ("affine", "poly2")
        if self.options.levels is not None or self.options.protocol == CKKS:
            auto = BY_LEVELS
        elif self.options.pi_latency is not None:
            auto = BY_SECONDS
        if not site.is_pool:
            return auto if asked == "auto" else (asked,)
        if asked == "auto":
            return tuple(kind for kind in auto if DEGREES[kind] <= 1)
        return ("identity",) if asked == "identity" else ("affine",)

    def _report(self, changed: Program, found: Survey, chosen: InRange) -> LinearizeReport:
        refitted, answer = chosen.refitted, chosen.selected.answer
        growth = grown(found, refitted)
        escaping = escapes(growth, self.options.max_growth)
        told = [self._site(site, refitted.replacements, growth) for site in self.sites]
        error, agreement = compared(*refitted.outputs)
        for text in escaping:
            warnings.warn(text, stacklevel=2)
        return LinearizeReport(
            relus_before=self.total,
            relus_after=sum(site.kept for site in told),
            sites=tuple(told),
            select=self.options.select,
            granularity=self.options.granularity,
            damage=answer.objective,
            bound=answer.bound,
            gap=answer.gap,
            status=answer.status,
            greedy_damage=answer.greedy_objective,
            output_error=error,
            agreement=agreement,
            warnings=tuple(escaping),
            avoided=chosen.avoided,
            **self._told(changed),
        )

    def _as_it_is(self) -> LinearizeReport:
        """The report where the budget is kept by the source already."""
        return LinearizeReport(
            relus_before=self.total,
            relus_after=self.total,
            sites=tuple(self._site(site, {}, {}) for site in self.sites),
            select=self.options.select,
            granularity=self.options.granularity,
            damage=0.0,
            bound=0.0,
            gap=0.0,
            status="optimal",
            greedy_damage=0.0,
            output_error=0.0,
            agreement=None,
            **self._told(self.program),
        )

    def _told(self, changed: Program) -> dict[str, Any]:
        return {} if self.promise is None else self.promise.told(changed)

    def _site(
        self, site: Site, chosen: Mapping[Site, Replacement], growth: Mapping[Site, float]
    ) -> SiteReport:
        each = chosen.get(site)
        whole = each is None or each.is_whole
        kept = site.per_sample if each is None else len(each.kept) * site.weight
        return SiteReport(
            site.name, site.family.name, kept, site.per_sample,
            "keep" if whole or each is None else each.kind, growth.get(site, 1.0), site.fixed,
        )  # fmt: skip


def _without_data(context: PassContext) -> PassContext:
    return dataclasses.replace(context, data=None)


def compared(expected: Sequence[object], got: Sequence[object]) -> tuple[float, float | None]:
    """Relative error of outputs, and how often the largest one is the same.

    Args:
        expected: The source's flat outputs for each batch.
        got: The same of the result.
    """
    off = size = 0.0
    same = rows = 0
    for one, other in zip(expected, got, strict=True):
        pairs = [
            (a.double(), b.double()) for a, b in zip(one, other, strict=True)  # type: ignore[call-overload]
            if isinstance(a, Tensor) and a.is_floating_point()
        ]  # fmt: skip
        off += sum(float((a - b).square().sum()) for a, b in pairs)
        size += sum(float(a.square().sum()) for a, _ in pairs)
        if len(pairs) == 1 and pairs[0][0].dim() == 2:
            a, b = pairs[0]
            same += int((a.argmax(1) == b.argmax(1)).sum())
            rows += len(a)
    return math.sqrt(off / size) if size else 0.0, same / rows if rows else None
