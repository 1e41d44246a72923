"""One run of `linearize`: what is kept is chosen, the rest fitted, the program rewritten."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch

from graphopt.errors import BudgetInfeasible
from graphopt.ir.program import Program
from graphopt.passes.linearize.calibration import reference
from graphopt.passes.linearize.choice import Limits, Structure
from graphopt.passes.linearize.coupling import coupled
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.impact import impact_of
from graphopt.passes.linearize.latency import BY_SECONDS, PrivateLatency
from graphopt.passes.linearize.levels import BY_LEVELS, CKKS, Levels
from graphopt.passes.linearize.normalisers import Left, Normaliser, Softmaxes
from graphopt.passes.linearize.outputs import compared
from graphopt.passes.linearize.probing import probed
from graphopt.passes.linearize.ranges import InRange, escapes, grown, in_range
from graphopt.passes.linearize.refit import Refitted, refit, survey
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.report import LinearizeReport, SiteReport, SoftmaxReport
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.selection import METHODS
from graphopt.passes.linearize.sites import Site, sites
from graphopt.passes.linearize.softmax import Prepared, prepared
from graphopt.passes.linearize.task import Selected, Task
from graphopt.pipeline import PassContext, PassResult

# Elements of the largest site that calibration keeps at once, times some.
_ELEMENTS = 1 << 26


class Run:
    """One run of the pass.

    Args:
        options: The pass, `graphopt.passes.linearize.Linearize`, which imports this.
        program: What it gets.
        context: And with what.
    """

    def __init__(self, options: Any, program: Program, context: PassContext) -> None:
        self.options, self.source, self.context = options, program, context
        self.softmax = Prepared(program)
        self.softmaxes = None
        if options.softmax != "keep":
            self.softmax = prepared(program, apart=options.softmax == "quad" or options.centered)
            self.softmaxes = Softmaxes(options.softmax, options.centered, self.softmax.calls)
        self.program = self.softmax.program
        self.sites = [site for site in sites(self.program) if site.family.name != "softmax"]
        self.free = [site for site in self.sites if site.fixed is None]
        self.total = sum(site.per_sample for site in self.sites)

    def result(self) -> PassResult:
        """Choose, fit, rewrite, report."""
        limits = self._limits()
        kept = self._kept_already(limits)
        if kept and not self.softmax.calls:
            return PassResult(self.source, changed=False, report={"linearize": self._as_it_is()})
        task = self._task(limits)
        choice = self._everything(task) if kept else self._chosen(task)
        refitted = choice.refitted
        replaced = list(refitted.replacements.values())
        changed = linearized(self.program, replaced, refitted.statistics, refitted.normalisers)
        self._check_promise(changed, refitted.normalisers)
        report = self._report(changed, task, choice)
        return PassResult(changed, changed=True, report={"linearize": report})

    def _task(self, limits: Limits) -> Task:
        """What the choice is about, calibrated."""
        context, options = self.context, self.options
        context.progress("calibrating")
        source = (
            context if options.select != "datafree" else dataclasses.replace(context, data=None)
        )
        largest = max(each.per_sample for each in (*self.free, *self.softmax.calls))
        calibrated = reference(self.program, source, max(1, _ELEMENTS // largest))
        return Task(
            reference=calibrated,
            survey=survey(calibrated, {site: self._kinds(site) for site in self.free}),
            limits=limits,
            prices={} if self.promise is None else self.promise.prices,
            granularity=options.granularity,
            rounds=options.rounds,
            time_limit=context.time_limit / options.rounds,
            seed=context.seed,
            progress=context.progress,
            steps=options.steps,
            trials=options.trials,
            softmaxes=self.softmaxes,
            structure=self._structure(),
        )

    def _chosen(self, task: Task) -> InRange:
        """What is kept, refitted and within range."""
        method = METHODS["fisher" if self.options.select == "datafree" else self.options.select]
        first = method(task)
        found = self._in_range(task, self._within(task, first))
        assert found.selected is not None
        advised = dataclasses.replace(found.selected, advice=first.advice)
        return dataclasses.replace(found, selected=advised)

    def _everything(self, task: Task) -> InRange:
        """Every site as it is, beside softmaxes that are replaced."""
        whole = {
            site: Replacement(site, torch.arange(site.positions), kind, kinds[kind])
            for site, kinds in task.survey.options.items()
            for kind in list(kinds)[:1]
        }
        return InRange(None, self._fitted(task, whole))

    def _fitted(self, task: Task, wanted: Mapping[Site, Replacement]) -> Refitted:
        self.context.progress("fitting replacements one after the other")
        found = refit(task.reference, wanted, self.options.norms, self.softmaxes)
        return dataclasses.replace(found, beyond=probed(task.reference, found))

    def _in_range(self, task: Task, selected: Selected) -> InRange:
        """The choice refitted, or another one where ranges grow too far."""

        def choose(damage: Damage) -> Selected | None:
            found = selected.again(task, damage, task.limits)
            return self._kept(task, found, damage)

        def fit(chosen: Selected) -> Refitted:
            return self._fitted(task, chosen.replacements)

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
        added = self._added()
        left = limits.without(fixed).less(sum(added.values()), len(added))
        for field, limit, least in (
            ("relus", left.relus, sum(site.per_sample for site in fixed) + sum(added.values())),
            ("relu_sites", left.relu_sites, len(fixed) + len(added)),
        ):
            if limit is not None and limit < 0:
                raise BudgetInfeasible(
                    f"no linearization keeps {field} at {getattr(limits, field):,}",
                    field=field,
                    requested=getattr(limits, field),
                    smallest=least,
                    obstacle="; ".join(
                        [f"{s.name}: {s.fixed}" for s in fixed[:5]]
                        + [f"{name}: softmax=relu" for name in list(added)[:5]]
                    ),
                    proven=True,
                )
        return left

    def _added(self) -> dict[str, int]:
        """ReLUs that stand for softmaxes, by the softmax's name."""
        calls = self.softmax.calls if self.options.softmax == "relu" else ()
        return {each.source: each.per_sample for each in calls}

    def _written(self, chosen: Sequence[Replacement]) -> Program:
        """The program, as far as its cost depends on what is chosen."""
        normalisers = [] if self.softmaxes is None else self.softmaxes.unfitted()
        if not chosen and not normalisers and self.program is self.source:
            return self.source
        return linearized(self.program, chosen, {}, normalisers)

    @cached_property
    def promise(self) -> Levels | PrivateLatency | None:
        """A limit that a prediction of the whole program has to keep, if there is one."""
        asked = self.options
        if self.depth is not None or asked.pi_latency is None:
            return self.depth
        return PrivateLatency(
            self.source, self.context, asked.protocol, asked.network, self.free, self._kinds,
            asked.pi_latency, self._written,
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

    def _check_promise(self, changed: Program, found: Sequence[Normaliser | Left]) -> None:
        """Refuse what costs more than was chosen by: softmaxes had to stay, as their scores show.

        Raises:
            BudgetInfeasible: The limit on seconds isn't kept; names the softmaxes.
        """
        stay = [each for each in found if isinstance(each, Left)]
        if not stay or not isinstance(self.promise, PrivateLatency):
            return
        seconds = self.promise.of(changed).seconds
        if seconds > self.promise.seconds:
            told = "; ".join(f"{each.call.source}: {each.reason}" for each in stay[:5])
            raise self.promise.too_slow(seconds, told)

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

    def _report(self, changed: Program, task: Task, choice: InRange) -> LinearizeReport:
        refitted = choice.refitted
        growth = grown(task.survey, refitted)
        escaping = escapes(task.survey, refitted, self.options.max_growth)
        for text in escaping:
            warnings.warn(text, stacklevel=2)
        told = tuple(self._site(site, refitted.replacements, growth) for site in self.sites)
        error, agreement = compared(*refitted.outputs)
        by_data = self.options.select != "datafree" and self.context.data is not None
        added = sum(
            each.call.per_sample
            for each in refitted.normalisers
            if isinstance(each, Normaliser) and each.kind == "relu"
        )
        return LinearizeReport(
            relus_before=self.total,
            relus_after=sum(site.kept for site in told) + added,
            sites=told,
            select=self.options.select,
            granularity=self.options.granularity,
            output_error=error,
            agreement=agreement,
            warnings=tuple(escaping),
            avoided=choice.avoided,
            impact=impact_of(*refitted.outputs, task.reference.targets) if by_data else None,
            softmaxes=self._told_softmaxes(refitted.normalisers),
            **self._told_answer(choice.selected),
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
            output_error=0.0,
            agreement=None,
            softmaxes=self._told_softmaxes(()),
            **self._told_answer(None),
            **self._told(self.source),
        )

    def _told(self, changed: Program) -> dict[str, Any]:
        return {} if self.promise is None else self.promise.told(changed)

    def _told_answer(self, selected: Selected | None) -> dict[str, Any]:
        """How good the choice is; where there was none to make, everything was kept."""
        if selected is None:
            return {
                "damage": 0.0, "bound": 0.0, "gap": 0.0, "status": "optimal", "greedy_damage": 0.0
            }  # fmt: skip
        answer = selected.answer
        return {
            "damage": answer.objective, "bound": answer.bound, "gap": answer.gap,
            "status": answer.status, "greedy_damage": answer.greedy_objective,
            "advice": selected.advice,
        }  # fmt: skip

    def _told_softmaxes(self, found: Sequence[Normaliser | Left]) -> tuple[SoftmaxReport, ...]:
        done = [
            SoftmaxReport(n.call.source, n.call.per_sample, n.kind, n.error)
            if isinstance(n, Normaliser)
            else SoftmaxReport(n.call.source, n.call.per_sample, "keep", reason=n.reason)
            for n in found
        ]
        left = [SoftmaxReport(n, size, "keep", reason=why) for n, size, why in self.softmax.left]
        return tuple(done + left)

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
