"""What a network will cost under a protocol, before anything runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.errors import UnsupportedError
from graphopt.private.circuit import Circuit, Site
from graphopt.private.cost import Cost, Network, network
from graphopt.private.folding import folded_model
from graphopt.private.lower import Model, lower
from graphopt.private.protocols import Protocol, protocol

REVEAL = "reveal"
"""Name of the row for the opening of the outputs."""


@dataclass(frozen=True)
class SiteCost:
    """What one node of the graph costs.

    Attributes:
        node: Its name; ``"reveal"`` for the opening of the outputs.
        op: The graph's op.
        line: The user's line, or None.
        bytes: Sent by all parties together.
        rounds: Times that the parties wait for each other.
        seconds: Of communication on the network.
    """

    node: str
    op: str
    line: str | None
    bytes: float
    rounds: int
    seconds: float


@dataclass(frozen=True)
class PrivateCost:
    """What a network costs under a protocol.

    Attributes:
        protocol: The protocol's name.
        network: The network's name.
        sites: One row for each graph node that talks, in order, and one for the outputs.
        bytes: Of all.
        rounds: Of all, one node after the other, as the engines run them.
        depth: Rounds along the longest path: what an engine that ran independent nodes at once
            would need.
        seconds: Of communication, without computation.
        levels: Multiplicative depth, under homomorphic encryption.
        excluded: What the protocol's figures leave out.
    """

    protocol: str
    network: str
    sites: tuple[SiteCost, ...]
    bytes: float
    rounds: int
    depth: int
    seconds: float
    levels: int = 0
    excluded: str = ""

    def by_node(self) -> dict[str, SiteCost]:
        """The rows by node."""
        return {site.node: site for site in self.sites}


def predict(
    model: Model | Circuit,
    protocol_name: str | Protocol = "crypten",
    network_name: str | tuple[float, float] | Network = "lan",
    example: Sequence[Any] = (),
    *,
    kwargs: Mapping[str, Any] | None = None,
    weights: str = "secret",
    public: Sequence[str] = (),
    folded: bool = False,
) -> PrivateCost:
    """Predict bytes, rounds and communication seconds of one evaluation.

    Args:
        model: A model, a program, a graph module, or a circuit.
        protocol_name: ``crypten``, ``cheetah``, ``semi2k``, ``aby3``, ``gc`` or ``ckks``.
        network_name: ``lan``, ``wan`` or ``(bits a second, round-trip seconds)``.
        example: Positional inputs, whose sizes count.
        kwargs: Keyword inputs.
        weights: ``"secret"`` or ``"public"``.
        public: Names of parameters and buffers that are public nevertheless, with ``*``.
        folded: Of the model's folded view (`OptimizedModule.folded`), made for this protocol.

    Raises:
        UsageError: A circuit or a graph module can't be folded.
        UnsupportedError: Ops without a rule, or without figures under this protocol; all are named.
    """
    if folded:
        model = folded_model(model, example, kwargs or {}, protocol_name, public)
    if not isinstance(model, Circuit):
        model = lower(model, example, kwargs, weights=weights, public=public)
    return predict_circuit(model, protocol(protocol_name), network(network_name))


def predict_circuit(circuit: Circuit, under: Protocol, link: Network) -> PrivateCost:
    """`predict` for a circuit."""
    check(circuit, under)
    costs = under.steps(circuit)
    talking = [(site, cost) for site, cost in _by_site(circuit, costs) if cost.rounds]
    sites = [_site(site, cost, under, link) for site, cost in talking]
    opening = _opening(circuit, under)
    sites.append(_site(Site(REVEAL), opening, under, link))
    total = sum(costs.values(), opening)
    return PrivateCost(
        under.name,
        link.name,
        tuple(sites),
        total.bytes,
        total.rounds,
        _depth(circuit, costs) + opening.rounds,
        link.seconds(total, under.trips),
        under.levels(circuit),
        under.excluded,
    )


def _opening(circuit: Circuit, under: Protocol) -> Cost:
    """What it costs to hand the inputs in, where that costs anything, and to open the outputs."""
    unit, total = under.unit(REVEAL), Cost()
    for name in (n for n in circuit.outputs if not circuit.is_public(n)):
        total += unit.cost(circuit.elements(name), circuit.elements(name))
    if "input" in under.units:
        for name in circuit.inputs:
            total += under.unit("input").cost(circuit.elements(name), 0)
    return total


def check(circuit: Circuit, under: Protocol) -> None:
    """Refuse a circuit with ops for which a protocol has no figures; names them all."""
    found: dict[str, str] = {}
    for step in circuit.steps:
        try:
            under.step(circuit, step)
        except UnsupportedError:
            found.setdefault(step.site.node, f"{step.site.op}: {step.op} (at {step.site.line})")
    if found:
        lines = [f"{node}: {why}" for node, why in found.items()]
        raise UnsupportedError(
            f"no figures under {under.name} for {len(lines)} nodes:\n  " + "\n  ".join(lines)
        )


def _by_site(circuit: Circuit, costs: Mapping[str, Cost]) -> list[tuple[Site, Cost]]:
    """Costs added up by node, nodes in the order in which they first run."""
    totals: dict[str, tuple[Site, Cost]] = {}
    for step in circuit.steps:
        known = totals.get(step.site.node, (step.site, Cost()))[1]
        totals[step.site.node] = (step.site, known + costs[step.name])
    return list(totals.values())


def _site(site: Site, cost: Cost, under: Protocol, link: Network) -> SiteCost:
    seconds = link.seconds(cost, under.trips)
    return SiteCost(site.node, site.op, site.line, cost.bytes, cost.rounds, seconds)


def _depth(circuit: Circuit, costs: Mapping[str, Cost]) -> int:
    depth: dict[str, int] = {}
    for step in circuit.steps:
        before = max((depth.get(name, 0) for name in step.inputs), default=0)
        depth[step.name] = before + costs[step.name].rounds
    return max((depth.get(name, 0) for name in circuit.outputs), default=0)
