"""Seconds of one forward: a polynomial in the widths for choosing them, and the real ones.

The network is pruned to some widths, and every call of its graph is timed alone; the times of a
call are fitted by its FLOPs and by the sizes of what it reads and writes, which are polynomials in
the widths (a roofline whose ceilings are measured op by op). That chooses widths; whether a budget
is kept is decided by timing the whole network in turns with its source.
"""

from __future__ import annotations

import logging
import math
import operator
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import fx

from graphopt.budget import Quantity
from graphopt.cost.calls import Call, CallError, describe
from graphopt.cost.seconds import call_seconds
from graphopt.cost.sizes import UnknownSizeError, tensors_in
from graphopt.ir.program import Program
from graphopt.measure import PairedSeconds, forward_seconds
from graphopt.passes.prune.costs import FlopsCounter, Polynomial, places
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.rewrite import pruned
from graphopt.passes.prune.rule import values_in
from graphopt.pipeline import PassContext
from graphopt.solvers.least_squares import nonnegative_least_squares

log = logging.getLogger("graphopt")

# Networks whose calls are timed, the whole one besides.
_SAMPLES = 9
# Seconds for timing calls, and their largest share of the time limit.
_TIMING = (30.0, 0.5)
# Seconds of one timing of the whole network; a network is accepted after two.
_FORWARD = 1.0
_MOST_COLUMNS = 6


class Latency:
    """What a limit on the seconds of a forward says of pruned programs.

    Attributes:
        before: Seconds of the source: its lower quartile.
        limit: Seconds that are allowed.
    """

    def __init__(self, program: Program, context: PassContext, quantity: Quantity) -> None:
        """Time the source.

        Args:
            program: What is pruned.
            context: The source, the example inputs.
            quantity: The limit; a percentage is one of the source's seconds.
        """
        self.context, self.quantity = context, quantity
        self.source = program.emit() if context.source is None else context.source
        self.before = self._timed(program).reference
        self.limit = quantity.of(self.before)

    def of(self, program: Program) -> float:
        """Seconds of a program, to be compared with `limit`: the larger one of two timings.

        For a percentage the source is timed in the same run, and the ratio counts, so that a
        machine that has become slower or faster meanwhile changes nothing.
        """
        first = self._of(program)
        return first if first > self.limit else max(first, self._of(program))

    def _of(self, program: Program) -> float:
        timed = self._timed(program)
        if not self.quantity.relative:
            return timed.seconds
        return timed.seconds / timed.reference * self.before

    def _timed(self, program: Program) -> PairedSeconds:
        self.context.progress("timing the network in turns with its source")
        return forward_seconds(
            program.emit(), self.source, self.context.args, self.context.kwargs, limit=_FORWARD
        )


@dataclass(frozen=True)
class _Sample:
    """A network with some widths.

    Attributes:
        widths: Of each dimension.
        calls: For each node of the program's graph the calls that stand for it.
    """

    widths: tuple[int, ...]
    calls: dict[str, tuple[Call, ...]]


def latency_polynomial(
    program: Program,
    dimensions: Dimensions,
    allowed: Sequence[Sequence[int]],
    before: float,
    context: PassContext,
) -> Polynomial:
    """Seconds of one forward in eval mode, fitted to timings of its calls.

    Args:
        program: The program.
        dimensions: Its dimensions.
        allowed: The widths that each may get, rising, the full one last.
        before: Measured seconds of the whole forward, to which the sum is scaled: that spreads what
            can't be timed alone over the rest.
        context: Time limit, seed, progress.
    """
    context.progress("timing operators")
    samples = list(_samples(program, dimensions, allowed, context.seed))
    seconds = _seconds(samples, context)
    module = program.module if program.eval_module is None else program.eval_module
    features = {
        node.name: _features(dimensions, module, node)
        for node in module.graph.nodes
        if any(node.name in sample.calls for sample in samples)
    }
    total: Polynomial = defaultdict(float)
    for names in _alike(samples[0], features).values():
        _fit(names, features, samples, seconds, total)
    whole = sum(seconds[0].values())
    scale = before / whole if whole > 0 else 1.0
    _log_fit(total, samples, seconds)
    return {monomial: scale * amount for monomial, amount in total.items()}


def _samples(
    program: Program, dimensions: Dimensions, allowed: Sequence[Sequence[int]], seed: int
) -> Iterator[_Sample]:
    """The whole network, the narrowest, and networks of random widths."""
    draw = random.Random(seed)
    vectors = [tuple(widths[-1] for widths in allowed), tuple(widths[0] for widths in allowed)]
    vectors += [tuple(map(draw.choice, allowed)) for _ in range(_SAMPLES - 1)]
    base = program.module if program.eval_module is None else program.eval_module
    names = [node.name for node in base.graph.nodes]
    for widths in dict.fromkeys(vectors):
        kept = [dim.units[:width] for dim, width in zip(dimensions.all, widths, strict=True)]
        small = pruned(program, dimensions.analysis, dimensions.removed(kept))
        yield _Sample(widths, _calls(small.specialize(False).graph, names))


