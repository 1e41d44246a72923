"""Live bytes of graphs run node after node, and whose they are at the peak."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt.cost.operators import OpMeasurement, Progress, measure_ops
from graphopt.inspect.document import Document


@dataclass(frozen=True)
class Lifetime:
    """How long one allocation lives, in steps of the timeline.

    Attributes:
        node: The node that makes it.
        bytes: Its size.
        start: The step at which it is made.
        end: The last step at which it lives.
    """

    node: fx.Node
    bytes: int
    start: int
    end: int


@dataclass(frozen=True)
class LiveBytes:
    """Bytes alive while a graph runs, each value let go after its last use.

    Attributes:
        peak: Most live bytes at any node, temporaries included.
        at: The node at which that is.
        timeline: ``(node, live bytes while it runs)`` for each call, in order.
        holders: Node -> bytes of its values that are live at the peak; the node at the peak
            includes its temporaries.
        allocated: Node -> bytes that it allocates for its values.
        largest_workspace: Most bytes of temporaries of any node.
        lifetimes: One entry for each allocation that outlives its op.
        measured: Node -> what the op allocates and, where asked for, how long it takes.
    """

    peak: int
    at: fx.Node | None
    timeline: tuple[tuple[fx.Node, int], ...]
    holders: Mapping[fx.Node, int]
    allocated: Mapping[fx.Node, int] = field(default_factory=dict)
    largest_workspace: int = 0
    lifetimes: tuple[Lifetime, ...] = ()
    measured: Mapping[fx.Node, OpMeasurement] = field(default_factory=dict, repr=False)


def live_bytes(
    shown: Document,
    progress: Progress | None = None,
    *,
    keep_outputs: bool = False,
    seconds: bool = False,
) -> LiveBytes:
    """Simulate a document's graphs with measured sizes (see `graphopt.cost.measure_ops`).

    Args:
        shown: A program, a joint graph or a plan.  Its inputs, parameters, buffers and tangents
            don't count.
        progress: Called with ``(ops measured, ops in all)``.
        keep_outputs: Whether outputs live to the end.  If not, they die after their last use in the
            graph, as gradients do once they are added to those that are allocated already.
        seconds: Whether to time each distinct op as well.
    """
    nodes = [node for segment in shown.segments for node in segment.module.graph.nodes]
    calls = [node for node in nodes if node.op == "call_function"]
    measured = measure_ops(calls, progress=progress, seconds=seconds)
    storages = _Storages(measured)
    passed: dict[str, list[int | None]] = {}
    for segment in shown.segments:
        for node, binding in segment.bindings.items():
            if binding.kind == "value":
                storages.of[node] = passed.get(binding.name, [None])
        for node in segment.module.graph.nodes:
            storages.visit(node)
        for result in segment.results:
            if result.kind == "value" and isinstance(result.value, fx.Node):
                passed[result.name] = storages.of[result.value]
    return _simulate([n for n in nodes if keep_outputs or n.op != "output"], storages, measured)


@dataclass
class _Storages:
    """Which storages each node's values lie in."""

    measured: Mapping[fx.Node, OpMeasurement]
    of: dict[fx.Node, list[int | None]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)
    makers: list[fx.Node] = field(default_factory=list)

    def visit(self, node: fx.Node) -> None:
        if node.op != "call_function":
            self.of.setdefault(node, [None])  # what an earlier segment made is there already
            return
        if node.target is operator.getitem:
            source, index = node.args
            owners = self.of.get(source, [None])  # type: ignore[arg-type]
            self.of[node] = [owners[index] if index < len(owners) else None]  # type: ignore[operator, index]
            return
        tensors = _tensor_arguments(node)
        found = self.measured[node]
        owners = []
        for size, alias in zip(found.output_bytes, found.aliases, strict=True):
            if alias is not None:
                owners.append(self.of[tensors[alias]][0] if alias < len(tensors) else None)
            elif size:
                owners.append(len(self.sizes))
                self.sizes.append(size)
                self.makers.append(node)
            else:
                owners.append(None)
        self.of[node] = owners


def _simulate(
    nodes: list[fx.Node], storages: _Storages, measured: Mapping[fx.Node, OpMeasurement]
) -> LiveBytes:
    dies: dict[int, int] = {}
    for step, node in enumerate(nodes):
        for reader in (node, *node.all_input_nodes):
            dies.update({s: step for s in storages.of[reader] if s is not None})
    ends: dict[int, list[int]] = {}
    for storage, step in dies.items():
        ends.setdefault(step, []).append(storage)
    alive: set[int] = set()
    live = peak = 0
    at: fx.Node | None = None
    at_peak: frozenset[int] = frozenset()
    timeline = []
    for step, node in enumerate(nodes):
        fresh = {s for s in storages.of[node] if s is not None and storages.makers[s] is node}
        live += sum(storages.sizes[s] for s in fresh - alive)
        alive |= fresh
        if node in measured:
            now = live + measured[node].workspace
            timeline.append((node, now))
            if now > peak:
                peak, at, at_peak = now, node, frozenset(alive)
        for storage in ends.get(step, ()):
            alive.discard(storage)
            live -= storages.sizes[storage]
    holders = _by_maker(storages, at_peak)
    if at is not None and measured[at].workspace:
        holders[at] = holders.get(at, 0) + measured[at].workspace
    everything = _by_maker(storages, range(len(storages.sizes)))
    largest = max((m.workspace for m in measured.values()), default=0)
    lifetimes = _lifetimes(nodes, storages, dies, measured)
    return LiveBytes(peak, at, tuple(timeline), holders, everything, largest, lifetimes, measured)


def _lifetimes(
    nodes: list[fx.Node],
    storages: _Storages,
    dies: Mapping[int, int],
    measured: Mapping[fx.Node, OpMeasurement],
) -> tuple[Lifetime, ...]:
    """When each storage is made and last read, in steps of the timeline (which counts calls)."""
    calls, count = [], 0
    for node in nodes:
        calls.append(count)
        count += node in measured
    step_of = {node: calls[position] for position, node in enumerate(nodes)}
    last = max(0, count - 1)
    return tuple(
        Lifetime(maker, size, step_of[maker], min(calls[dies[storage]], last))
        for storage, (maker, size) in enumerate(zip(storages.makers, storages.sizes, strict=True))
        if storage in dies and maker in step_of
    )


def _by_maker(storages: _Storages, which: Any) -> dict[fx.Node, int]:
    found: dict[fx.Node, int] = {}
    for storage in which:
        maker = storages.makers[storage]
        found[maker] = found.get(maker, 0) + storages.sizes[storage]
    return found


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found
