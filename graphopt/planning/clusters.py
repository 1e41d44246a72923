"""Chains of pointwise ops that run in one buffer.

If `y = f(x, ...)` is pointwise, has the layout of `x`, and nobody else reads `x`, then `y` can be
written over `x`. Keeping `y` is then never worse than keeping `x`, so both become one task:
planned, run and recomputed together. Nothing is lost and the working set shrinks. The values are
the same bit for bit, since the same kernel runs, only its output pointer differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.cost import OpMeasurement
from graphopt.ir.joint import JointView
from graphopt.ir.ops import is_effectful, out_overload
from graphopt.ir.storage import Role, StorageMap, is_tuple

# How far (in computations) the first op of a chain may be moved down to its reader.
_REACH = 12


@dataclass
class Cluster:
    """Computations that run as one task.

    Attributes:
        nodes: In order of execution; the last one's results are the cluster's.
        reuse: Computation -> the argument whose memory its result takes.
    """

    nodes: list[fx.Node]
    reuse: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def last(self) -> fx.Node:
        """The computation whose results leave the cluster."""
        return self.nodes[-1]


def find_clusters(
    view: JointView,
    storage: StorageMap,
    measured: Mapping[fx.Node, OpMeasurement],
    late: set[fx.Node],
) -> list[Cluster]:
    """Groups all computations, in graph order (a chain stands where its last op stands).

    Args:
        view: The joint view.
        storage: Roles and owners of its nodes.
        measured: What each computation allocates.
        late: The nodes of the backward pass; no chain crosses from forward into it.
    """
    computations = [n for n in view.graph.nodes if storage.role[n] is Role.COMPUTE]
    place = {node: i for i, node in enumerate(computations)}
    readers = _readers(view, storage)
    clusters: dict[fx.Node, Cluster] = {}
    for node in computations:
        cluster = Cluster([node])
        found = _overwritable(node, storage, measured, readers, place, late)
        if found is not None:
            argument, producer = found
            before = clusters.pop(producer)
            cluster = Cluster([*before.nodes, node], {**before.reuse, node: argument})
        clusters[node] = cluster
    return list(clusters.values())


def _readers(view: JointView, storage: StorageMap) -> dict[fx.Node, set[fx.Node]]:
    """Storage owner -> computations and results that read it or one of its views."""
    readers: dict[fx.Node, set[fx.Node]] = {}
    for node in view.graph.nodes:
        if storage.role[node] in (Role.COMPUTE, Role.OUTPUT):
            for owner in storage.operands(node):
                readers.setdefault(owner, set()).add(node)
    return readers


def _overwritable(
    node: fx.Node,
    storage: StorageMap,
    measured: Mapping[fx.Node, OpMeasurement],
    readers: Mapping[fx.Node, set[fx.Node]],
    place: Mapping[fx.Node, int],
    late: set[fx.Node],
) -> tuple[fx.Node, fx.Node] | None:
    """The latest argument that `node` may write over, and the computation that makes it."""
    if not _is_pointwise(node) or out_overload(node.target) is None:
        return None
    best = None
    for argument in node.all_input_nodes:
        owner = storage.base[argument]
        if storage.role[owner] is not Role.COMPUTE or is_tuple(owner):
            continue
        fits = (
            readers[owner] == {node}
            and (owner in late) == (node in late)
            and place[node] - place[owner] <= _REACH
            and sum(measured[owner].output_bytes) > 0
            and not is_effectful(owner)
            and _same_layout(argument, node)
            and _is_whole(argument, owner)
            and all(_same_layout(a, argument) for a in _views_of(owner, node, storage))
        )
        if fits and (best is None or place[owner] > place[best[1]]):
            best = (argument, owner)
    return best


def _views_of(owner: fx.Node, node: fx.Node, storage: StorageMap) -> list[fx.Node]:
    return [a for a in node.all_input_nodes if storage.base[a] is owner]


def _is_pointwise(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
        and torch.Tag.nondeterministic_seeded not in node.target.tags
        and not is_tuple(node)
    )


def _same_layout(first: fx.Node, second: fx.Node) -> bool:
    a, b = first.meta["val"], second.meta["val"]
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.dtype == b.dtype
        and a.device == b.device
        and a.dim() == b.dim()
        and all(_equal(x, y) for x, y in zip(a.shape, b.shape, strict=True))
        and all(_equal(x, y) for x, y in zip(a.stride(), b.stride(), strict=True))
    )


def _is_whole(argument: fx.Node, owner: fx.Node) -> bool:
    """Whether the argument covers its owner's elements once each."""
    return _equal(argument.meta["val"].numel(), owner.meta["val"].numel()) and not any(
        _equal(stride, 0) for stride in argument.meta["val"].stride()
    )


def _equal(a: int | torch.SymInt, b: int | torch.SymInt) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)
