"""Activations whose backward reads a code of two bits instead of the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from graphopt.ir.joint import JointView
from graphopt.ir.ops import is_memory_bound
from graphopt.ir.storage import StorageMap, storage_map
from graphopt.passes.share.masks import readers_of
from graphopt.passes.share.packing import pack_codes, unpack_levels
from graphopt.planning.prepare import depends_on_tangents
from graphopt.planning.rewrites import Rewrite, Site, insert, sizes_of
from graphopt.report import ShareRefusal

aten = torch.ops.aten

_LIBRARY = torch.library.Library("graphopt", "FRAGMENT")
for _schema in (
    "pack_steps(Tensor x, float[] thresholds) -> Tensor",
    "unpack_steps(Tensor packed, float[] levels, SymInt[] size, ScalarType dtype) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pointwise,))  # bound by memory: may run again

# Backward ops that multiply a gradient by a function of one input, which they take second.
_ACTIVATIONS = {
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.mish_backward.default,
    aten.softplus_backward.default,
    aten.hardswish_backward.default,
    aten.hardtanh_backward.default,
}


def pack_steps(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Number of thresholds below each element, 0 to 3, four to a byte: ceil(n / 4) bytes."""
    codes = (x > thresholds[0]).view(torch.uint8)
    for threshold in thresholds[1:]:
        codes += (x > threshold).view(torch.uint8)
    return pack_codes(codes)


def unpack_steps(
    packed: Tensor, levels: Sequence[float], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The level of each element."""
    return unpack_levels(packed, torch.tensor(levels, dtype=dtype, device=packed.device), size)


def _fake_pack(x: Tensor, thresholds: Sequence[float]) -> Tensor:
    return x.new_empty(((x.numel() + 3) // 4,), dtype=torch.uint8)


def _fake_unpack(
    packed: Tensor, levels: Sequence[float], size: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return packed.new_empty(list(size), dtype=dtype)


for _op, _fake in ((pack_steps, _fake_pack), (unpack_steps, _fake_unpack)):
    _LIBRARY.impl(_op.__name__, _op, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{_op.__name__}", _fake, lib=_LIBRARY)


def candidates(view: JointView) -> list[fx.Node]:
    """Activation backwards whose input, and what the next ops make of it, no other one reads.

    Where the activation's output is needed as well (a trainable linear layer follows), keeping
    the input alone is less than keeping code and output.
    """
    return [node for node, reason in _activations(view) if reason is None]


def _activations(view: JointView) -> list[tuple[fx.Node, str | None]]:
    """All activation backwards, and what speaks against a code in place of their input."""
    late, storage = depends_on_tangents(view), storage_map(view.graph)
    return [
        (node, _against(node, storage, late))
        for node in view.graph.nodes
        if node.target in _ACTIVATIONS
    ]


def _against(node: fx.Node, storage: StorageMap, late: set[fx.Node]) -> str | None:
    u: Any = node.args[1]
    owner = storage.base[u]
    if u in late or owner.op == "placeholder":
        return "its input is not made by the forward pass"
    readers = readers_of(owner, storage.role)
    for reader in readers:
        if reader in late and reader is not node:
            return f"{reader.name} needs its input as it is"
    for act in readers:
        after = readers_of(act, storage.role) if act not in late and is_memory_bound(act) else ()
        for reader in after:
            if reader in late:
                return (
                    f"{reader.name} needs what is computed from its input: to keep the input alone "
                    "is less, and exact"
                )
    return None


@dataclass(frozen=True)
class StepDerivative(Rewrite):
    """Multiplies by a step function of an activation's input instead of by its derivative.

    Before: gelu_backward(g, u).  After: u -> code of 2 bits -> g * level of the code.

    Attributes:
        sites: Name of the backward op, thresholds, levels.
    """

    name: ClassVar[str] = "2-bit derivative"

    sites: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...] = ()

    def __post_init__(self) -> None:
        sites = tuple((name, tuple(t), tuple(s)) for name, t, s in self.sites)
        object.__setattr__(self, "sites", sites)

    def apply(self, view: JointView) -> Sequence[Site | ShareRefusal]:
        """Rewrites its sites."""
        steps = {name: (thresholds, levels) for name, thresholds, levels in self.sites}
        found: list[Site | ShareRefusal] = []
        for node, against in _activations(view):
            if against is None and node.name in steps:
                found.append(self._rewrite(view.graph, node, *steps[node.name]))
            else:
                reason = against or "other choices save more within the error that is granted"
                found.append(ShareRefusal(node.args[1].name, self.name, reason))  # type: ignore[union-attr]
        return found

    def _rewrite(
        self, graph: fx.Graph, node: fx.Node, thresholds: Sequence[float], levels: Sequence[float]
    ) -> Site:
        gradient, u = node.args[:2]
        assert isinstance(u, fx.Node)
        ops = torch.ops.graphopt
        with graph.inserting_after(u):
            code = insert(graph, ops.pack_steps.default, u, list(thresholds))
        code.meta = {**u.meta, "val": code.meta["val"]}
        with graph.inserting_before(node):
            slope = insert(
                graph, ops.unpack_steps.default, code, list(levels), sizes_of(graph, u),
                u.meta["val"].dtype,
            )  # fmt: skip
        node.target, node.args, node.kwargs = aten.mul.Tensor, (gradient, slope), {}
        return Site((u.name, code.name, slope.name), self.name)
