"""A task graph as flat integer arrays, the form that compiled code works on."""

from __future__ import annotations

from itertools import chain
from typing import NamedTuple

import numpy as np

from graphopt.solvers.graph import TaskGraph

Array = np.ndarray


class Arrays(NamedTuple):
    """CSR form of a task graph; task index = position in the input order = stage.

    Attributes:
        duration: per task.
        workspace: per task, bytes.
        recomputable: per task, 1 or 0.
        bytes: per value.
        producer: per value, a task index.
        keep: per value, 1 or 0.
        in_ptr: offsets into `in_idx`; the inputs of task t are `in_idx[in_ptr[t]:in_ptr[t + 1]]`.
        in_idx: value ids.
        out_ptr: offsets into `out_idx`.
        out_idx: value ids.
        use_ptr: offsets into `use_idx`, per value.
        use_idx: the tasks that take the value as an input, ascending.
        out_bytes: per task, sum of the bytes of its outputs.
    """

    duration: Array
    workspace: Array
    recomputable: Array
    bytes: Array
    producer: Array
    keep: Array
    in_ptr: Array
    in_idx: Array
    out_ptr: Array
    out_idx: Array
    use_ptr: Array
    use_idx: Array
    out_bytes: Array


def _csr(lists: list[tuple[int, ...]] | list[list[int]]) -> tuple[Array, Array]:
    pointers = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(items) for items in lists], out=pointers[1:])
    return pointers, np.fromiter(chain.from_iterable(lists), np.int64, int(pointers[-1]))


def to_arrays(graph: TaskGraph) -> Arrays:
    """Flattens a task graph."""
    uses: list[list[int]] = [[] for _ in graph.values]
    for index, task in enumerate(graph.tasks):
        for value in dict.fromkeys(task.inputs):
            uses[value].append(index)
    sizes = np.array([v.bytes for v in graph.values], np.int64)
    in_ptr, in_idx = _csr([tuple(dict.fromkeys(t.inputs)) for t in graph.tasks])
    out_ptr, out_idx = _csr([t.outputs for t in graph.tasks])
    use_ptr, use_idx = _csr(uses)
    return Arrays(
        duration=np.array([t.duration for t in graph.tasks], np.int64),
        workspace=np.array([t.workspace for t in graph.tasks], np.int64),
        recomputable=np.array([t.recomputable for t in graph.tasks], np.int64),
        bytes=sizes,
        producer=np.array([v.producer for v in graph.values], np.int64),
        keep=np.array([v.keep for v in graph.values], np.int64),
        in_ptr=in_ptr,
        in_idx=in_idx,
        out_ptr=out_ptr,
        out_idx=out_idx,
        use_ptr=use_ptr,
        use_idx=use_idx,
        out_bytes=np.array([sum(sizes[v] for v in t.outputs) for t in graph.tasks], np.int64),
    )
