"""Seconds of private inference: what each site's elements and rounds cost under a protocol."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from graphopt.budget import Quantity
from graphopt.errors import BudgetInfeasible
from graphopt.ir.program import Program
from graphopt.ir.skeleton import ADDED
from graphopt.passes.linearize.choice import Prices, SitePrices
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.replacements import DEGREES, Kind, Replacement
from graphopt.passes.linearize.sites import Site
from graphopt.passes.linearize.task import Selected, Task
from graphopt.pipeline import PassContext
from graphopt.private import Cost, PrivateCost, network, predict, protocol
from graphopt.solvers.nonlinearity import Price

# What may stand in for a site where seconds count.
BY_SECONDS: tuple[Kind, ...] = ("affine", "poly2", "poly3", "poly4")
# The solver counts in whole units of this many seconds.
_UNIT = 1e-12
# How often a selection is made anew where the program costs more than its sites were priced.
_ATTEMPTS = 5
# Coefficients of replacements tell about activations' ranges, not about weights: they are public.
PUBLIC = (f"{ADDED}.*",)


def priced(program: Program, context: PassContext, under: str, link: str) -> PrivateCost:
    """What one evaluation of a program on the example inputs costs.

    Args:
        program: The program.
        context: The example inputs.
        under: Name of the protocol.
        link: Name of the network.

    Raises:
        UnsupportedError: An op without figures under this protocol; all are named.
    """
    return predict(program, under, link, context.args, kwargs=context.kwargs, public=PUBLIC)


@dataclass(frozen=True)
class PrivateLatency:
    """Predicts communication seconds of one evaluation on the example inputs.

    Attributes:
        program: The source.
        context: The example inputs.
        protocol: Name of the protocol.
        network: ``lan``, ``wan``, or bandwidth and round-trip time as text.
        sites: Those that can be replaced.
        kinds: What each can be replaced by.
        limit: Seconds, or a share of the source's.
        written: The program with what is chosen for some sites, and with what is replaced in any
            case.
    """

    program: Program
    context: PassContext
    protocol: str
    network: str
    sites: list[Site]
    kinds: Callable[[Site], Sequence[Kind]]
    limit: Quantity
    written: Callable[[Sequence[Replacement]], Program]

    def of(self, program: Program) -> PrivateCost:
        """What a program costs.

        Raises:
            UnsupportedError: An op without figures under this protocol; all are named.
        """
        return priced(program, self.context, self.protocol, self.network)

    @cached_property
    def before(self) -> PrivateCost:
        """What the source costs."""
        return self.of(self.program)

    @cached_property
    def present(self) -> PrivateCost:
        """What the program costs where every site is kept."""
        program = self.written(())
        return self.before if program is self.program else self.of(program)

    def units(self, seconds: float) -> int:
        """Seconds in the solver's unit, rounded up."""
        return math.ceil(seconds / _UNIT)

    @cached_property
    def samples(self) -> int:
        """Samples among the example inputs."""
        flat = self.program.signature.flatten_inputs(self.context.args, self.context.kwargs)
        return max((int(t.shape[0]) for t in flat if t.dim()), default=1)

    @cached_property
    def seconds(self) -> float:
        """The limit."""
        return self.limit.of(self.before.seconds)

    def cost(self, seconds: float | None = None) -> int:
        """What is left of a limit (or other seconds) for the sites that can be replaced.

        Raises:
            BudgetInfeasible: Less than nothing.
        """
        rest = self.rest(self.sites)
        left = (self.seconds if seconds is None else seconds) - rest
        if left < 0:
            raise self.too_slow(rest)
        return self.units(left)

    @cached_property
    def prices(self) -> Prices:
        """Of all sites."""
        return {
            site: SitePrices(
                self.kept(site), {kind: self.replaced(site, kind) for kind in self.kinds(site)}
            )
            for site in self.sites
        }

    def kept_already(self) -> bool:
        """Whether the limit is kept with every site as it is."""
        return self.present.seconds <= self.seconds

    def within(self, task: Task, selected: Selected, damage: Damage) -> Selected | None:
        """The selection whose program, predicted whole, keeps the limit; None: there is none.

        Args:
            task: What it is about.
            selected: What was chosen.
            damage: By which to choose anew.
        """
        limit = asked = self.seconds
        for _ in range(_ATTEMPTS):
            if selected.answer.found:
                program = self.written(list(selected.replacements.values()))
                seconds = self.of(program).seconds
                if seconds <= asked:
                    return selected
                limit -= seconds - asked
            if not selected.answer.found or limit < self.rest(self.sites):
                break
            limits = dataclasses.replace(task.limits, cost=self.cost(limit))
            selected = selected.again(task, damage, limits)
        return None

    def fewest(self, task: Task) -> PrivateCost:
        """What the network costs with every site replaced by what is cheapest."""
        none = torch.zeros(0, dtype=torch.int64)
        cheapest: dict[Site, Kind] = {
            site: min(kinds, key=lambda kind: DEGREES[kind])
            for site, kinds in task.survey.options.items()
        }
        replaced = [
            Replacement(site, none, kind, task.survey.options[site][kind])
            for site, kind in cheapest.items()
        ]
        return self.of(self.written(replaced))

    def too_slow(
        self, least: float, obstacle: str = "linear layers and what can't be replaced"
    ) -> BudgetInfeasible:
        """The error where the limit can't be kept, given what could be and what is in the way."""
        return BudgetInfeasible(
            f"no linearization keeps pi_latency at {self.seconds:.4g} s",
            field="pi_latency",
            requested=self.seconds,
            smallest=least,
            obstacle=obstacle,
            proven=False,
        )

    def told(self, program: Program) -> dict[str, Any]:
        """What the report says of the program that came out."""
        before, after = self.before, self.of(program)
        return {
            "protocol": self.protocol,
            "seconds_before": before.seconds,
            "seconds_after": after.seconds,
            "rounds_before": before.rounds,
            "rounds_after": after.rounds,
            "bytes_before": before.bytes,
            "bytes_after": after.bytes,
        }

    def kept(self, site: Site) -> Price:
        """Price of the kept elements, for all samples together."""
        row = self.present.by_node().get(site.name)
        return Price() if row is None else self._price(Cost(row.bytes, row.rounds), site)

    def replaced(self, site: Site, kind: Kind) -> Price:
        """Price of the replaced ones: powers, and their products with public coefficients."""
        elements, degree = site.per_sample * self.samples, DEGREES[kind]
        under = protocol(self.protocol)
        cost = under.polynomial(degree, elements)
        if "scale" in under.units:
            scaled = under.unit("scale").cost(elements, elements)
            cost += Cost(degree * scaled.bytes, degree * scaled.rounds)
        return self._price(cost, site)

    def rest(self, sites: list[Site]) -> float:
        """Seconds of everything but these sites."""
        rows = self.present.by_node()
        return self.present.seconds - sum(rows[s.name].seconds for s in sites if s.name in rows)

    def _price(self, cost: Cost, site: Site) -> Price:
        link, trips = network(self.network), protocol(self.protocol).trips
        each = link.seconds(Cost(cost.bytes), trips) / site.per_sample
        return Price(self.units(each), self.units(link.seconds(Cost(0.0, cost.rounds), trips)))
