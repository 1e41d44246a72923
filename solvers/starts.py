"""Starts for the drop-set search: checkpointing as people do it by hand, and the min-cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from ortools.graph.python import max_flow

from graphopt.solvers.arrays import Array, Arrays

if TYPE_CHECKING:
    from graphopt.solvers.dropset import CutSpace


def checkpoint_cuts(arrays: Arrays, space: CutSpace) -> Iterator[tuple[str, Array]]:
    """Yields (name, cuts): segments of several lengths, and min-cut saved sets."""
    turn = turning_stage(arrays)
    dropped = _dropped_at(arrays, space, turn)
    root = max(1, round(turn**0.5))
    counts = sorted({1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, root, 2 * root, turn // 2 or 1})
    for count in counts:
        if count <= turn:
            name = "square root" if count == root else "segments"
            yield name, _segments(arrays, dropped, turn, count)
    if len(arrays.duration) <= 4000:
        for share in (0.02, 0.1, 0.3, 0.6):
            yield "min-cut", _min_cut(arrays, space, dropped, turn, share)


def turning_stage(arrays: Arrays) -> int:
    """The stage with most bytes live: where forward turns into backward in a training graph."""
    n = len(arrays.duration)
    last = arrays.producer.copy()
    used = np.diff(arrays.use_ptr) > 0
    last[used] = arrays.use_idx[arrays.use_ptr[1:][used] - 1]
    change = np.zeros(n + 2, np.int64)
    np.add.at(change, arrays.producer, arrays.bytes)
    np.add.at(change, last + 1, -arrays.bytes)
    return int(np.argmax(np.cumsum(change)[:n]))


def _dropped_at(arrays: Arrays, space: CutSpace, turn: int) -> Array:
    """Every value of the forward part dies after its last use there."""
    cut = space.start.copy()
    for value in space.pool.tolist():
        uses = arrays.use_idx[arrays.use_ptr[value] : arrays.use_ptr[value + 1]]
        if arrays.producer[value] < turn:
            k = int(np.searchsorted(uses, turn, side="right"))
            cut[value] = uses[k - 1] if k else arrays.producer[value]
    return cut


def _segments(arrays: Arrays, dropped: Array, turn: int, count: int) -> Array:
    """Keeps what crosses from one of `count` equal segments of the forward part to the next."""
    cut = dropped.copy()
    n = len(arrays.duration)
    work = np.cumsum(arrays.out_bytes[:turn].astype(np.float64)) + np.arange(turn) * 1e-9
    marks = np.searchsorted(work, work[-1] * np.arange(1, count) / count) if turn else []
    for value in range(len(arrays.bytes)):
        uses = arrays.use_idx[arrays.use_ptr[value] : arrays.use_ptr[value + 1]]
        forward = uses[uses <= turn]
        if len(forward) and arrays.producer[value] <= turn:
            k = np.searchsorted(marks, arrays.producer[value])
            if k < len(marks) and forward[-1] > marks[k]:
                cut[value] = n
    return cut


def _min_cut(arrays: Arrays, space: CutSpace, dropped: Array, turn: int, share: float) -> Array:
    """Keeps the values of least bytes from which everything needed after the turn follows.

    The dearest tasks, those with `share` of the duration, are not to run again.
    """
    n, m = len(arrays.duration), len(arrays.bytes)
    order = np.argsort(-arrays.duration[: turn + 1] / np.maximum(1, arrays.out_bytes[: turn + 1]))
    total = np.cumsum(arrays.duration[order])
    dear = np.zeros(n, bool)
    dear[order[total <= share * max(1, total[-1])]] = True
    dear |= arrays.recomputable == 0
    early = np.flatnonzero(arrays.producer <= turn)
    source, sink, huge = 2 * m, 2 * m + 1, int(arrays.bytes.sum()) + 1
    flow = max_flow.SimpleMaxFlow()
    for v in early.tolist():
        flow.add_arc_with_capacity(v, m + v, int(arrays.bytes[v]))
        producer = arrays.producer[v]
        inputs = arrays.in_idx[arrays.in_ptr[producer] : arrays.in_ptr[producer + 1]]
        if dear[producer] or not len(inputs):
            flow.add_arc_with_capacity(source, v, huge)
        for w in inputs.tolist():
            flow.add_arc_with_capacity(m + w, v, huge)
        if space.last_use[v] > turn:
            flow.add_arc_with_capacity(m + v, sink, huge)
    cut = dropped.copy()
    if flow.num_nodes() <= sink or flow.solve(source, sink) != flow.OPTIMAL:
        return cut
    reached = set(flow.get_source_side_min_cut())
    kept = [v for v in early.tolist() if v in reached and m + v not in reached]
    cut[kept] = n
    return cut
