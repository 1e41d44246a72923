"""Levels of homomorphic encryption: what replacements use up, and the ways between sites.

Under CKKS every product uses up a level of the ciphertext, and nothing can be compared. A
polynomial of degree d takes ``ceil(log2 d)`` levels for its powers, computed side by side, and one
for the products with its coefficients; the identity takes none.

The ways between sites are read off the circuit that engines run, in which every site is one
product with a public number, a mark that is found again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import fx

from graphopt.budget import Quantity
from graphopt.errors import BudgetError, BudgetInfeasible
from graphopt.ir.graphs import copy_graph
from graphopt.ir.program import Program
from graphopt.passes.linearize.choice import Edge, Prices, SitePrices
from graphopt.passes.linearize.fisher import Damage
from graphopt.passes.linearize.latency import PUBLIC, priced
from graphopt.passes.linearize.replacements import DEGREES, Kind
from graphopt.passes.linearize.rewrite import linearized
from graphopt.passes.linearize.sites import Site, read_by
from graphopt.passes.linearize.task import Selected, Task
from graphopt.pipeline import PassContext
from graphopt.private import PrivateCost, lower, network, protocol
from graphopt.private.circuit import Circuit, Step
from graphopt.private.predict import check, predict_circuit
from graphopt.solvers.nonlinearity import Price

CKKS = "ckks"
# What may stand in for a site where levels count: what takes the same levels as something of a
# higher degree is left out.
BY_LEVELS: tuple[Kind, ...] = ("identity", "affine", "poly2", "poly4")
_MARK = 2.0  # any number whose product isn't left out
_ATTEMPTS = 3
_TOLD = 8  # nodes of a path that are named
_Key = TypeVar("_Key")


def levels_of(kind: Kind) -> int:
    """Levels that a replacement uses up."""
    units, degree = protocol(CKKS).units, DEGREES[kind]
    if not degree:
        return 0
    return units["scale"].levels + math.ceil(math.log2(degree)) * units["square"].levels


@dataclass(frozen=True)
class Levels:
    """Levels along the paths of a program whose sites are all replaced.

    Attributes:
        program: The source.
        context: The example inputs.
        sites: Those that can be replaced.
        kinds: What each can be replaced by.
        limit: Most levels; None: any number.
        seconds: Most seconds of communication: ciphertexts of inputs and outputs.
        network: Over which these go.
    """

    program: Program
    context: PassContext
    sites: Sequence[Site]
    kinds: Mapping[Site, Sequence[Kind]]
    limit: int | None = None
    seconds: float = math.inf
    network: str = "lan"

    @classmethod
    def asked(
        cls, program: Program, context: PassContext, sites: Sequence[Site],
        kinds: Callable[[Site], Sequence[Kind]], levels: Quantity | None,
        seconds: Quantity | None, under: str, link: str,
    ) -> Levels | None:  # fmt: skip
        """By the options of the pass; None where they don't ask for homomorphic encryption.

        Raises:
            BudgetError: Limits that exclude each other, or a share of what the source, which
                can't run there, would take.
        """
        if levels is None and under != CKKS:
            return None
        if seconds is not None and under != CKKS:
            raise BudgetError(
                f"levels are {CKKS}'s, pi_latency is {under}'s", hint=f"protocol={CKKS}"
            )
        for name, limit in (("levels", levels), ("pi_latency", seconds)):
            if limit is not None and limit.relative:
                raise BudgetError(
                    f"{name}={limit} of the source's, which compares: that can't run under {CKKS}",
                    hint="give an absolute number of levels: levels=12",
                )
        return cls(
            program, context, sites, {site: kinds(site) for site in sites},
            None if levels is None else math.floor(levels.amount),
            math.inf if seconds is None else seconds.amount, link,
        )  # fmt: skip

    def of(self, program: Program) -> PrivateCost:
        """What a program takes.

        Raises:
            UnsupportedError: An op without figures, such as a comparison; all are named.
        """
        return priced(program, self.context, CKKS, self.network)

    def check(self, fixed: Sequence[Site]) -> None:
        """Refuse what no choice can meet.

        Args:
            fixed: Sites that can't be replaced.

        Raises:
            BudgetInfeasible: Sites have to stay, or linear layers alone take more.
            UnsupportedError: Ops without figures; all are named.
        """
        if fixed:
            raise self._infeasible(None, "; ".join(f"{s.name}: {s.fixed}" for s in fixed[:5]))
        least, path = self.least()
        if self.limit is not None and least > self.limit:
            raise self._infeasible(least, path)
        link = network(self.network)
        seconds = predict_circuit(self._circuit, protocol(CKKS), link).seconds
        if seconds > self.seconds:
            raise BudgetInfeasible(
                f"no linearization keeps pi_latency at {self.seconds:.4g} s under {CKKS}",
                field="pi_latency", requested=self.seconds, smallest=seconds, proven=True,
                obstacle="the ciphertexts of inputs and outputs",
            )  # fmt: skip

    def cost(self) -> None:
        """Nothing but levels is limited."""

    def kept_already(self) -> bool:
        """Whether there is nothing to replace."""
        return not self.sites

    def told(self, program: Program) -> dict[str, Any]:
        """What the report says of the program that came out."""
        cost = self.of(program)
        return {
            "protocol": CKKS, "levels_after": cost.levels, "seconds_after": cost.seconds,
            "rounds_after": cost.rounds, "bytes_after": cost.bytes,
        }  # fmt: skip

    def _infeasible(self, least: int | None, obstacle: str) -> BudgetInfeasible:
        at = "without comparisons" if self.limit is None else f"within {self.limit} levels"
        field = "pi_latency" if self.limit is None and self.seconds < math.inf else "levels"
        return BudgetInfeasible(
            f"no linearization runs under {CKKS} {at}",
            field=field, requested=self.limit, smallest=least, obstacle=obstacle, proven=True,
        )  # fmt: skip

    def within(self, task: Task, selected: Selected, damage: Damage) -> Selected | None:
        """The selection whose program, predicted whole, keeps the limit; None: there is none.

        Args:
            task: What it is about.
            selected: What was chosen.
            damage: By which to choose anew.
        """
        limits, most = task.limits, math.inf if self.limit is None else self.limit
        for _ in range(_ATTEMPTS):
            if not selected.answer.found:
                return None
            program = linearized(self.program, list(selected.replacements.values()), {})
            excess = self.of(program).levels - most
            if excess <= 0 or limits.levels is None:
                return selected
            limits = dataclasses.replace(limits, levels=max(0, limits.levels - int(excess)))
            selected = selected.again(task, damage, limits)
        return None

    @cached_property
    def edges(self) -> tuple[Edge, ...]:
        """The ways between sites, from the inputs and to the outputs; ``levels`` of the longest."""
        found: dict[tuple[Site | None, Site | None], int] = {}
        here: dict[str, dict[Site | None, int]] = {name: {None: 0} for name in self._circuit.inputs}
        for step in self._circuit.steps:
            arriving = _latest(here.get(name, {}) for name in step.inputs)
            site = self._site(step)
            if site is not None:
                _raise(found, {(before, site): most for before, most in arriving.items()})
                arriving = {site: 0}
            own = 0 if site is not None else self._own(step)
            here[step.name] = {before: most + own for before, most in arriving.items()}
        for before, most in _latest(here.get(name, {}) for name in self._circuit.outputs).items():
            _raise(found, {(before, None): most})
        return tuple(Edge(*ends, most) for ends, most in found.items())

    @cached_property
    def prices(self) -> Prices:
        """Levels of the replacements; what no output reads takes none."""
        reached = {edge.after for edge in self.edges}
        return {
            site: SitePrices(
                Price(),
                {kind: Price(levels=levels_of(kind) * (site in reached)) for kind in kinds},
            )
            for site, kinds in self.kinds.items()
        }

    def least(self) -> tuple[int, str]:
        """Levels with every site replaced by what takes fewest, and the products on that path."""
        reached: dict[str, int] = {}
        before: dict[str, str | None] = {}
        steps = {step.name: step for step in self._circuit.steps}
        for step in self._circuit.steps:
            last = max(step.inputs, key=lambda name: reached.get(name, 0), default=None)
            before[step.name] = last
            reached[step.name] = (reached.get(last, 0) if last else 0) + self._fewest(step)
        end = max(self._circuit.outputs, key=lambda name: reached.get(name, 0), default=None)
        path: list[str] = []
        at: str | None = end
        while at in steps:
            path += [self._told(steps[at])] if self._fewest(steps[at]) else []
            at = before[at]
        told = path[::-1][:_TOLD] + ["..."] * (len(path) > _TOLD)
        return reached.get(end, 0) if end else 0, " -> ".join(told)

    @cached_property
    def _marks(self) -> tuple[fx.GraphModule, dict[str, Site]]:
        """The graph with every site a product with a number, and the nodes that these are."""
        module = copy_graph(self.program.specialize(False))
        nodes = {node.name: node for node in module.graph.nodes}
        found = {}
        for site in self.sites:
            node = nodes.get(site.name)
            if node is None:
                continue
            with module.graph.inserting_before(node):
                x = read_by(node)
                if site.is_pool:
                    target, args = site.average()
                    x = module.graph.call_function(target, (x, *args))
                    x.meta = dict(node.meta)
                mark = module.graph.call_function(torch.ops.aten.mul.Scalar, (x, _MARK))
            mark.meta = dict(node.meta)
            node.replace_all_uses_with(mark)
            module.graph.erase_node(node)
            found[mark.name] = site
        module.recompile()
        return module, found

    @cached_property
    def _circuit(self) -> Circuit:
        context = self.context
        flat = self.program.signature.flatten_inputs(context.args, context.kwargs)
        circuit = lower(self._marks[0], tuple(flat), public=PUBLIC)
        check(circuit, protocol(CKKS))
        return circuit

    def _site(self, step: Step) -> Site | None:
        return self._marks[1].get(step.site.node) if step.op == "scale" else None

    def _own(self, step: Step) -> int:
        return protocol(CKKS).step_levels(self._circuit, step)

    def _fewest(self, step: Step) -> int:
        site = self._site(step)
        if site is None:
            return self._own(step)
        return min(map(levels_of, self.kinds[site]))

    def _told(self, step: Step) -> str:
        site = self._site(step)
        return step.site.node if site is None else site.name


def _latest(arriving: Iterator[Mapping[Site | None, int]]) -> dict[Site | None, int]:
    found: dict[Site | None, int] = {}
    for each in arriving:
        _raise(found, each)
    return found


def _raise(found: dict[_Key, int], others: Mapping[_Key, int]) -> None:
    for key, value in others.items():
        found[key] = max(value, found.get(key, value))
