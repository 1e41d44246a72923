"""Seconds of private inference: what each site's elements and rounds cost under a protocol."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from graphopt.ir.program import Program
from graphopt.ir.skeleton import ADDED
from graphopt.passes.linearize.replacements import DEGREES, Kind
from graphopt.passes.linearize.sites import Site
from graphopt.pipeline import PassContext
from graphopt.private import Cost, PrivateCost, network, predict, protocol
from graphopt.solvers.nonlinearity import Price

# The solver counts in whole units of this many seconds.
_UNIT = 1e-12
# Coefficients of replacements tell about activations' ranges, not about weights: they are public.
_PUBLIC = (f"{ADDED}.*",)


@dataclass(frozen=True)
class PrivateLatency:
    """Predicts communication seconds of one evaluation on the example inputs.

    Attributes:
        program: The source.
        context: The example inputs.
        protocol: Name of the protocol.
        network: ``lan``, ``wan``, or bandwidth and round-trip time as text.
        start: The program with what is replaced in any case; None: the source.
    """

    program: Program
    context: PassContext
    protocol: str
    network: str
    start: Program | None = None

    def of(self, program: Program) -> PrivateCost:
        """What a program costs.

        Raises:
            UnsupportedError: An op without figures under this protocol; all are named.
        """
        return predict(
            program, self.protocol, self.network, self.context.args,
            kwargs=self.context.kwargs, public=_PUBLIC,
        )  # fmt: skip

    @cached_property
    def before(self) -> PrivateCost:
        """What the source costs."""
        return self.of(self.program)

    @cached_property
    def present(self) -> PrivateCost:
        """What the program costs where every site is kept."""
        return self.before if self.start is None else self.of(self.start)

    def units(self, seconds: float) -> int:
        """Seconds in the solver's unit, rounded up."""
        return math.ceil(seconds / _UNIT)

    @cached_property
    def samples(self) -> int:
        """Samples among the example inputs."""
        flat = self.program.signature.flatten_inputs(self.context.args, self.context.kwargs)
        return max((int(t.shape[0]) for t in flat if t.dim()), default=1)

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
