"""Least saving: which values cross from forward to backward if cheap tasks may run again.

The classic minimum cut (Chen and others' AOTAutograd partitioner, "min-cut rematerialization"),
with a price on running again: a value that backward needs is either kept, and costs its bytes, or
made again by a cheap task from values for which the same holds, and costs a share of the bytes
that this task touches. So nothing is run again for a handful of bytes.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np
from ortools.graph.python import max_flow

from graphopt.solvers.arrays import to_arrays
from graphopt.solvers.check import check
from graphopt.solvers.dropset import recompute_stages, to_sequence
from graphopt.solvers.graph import TaskGraph
from graphopt.solvers.solution import Solution

# A byte read or written once more weighs a 64th of a byte kept.
_PRICE = 64
_UNCUT = 2**52


def least_saved(graph: TaskGraph, turn: int, cheap: Collection[int]) -> frozenset[int]:
    """The values to keep from forward for backward.

    Args:
        graph: The step. Only the input order is looked at.
        turn: The task with which backward begins: what it and later tasks read is needed.
        cheap: Tasks that may run again.

    Returns:
        Values made before `turn` that minimise bytes kept plus the price of running again, with
        which every later task finds its inputs. Values of kept outputs count nothing.
    """
    return _Network(graph, turn).cut(cheap)


class _Network:
    """The flow network: a value is an arc of its bytes, a task a node before its outputs."""

    def __init__(self, graph: TaskGraph, turn: int) -> None:
        self.graph, self.turn = graph, turn
        self.flow = max_flow.SimpleMaxFlow()
        self.values = [v for v, value in enumerate(graph.values) if value.producer < turn]
        self.first_task = 2 * len(graph.values)
        self.source = self.first_task + turn
        self.sink = self.source + 1

    def cut(self, cheap: Collection[int]) -> frozenset[int]:
        """The values whose arcs are cut."""
        for v in self.values:
            value = self.graph.values[v]
            self._arc(2 * v, 2 * v + 1, 0 if value.keep else _PRICE * value.bytes)
        for t in range(self.turn):
            self._add_task(t, may_repeat=t in cheap and self.graph.tasks[t].recomputable)
        for v in {v for task in self.graph.tasks[self.turn :] for v in task.inputs}:
            if self.graph.values[v].producer < self.turn:
                self._arc(2 * v + 1, self.sink)
        if self.flow.solve(self.source, self.sink) != self.flow.OPTIMAL:
            raise AssertionError("a minimum cut exists: every value can be kept")
        late = set(self.flow.get_sink_side_min_cut())
        return frozenset(v for v in self.values if 2 * v not in late and 2 * v + 1 in late)

    def _add_task(self, t: int, *, may_repeat: bool) -> None:
        task = self.graph.tasks[t]
        for v in task.outputs:
            self._arc(self.first_task + t, 2 * v)
        if may_repeat:
            touched = {*task.inputs, *task.outputs}
            price = max(1, sum(self.graph.values[v].bytes for v in touched))
            self._arc(self.source, self.first_task + t, price)
            for v in task.inputs:
                self._arc(2 * v + 1, self.first_task + t)
        else:
            self._arc(self.source, self.first_task + t)

    def _arc(self, tail: int, head: int, capacity: int = _UNCUT) -> None:
        self.flow.add_arc_with_capacity(tail, head, capacity)


def save_least(graph: TaskGraph, turn: int, cheap: Collection[int]) -> Solution:
    """The step that keeps `least_saved` and makes the rest again right before its first use.

    Args:
        graph: The step.
        turn: The task with which backward begins.
        cheap: Tasks that may run again.
    """
    began = time.monotonic()
    kept = least_saved(graph, turn, cheap)
    arrays = to_arrays(graph)
    cut = np.full(len(graph.values), len(graph.tasks), np.int64)
    for v, value in enumerate(graph.values):
        if value.producer < turn and v not in kept and not value.keep:
            cut[v] = turn - 1
    stage = np.empty(len(graph.tasks), np.int64)
    recompute_stages(arrays, cut, stage)
    sequence = tuple(to_sequence(stage))
    found = check(graph, sequence)
    assert found.ok, found.errors
    return Solution(
        sequence=sequence,
        duration=found.duration,
        peak=found.peak,
        budget=found.peak,
        lower_bound=found.duration,
        gap=0.0,
        status="optimal",
        seconds=time.monotonic() - began,
        order="input",
        scope="least bytes saved for backward, cheap ops alone running again",
        min_peak=found.peak,
    )