def _calls(graph: fx.Graph, names: Sequence[str]) -> dict[str, tuple[Call, ...]]:
    """The calls of a graph by the nodes of the source's that they stand for.

    Nodes that were written out have become several; these stand before the next known one.
    """
    place = {name: index for index, name in enumerate(names)}
    found: dict[str, list[Call]] = defaultdict(list)
    fresh: list[Call] = []
    last = -1
    for node in graph.nodes:
        at = place.get(node.name)
        call = _described(node)
        if at is None:
            fresh += [call] if call else []
            continue
        if fresh:
            gone = names[last + 1] if last + 1 < at else node.name
            found[gone] += fresh
            fresh = []
        last = at
        if call:
            found[node.name].append(call)
    return {name: tuple(calls) for name, calls in found.items()}


def _described(node: fx.Node) -> Call | None:
    """A node's call; None where it makes none that can be timed alone."""
    gives_tensor = next(tensors_in(node.meta.get("val")), None) is not None
    if node.op != "call_function" or node.target is operator.getitem or not gives_tensor:
        return None
    try:
        return describe(node)
    except (CallError, UnknownSizeError):
        return None


def _seconds(samples: Sequence[_Sample], context: PassContext) -> list[dict[str, float]]:
    """For each sample the seconds of its nodes; those without a figure are left out."""
    calls = [call for sample in samples for each in sample.calls.values() for call in each]
    limit = min(_TIMING[0], _TIMING[1] * context.time_limit)
    timed = call_seconds(
        calls,
        limit=limit,
        progress=lambda done, total: context.progress("timing operators", done / total),
    )
    known = {id(call): seconds for call, seconds in zip(calls, timed, strict=True)}
    result = []
    for sample in samples:
        found = {}
        for name, each in sample.calls.items():
            parts = [known[id(call)] for call in each]
            numbers = [part for part in parts if part is not None]
            if len(numbers) == len(parts):
                found[name] = sum(numbers)
        result.append(found)
    return result


def _features(
    dimensions: Dimensions, module: fx.GraphModule, node: fx.Node
) -> tuple[Polynomial, ...]:
    """What the seconds of a node may depend on, each 1 at full widths: 1, FLOPs, sizes."""
    full_widths = [dim.width for dim in dimensions.all]
    near = (node, *node.all_input_nodes)
    values = dimensions.analysis.values
    sizes = [places(dimensions, value) for n in near for value in values_in(values.get(n))]
    found: list[Polynomial] = []
    for polynomial in ({(): 1.0}, FlopsCounter(dimensions).of_node(module, node), *sizes):
        full = _at(polynomial, full_widths)
        if full <= 0:
            continue
        scaled = {m: amount / full for m, amount in polynomial.items() if amount}
        if not any(_equal(scaled, other) for other in found):
            found.append(scaled)
    return tuple(found[:_MOST_COLUMNS])


def _equal(one: Polynomial, other: Polynomial) -> bool:
    return all(abs(one.get(m, 0.0) - other.get(m, 0.0)) < 1e-9 for m in (*one, *other))


def _at(polynomial: Polynomial, widths: Sequence[int]) -> float:
    """The value of a polynomial."""
    return sum(c * math.prod(widths[d] for d in monomial) for monomial, c in polynomial.items())


def _alike(
    whole: _Sample, features: dict[str, tuple[Polynomial, ...]]
) -> dict[Hashable, list[str]]:
    """Nodes that make the same call in the whole network: they are fitted together."""
    found: dict[Hashable, list[str]] = defaultdict(list)
    for name, columns in features.items():
        calls = tuple(call.key for call in whole.calls.get(name, ()))
        found[(calls or name, len(columns))].append(name)
    return found


def _fit(
    names: Sequence[str],
    features: dict[str, tuple[Polynomial, ...]],
    samples: Sequence[_Sample],
    seconds: Sequence[dict[str, float]],
    total: Polynomial,
) -> None:
    """Add the seconds of nodes that make the same call, as polynomials.

    Errors count relative to the seconds. Where a node has become several calls in the pruned
    networks, the whole one says nothing of it.
    """
    rows, target = [], []
    for name in names:
        split = any(len(sample.calls.get(name, ())) > 1 for sample in samples)
        for sample, timed in list(zip(samples, seconds, strict=True))[int(split) :]:
            if name in timed:
                rows.append([_at(column, sample.widths) for column in features[name]])
                target.append(timed[name])
    if not target:
        return
    scale = 1 / np.maximum(np.array(target), 1e-9)
    found = nonnegative_least_squares(np.array(rows) * scale[:, None], np.ones(len(target)))
    for name in names:
        for coefficient, column in zip(found.tolist(), features[name], strict=True):
            for monomial, amount in column.items():
                total[monomial] += coefficient * amount


def _log_fit(
    total: Polynomial, samples: Sequence[_Sample], seconds: Sequence[dict[str, float]]
) -> None:
    errors = [
        _at(total, sample.widths) / sum(timed.values()) - 1
        for sample, timed in zip(samples, seconds, strict=True)
        if timed
    ]
    log.debug("latency of %d networks fitted with errors %s", len(errors), np.round(errors, 3))
