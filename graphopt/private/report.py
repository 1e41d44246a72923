"""A network under a protocol: predicted, run between parties, and compared with the plaintext."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import InputMismatch, UsageError
from graphopt.plain import human_bytes, to_plain
from graphopt.private import engines
from graphopt.private.circuit import Circuit
from graphopt.private.cost import Cost, Network, network
from graphopt.private.folding import folded_model
from graphopt.private.lower import Model, graph_of, lower_graph
from graphopt.private.plain import evaluate, range_of
from graphopt.private.predict import REVEAL, PrivateCost, predict_circuit
from graphopt.private.protocols import Protocol, protocol

ENGINES = ("crypten", "spu", "none")


@dataclass(frozen=True)
class SiteRow:
    """One graph node, predicted and measured.

    Attributes:
        node: Its name; ``"reveal"`` for the opening of the outputs.
        op: The graph's op.
        line: The user's line, or None.
        predicted_bytes: By the protocol's table, sent by all parties together.
        predicted_rounds: By the table.
        network_seconds: Communication time of the prediction on the network.
        bytes: Counted by the engine, or None.
        rounds: Counted by the engine, or None.
        seconds: Wall-clock time on this machine, or None.
    """

    node: str
    op: str
    line: str | None
    predicted_bytes: float
    predicted_rounds: int
    network_seconds: float
    bytes: float | None = None
    rounds: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class PrivateReport:
    """What a network costs under secure computation.

    Attributes:
        engine: ``crypten``, ``spu``, or ``none`` for a prediction alone.
        protocol: The protocol.
        network: The network that seconds are predicted for.
        weights: ``secret`` or ``public``.
        predicted: The prediction.
        bytes: Counted by the engine, all parties together; None without an engine.
        rounds: Counted by the engine.
        seconds: Wall-clock time on this machine, where both parties share the processors.
        network_seconds: What the counted communication takes on the network.
        max_error: Largest difference of an output element from the plaintext.
        relative_error: That over the plaintext's largest magnitude.
        largest: Largest magnitude inside of the network, and where: fixed-point numbers overflow.
        sites: By graph node.
    """

    engine: str
    protocol: str
    network: str
    weights: str
    predicted: PrivateCost
    bytes: float | None = None
    rounds: int | None = None
    seconds: float | None = None
    network_seconds: float | None = None
    max_error: float | None = None
    relative_error: float | None = None
    largest: tuple[float, str] = (0.0, "")
    sites: tuple[SiteRow, ...] = ()
    outputs: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the outputs."""
        data = {k: to_plain(v) for k, v in self.__dict__.items() if k != "outputs"}
        data["predicted"].pop("sites")
        return {"schema_version": 1, **data}

    def summary(self) -> str:
        """A few lines for people."""
        p = self.predicted
        lines = [
            f"{self.protocol}, {self.weights} weights, {self.network}: predicted "
            f"{human_bytes(p.bytes)}, {p.rounds} rounds (deepest path {p.depth}), "
            f"{p.seconds:.3g} s of communication"
        ]
        if self.bytes is not None:
            lines.append(
                f"measured {human_bytes(self.bytes)}, {self.rounds} rounds, "
                f"{self.network_seconds:.3g} s of communication; {self.seconds:.3g} s on this "
                f"machine; largest error {self.max_error:.2g} ({self.relative_error:.2g} of the "
                "largest output)"
            )
        if p.excluded:
            lines.append(f"not counted: {p.excluded}")
        return "\n".join(lines)


