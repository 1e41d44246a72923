"""The pass `linearize`: fewer non-linearities, gathered so that a protocol pays for them alone."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from graphopt.budget import Quantity
from graphopt.errors import (
    BudgetError,
    BudgetInfeasible,
    UnsupportedError,
    UsageError,
    VerificationError,
)
from graphopt.ir.program import Program
from graphopt.passes.linearize.calibration import reference
from graphopt.passes.linearize.choice import Granularity, Limits, Prices, SitePrices
from graphopt.passes.linearize.latency import PrivateLatency
from graphopt.passes.linearize.refit import Refitted, Survey, refit, survey
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.report import LinearizeReport, SiteReport
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.selection import METHODS
from graphopt.passes.linearize.sites import Site, sites
from graphopt.passes.linearize.task import Selected, Task, solved
from graphopt.pipeline import Pass, PassContext, PassResult, Position, Preserves
from graphopt.private import PrivateCost

# Elements of the largest site that calibration keeps at once, times some.
_ELEMENTS = 1 << 26
# How often a selection is made anew where the program costs more than its sites were priced.
_ATTEMPTS = 5
# Growth of a site's range that is told, and one that no fixed-point ring takes.
_WARNED, _REFUSED = 10.0, 1e4


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
        protocol: For `pi_latency`.
        network: For `pi_latency`: ``lan``, ``wan``, or ``bits a second,round-trip seconds``.
        replacement: ``auto`` (the least damage of ``affine`` and ``poly2``), or one of them.
        select: How what is kept is chosen: ``fisher`` (scores that need no labels); ``datafree``
            (the same on noise, by BatchNorm's statistics, even where there is data); ``snl``
            (slopes trained together with a throw-away copy of the weights); ``autorep`` (indicators
            with hysteresis, likewise); ``bcd`` (blocks are tried and removed one by one);
            ``deepreduce`` (stages are culled, then thinned); ``random``.
        granularity: What is kept or replaced as one.
        rounds: In how many rounds ``fisher`` scores anew on what is left.
        norms: Whether BatchNorms that see other values get new running statistics.
        steps: How many steps ``snl`` and ``autorep`` train at most.
        trials: Blocks that ``bcd`` tries for each one that it removes.
    """

    name: ClassVar[str] = "linearize"
    serves: ClassVar[tuple[str, ...]] = ("relus", "relu_sites", "pi_latency")
    position: ClassVar[int] = Position.FORWARD
    preserves: ClassVar[Preserves] = Preserves(
        outputs=None, gradients=None, buffers=None, state_dict_keys=False
    )

    relus: Quantity | None = None
    relu_sites: Quantity | None = None
    pi_latency: Quantity | None = None
    protocol: Literal["crypten", "cheetah", "semi2k", "aby3", "gc"] = "crypten"
    network: str = "lan"
    replacement: Literal["auto", "identity", "affine", "poly2", "poly3", "poly4"] = "auto"
    select: Literal["fisher", "datafree", "snl", "autorep", "bcd", "deepreduce", "random"] = (
        "fisher"
    )
    granularity: Granularity = "element"
    rounds: int = 4
    norms: bool = True
    steps: int = 600
    trials: int = 8

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Chooses what to keep, fits the rest, rewrites, and counts.

        Raises:
            BudgetInfeasible: What can't be replaced takes more; carries the smallest budget.
            BudgetError: There is no budget.
            UsageError: Rounds, steps or trials below 1.
            NonFiniteError: A method that trains met NaN.
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
        if self.relus is None and self.relu_sites is None and self.pi_latency is None:
            raise BudgetError("linearize without a budget", hint="linearize{relus=10%}")
        for name in ("rounds", "steps", "trials"):
            if getattr(self, name) < 1:
                raise UsageError(f"linearize{{{name}={getattr(self, name)}}}: at least 1 is needed")
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
            calibrated, found, limits, self._prices(), self.options.granularity,
            self.options.rounds, context.time_limit / self.options.rounds, context.seed,
            context.progress, self.options.steps, self.options.trials,
        )  # fmt: skip
        method = METHODS["fisher" if self.options.select == "datafree" else self.options.select]
        selected = self._within_seconds(task, method(task))
        context.progress("fitting replacements one after the other")
        refitted = refit(calibrated, selected.replacements, self.options.norms)
        chosen = list(refitted.replacements.values())
        changed = linearized(self.program, chosen, refitted.statistics)
        report = self._report(changed, found, selected, refitted)
        return PassResult(changed, changed=True, report={"linearize": report})

    def _limits(self) -> Limits:
        relus, relu_sites = self.options.relus, self.options.relu_sites
        limits = Limits(
            None if relus is None else math.floor(relus.of(self.total) + 1e-9),
            None if relu_sites is None else math.floor(relu_sites.of(len(self.sites)) + 1e-9),
            self._cost(self._seconds()),
        )
        fixed = [site for site in self.sites if site.fixed is not None]
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
    def latency(self) -> PrivateLatency | None:
        """What a limit on seconds says of programs; None without one."""
        if self.options.pi_latency is None:
            return None
        protocol, network = self.options.protocol, self.options.network
        return PrivateLatency(self.program, self.context, protocol, network)

    def _seconds(self) -> float:
        """The limit on seconds."""
        limit = self.options.pi_latency
        if limit is None or self.latency is None:
            return math.inf
        return limit.of(self.latency.before.seconds)

    def _cost(self, seconds: float) -> int | None:
        """What is left of a limit for the sites that can be replaced."""
        if self.latency is None:
            return None
        left = seconds - self.latency.rest(self.free)
        if left < 0:
            raise self._too_slow(self.latency.rest(self.free))
        return self.latency.units(left)

    def _prices(self) -> Prices:
        if self.latency is None:
            return {}
        return {
            site: SitePrices(
                self.latency.kept(site),
                {kind: self.latency.replaced(site, kind) for kind in self._kinds(site)},
            )
            for site in self.free
        }

    def _within_seconds(self, task: Task, selected: Selected) -> Selected:
        """The selection whose program, predicted whole, keeps the limit on seconds."""
        if self.latency is None:
            return selected
        limit = asked = self._seconds()
        for _ in range(_ATTEMPTS):
            if selected.answer.found:
                program = linearized(self.program, list(selected.replacements.values()), {})
                seconds = self.latency.of(program).seconds
                if seconds <= asked:
                    return selected
                limit -= seconds - asked
            if not selected.answer.found or limit < self.latency.rest(self.free):
                break
            limits = dataclasses.replace(task.limits, cost=self._cost(limit))
            again = solved(task, selected.damage, limits)
            selected = dataclasses.replace(again, advice=selected.advice)
        raise self._too_slow(self._fewest(task).seconds)

    def _fewest(self, task: Task) -> PrivateCost:
        """What the network costs with every site replaced by what is cheapest."""
        assert self.latency is not None
        none = torch.zeros(0, dtype=torch.int64)
        cheapest: dict[Site, Kind] = {
            site: min(kinds, key=lambda kind: DEGREES[kind])
            for site, kinds in task.survey.options.items()
        }
        replaced = [
            Replacement(site, none, kind, task.survey.options[site][kind])
            for site, kind in cheapest.items()
        ]
        return self.latency.of(linearized(self.program, replaced, {}))

    def _too_slow(self, least: float) -> BudgetInfeasible:
        asked = self._seconds()
        return BudgetInfeasible(
            f"no linearization keeps pi_latency at {asked:.4g} s",
            field="pi_latency",
            requested=asked,
            smallest=least,
            obstacle="linear layers and what can't be replaced",
            proven=False,
        )

    def _kept_already(self, limits: Limits) -> bool:
        if self.latency is not None and self.latency.before.seconds > self._seconds():
            return False
        elements = sum(site.per_sample for site in self.free)
        return (limits.relus is None or elements <= limits.relus) and (
            limits.relu_sites is None or len(self.free) <= limits.relu_sites
        )

    def _kinds(self, site: Site) -> tuple[Kind, ...]:
        asked = self.options.replacement
        if site.is_pool:
            return ("identity",) if asked == "identity" else ("affine",)
        return ("affine", "poly2") if asked == "auto" else (asked,)

    def _report(
        self, changed: Program, found: Survey, selected: Selected, refitted: Refitted
    ) -> LinearizeReport:
        growth = {s: refitted.largest[s] / (found.largest[s] or 1.0) for s in self.free}
        escaping = _escaping(growth)
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
            damage=selected.answer.objective,
            bound=selected.answer.bound,
            greedy_damage=selected.answer.greedy_objective,
            output_error=error,
            agreement=agreement,
            warnings=tuple(escaping),
            advice=selected.advice,
            **self._told_latency(changed),
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
            greedy_damage=0.0,
            output_error=0.0,
            agreement=None,
            **self._told_latency(self.program),
        )

    def _told_latency(self, changed: Program) -> dict[str, Any]:
        if self.latency is None:
            return {}
        before, after = self.latency.before, self.latency.of(changed)
        return {
            "protocol": self.options.protocol,
            "seconds_before": before.seconds,
            "seconds_after": after.seconds,
            "rounds_before": before.rounds,
            "rounds_after": after.rounds,
            "bytes_before": before.bytes,
            "bytes_after": after.bytes,
        }

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


def _escaping(growth: Mapping[Site, float]) -> list[str]:
    """What to warn of.

    Raises:
        VerificationError: A range grows beyond what any fixed-point arithmetic holds.
    """
    found = []
    for site, ratio in growth.items():
        if not ratio < _REFUSED:
            raise VerificationError(
                f"activations escape at {site.name}: {ratio:.3g} times the source's range",
                claim="outputs",
                pass_name=Linearize.name,
                hint="keep more, take replacement=affine, or fine-tune between smaller steps",
            )
        if ratio > _WARNED:
            found.append(f"the range at {site.name} grew to {ratio:.1f} times the source's")
    return found


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
