"""Masks at one bit an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.ir.joint import JointView
from graphopt.ir.ops import is_random
from graphopt.ir.storage import Role, storage_map
from graphopt.passes.share import packing  # noqa: F401 - registers the ops
from graphopt.planning.prepare import depending_on, depends_on_tangents
from graphopt.planning.rewrites import Rewrite, Site, insert, sizes_of
from graphopt.report import ShareRefusal

aten = torch.ops.aten


@dataclass(frozen=True)
class PackedMasks(Rewrite):
    """Masks that backward reads are kept as bits: dropout's, and those computed from activations.

    Before: mask -> backward.  After: mask -> bits -> mask' -> backward.
    """

    name: ClassVar[str] = "bit mask"

    def apply(self, view: JointView) -> Sequence[Site]:
        """Packs every mask with a reader in backward."""
        storage, late = storage_map(view.graph), depends_on_tangents(view)
        # What inputs alone give is made again for next to nothing; draws never are.
        computed = depending_on(view.graph, (i.node for i in view.inputs_of("parameter")))

        def is_read(mask: fx.Node) -> bool:
            return mask in computed and any(u in late for u in readers_of(mask, storage.role))

        masks = [
            node
            for node in view.graph.nodes
            if storage.role[node] is Role.COMPUTE
            and node not in late
            and _is_mask(node)
            and (is_random(node) or is_read(node))
        ]
        return [Site(_let_all_read_bits(view.graph, mask), self.name) for mask in masks]


@dataclass(frozen=True)
class ReluSign(Rewrite):
    """ReLU's backward reads one bit an element where nothing else keeps its output.

    Before: y -> threshold_backward(g, y, t).  After: y <= t -> bits -> mask -> g where not mask.
    """

    name: ClassVar[str] = "relu sign"

    def apply(self, view: JointView) -> Sequence[Site | ShareRefusal]:
        """Rewrites every ReLU whose output no other node of the backward pass reads."""
        graph, late = view.graph, depends_on_tangents(view)
        storage = storage_map(graph)
        sites: list[Site | ShareRefusal] = []
        for node in graph.find_nodes(op="call_function", target=aten.threshold_backward.default):
            gradient, output, threshold = node.args
            y = storage.base[output]
            others = [u for u in readers_of(y, storage.role) if u in late and u is not node]
            whole = y.meta["val"].shape == output.meta["val"].shape
            if y in late or y.op == "placeholder" or not whole:
                continue
            if others:
                sites.append(ShareRefusal(y.name, self.name, f"{others[0].name} needs it as it is"))
                continue
            with graph.inserting_after(y):  # in forward, where the argument may not be
                dead = insert(graph, aten.le.Scalar, y, threshold)
            bits = _packed(graph, dead)
            mask = _unpacked(graph, bits, dead, before=node)
            node.target, node.args = aten.masked_fill.Scalar, (gradient, mask, 0)
            sites.append(Site((y.name, dead.name, bits.name, mask.name), self.name))
        return sites


def _packed(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    with graph.inserting_after(mask):
        bits = insert(graph, torch.ops.graphopt.pack_bits.default, mask)
    bits.meta = {**mask.meta, "val": bits.meta["val"]}
    return bits


def _unpacked(graph: fx.Graph, bits: fx.Node, mask: fx.Node, *, before: fx.Node) -> fx.Node:
    with graph.inserting_before(before):
        sizes = sizes_of(graph, mask)
        unpacked = insert(graph, torch.ops.graphopt.unpack_bits.default, bits, sizes)
    unpacked.meta = {**mask.meta, "val": unpacked.meta["val"]}
    return unpacked


def _let_all_read_bits(graph: fx.Graph, mask: fx.Node) -> tuple[str, ...]:
    """All readers of a mask, forward too, so that what they compute can be computed again."""
    readers = [u for u in mask.users if u.op != "output" and not _is_size(u)]
    bits = _packed(graph, mask)
    unpacked = _unpacked(graph, bits, mask, before=bits.next)
    for reader in readers:
        reader.replace_input_with(mask, unpacked)
    return mask.name, bits.name, unpacked.name


def _is_mask(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.dtype is torch.bool


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta.get("val"), torch.Tensor)


def readers_of(node: fx.Node, roles: dict[fx.Node, Role]) -> list[fx.Node]:
    """Computations that read a value, through views too."""
    found, waiting = [], [node]
    while waiting:
        for user in waiting.pop().users:
            if roles.get(user) in (Role.VIEW, Role.PROJECTION):
                waiting.append(user)
            else:
                found.append(user)
    return found