def private_cost(
    model: Model,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    engine: str = "crypten",
    protocol_name: str | None = None,
    network_name: str | tuple[float, float] | Network = "lan",
    weights: str = "secret",
    public: Sequence[str] = (),
    folded: bool = False,
    timeout: float = 600.0,
    progress: Callable[..., None] = lambda *_: None,
) -> PrivateReport:
    """Run a model in eval mode under secure computation, and say what it costs.

    Args:
        model: A model, a program or a graph module.
        args: Positional inputs.
        kwargs: Keyword inputs.
        engine: ``crypten`` (two processes), ``spu`` (`protocol_name` one of cheetah, semi2k, aby3),
            or ``none``: the prediction alone.
        protocol_name: The protocol; default: the engine's first.
        network_name: ``lan``, ``wan`` or ``(bits a second, round-trip seconds)``.
        weights: ``"secret"``: the parameters are shared as the input is; ``"public"``.
        public: Names of parameters and buffers that are public nevertheless, with ``*``.
        folded: Run the model's folded view (`OptimizedModule.folded`), made for this protocol.
        timeout: Seconds that the engine may take.
        progress: Told what goes on.

    Raises:
        UnsupportedError: The engine isn't installed, or an op can't run; all are named.
        EngineError: A party failed, or the time is up.
    """
    under = _protocol(engine, protocol_name)
    link = network(network_name)
    progress("reading the graph")
    if folded:
        model = folded_model(model, args, kwargs or {}, under, public)
    graph, flat = graph_of(model, tuple(args), dict(kwargs or {}))
    circuit = lower_graph(graph, flat, weights=weights, public=public)
    predicted = predict_circuit(circuit, under, link)
    inputs = circuit.encode(flat)
    report = PrivateReport(engine, under.name, link.name, weights, predicted)
    if engine == "none":
        return dataclasses.replace(report, sites=_rows(circuit, predicted, {}))
    _refuse_other_devices(inputs)
    run = _run(engine, under.name, circuit, inputs, timeout, progress)
    expected = _expected(graph, flat)
    errors = [_error(got, want) for got, want in zip(run.outputs, expected, strict=True)]
    return dataclasses.replace(
        report,
        bytes=run.cost.bytes,
        rounds=run.cost.rounds,
        seconds=run.seconds,
        network_seconds=link.seconds(run.cost, under.trips),
        max_error=max(e[0] for e in errors),
        relative_error=max(e[1] for e in errors),
        largest=range_of(circuit, evaluate(circuit, inputs)),
        sites=_rows(circuit, predicted, run.steps),
        outputs=run.outputs,
    )


def _protocol(engine: str, name: str | None) -> Protocol:
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", hint=f"one of {', '.join(ENGINES)}")
    runs = {"crypten": ("crypten",), "spu": engines.spu.PROTOCOLS}.get(engine)
    name = name or (runs[0] if runs else "crypten")
    under = protocol(name)
    if runs and name not in runs:
        raise UsageError(
            f"the engine {engine} doesn't run {name}",
            hint=f"it runs {', '.join(runs)}; --engine none predicts without one",
        )
    return under


def _run(
    engine: str,
    name: str,
    circuit: Circuit,
    inputs: Sequence[torch.Tensor],
    timeout: float,
    progress: Callable[..., None],
) -> engines.Run:
    if engine == "crypten":
        return engines.crypten.run(circuit, inputs, timeout=timeout, progress=progress)
    return engines.spu.run(circuit, inputs, protocol=name, timeout=timeout, progress=progress)


def _refuse_other_devices(inputs: Sequence[torch.Tensor]) -> None:
    if any(x.device.type != "cpu" for x in inputs):
        raise InputMismatch("engines run on the CPU", hint="move the model and its inputs there")


def _expected(graph: torch.fx.GraphModule, flat: Sequence[Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        results = graph(*flat)
    leaves = pytree.tree_leaves(results)
    return [leaf.double() for leaf in leaves if isinstance(leaf, torch.Tensor)]


def _error(got: torch.Tensor, want: torch.Tensor) -> tuple[float, float]:
    if not want.numel():
        return 0.0, 0.0
    worst = float((got.reshape(want.shape) - want).abs().max())
    return worst, worst / max(float(want.abs().max()), 1e-12)


def _rows(
    circuit: Circuit, predicted: PrivateCost, steps: Mapping[str, engines.Measured]
) -> tuple[SiteRow, ...]:
    """A row for each node that talks by prediction or by measurement."""
    measured: dict[str, tuple[Cost, float]] = {}
    sites = {step.site.node: step.site for step in circuit.steps}
    nodes = {step.name: step.site.node for step in circuit.steps}
    for name, figures in steps.items():
        cost, seconds = measured.get(nodes.get(name, REVEAL), (Cost(), 0.0))
        measured[nodes.get(name, REVEAL)] = (cost + figures.cost, seconds + figures.seconds)
    known = predicted.by_node()
    rows = []
    for node in (*sites, REVEAL):
        cost, seconds = measured.get(node, (Cost(), 0.0))
        expected = known.get(node)
        if expected is None and not cost.rounds:
            continue
        site = sites.get(node)
        figures = (cost.bytes, cost.rounds, seconds) if steps else (None, None, None)
        rows.append(
            SiteRow(
                node,
                site.op if site else "",
                site.line if site else None,
                expected.bytes if expected else 0.0,
                expected.rounds if expected else 0,
                expected.seconds if expected else 0.0,
                *figures,
            )
        )
    return tuple(rows)
