"""Values that backward reads, kept in eight or four bits an element."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.ir.joint import JointView
from graphopt.ir.ops import is_memory_bound, is_repeatable, recomputed_form
from graphopt.ir.storage import Role, StorageMap, storage_map
from graphopt.passes.share.quantise import memory_order
from graphopt.planning.prepare import depends_on_tangents, reads_replaced_operand
from graphopt.planning.rewrites import Rewrite, Site, insert, sizes_of


@dataclass(frozen=True)
class QuantisedOperand(Rewrite):
    """Backward reads a value, and all that it would make again from it, from a few bits.

    Before: x -> y -> backward, x -> backward.
    After: x -> codes -> x' -> backward, x' -> y' -> backward. The forward pass is as it was, and
    so are integers and masks. Values are floating and dense in memory.

    Attributes:
        sites: Name of the value's node and bits an element.
        kept: Names of all values that are kept: what backward reads besides is made again.
    """

    name: ClassVar[str] = "few bits"

    sites: tuple[tuple[str, int], ...] = ()
    kept: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", tuple((name, bits) for name, bits in self.sites))
        object.__setattr__(self, "kept", tuple(self.kept))

    def apply(self, view: JointView) -> Sequence[Site]:
        """Rewrites its sites."""
        nodes = {node.name: node for node in view.graph.nodes}
        sites = {nodes[name]: bits for name, bits in self.sites}
        kept = {nodes[name] for name in self.kept if name in nodes}  # steps leave some out
        return _Rerouted(view, kept, sites).sites()


class _Rerouted:
    """Makes what backward reads again from the quantised values."""

    def __init__(self, view: JointView, kept: set[fx.Node], bits: dict[fx.Node, int]) -> None:
        self.view, self.graph, self.kept, self.bits = view, view.graph, kept, bits
        self.late = depends_on_tangents(view)
        self.storage: StorageMap = storage_map(view.graph)
        self.written = view.written
        self.rerouted: dict[fx.Node, bool] = dict.fromkeys(bits, True)
        self.again: dict[fx.Node, fx.Node] = {}
        self.packed: dict[fx.Node, fx.Node] = {}

    def sites(self) -> list[Site]:
        """Rewrites every reader in the backward pass."""
        readers = [n for n in self.graph.nodes if n in self.late and n.op == "call_function"]
        for reader in readers:
            with self.graph.inserting_before(reader):
                for argument in reader.all_input_nodes:
                    if self._is_rerouted(argument):
                        reader.replace_input_with(argument, self._again(argument))
        return [
            Site((node.name, self.packed[node].name, self.again[node].name), f"{bits} bits")
            for node, bits in self.bits.items()
            if node in self.packed
        ]

    def _is_rerouted(self, node: fx.Node) -> bool:
        """Whether it is a quantised value, or made again from one."""
        if node not in self.rerouted:
            self.rerouted[node] = self._is_made_again(node) and any(
                self._is_rerouted(argument) for argument in node.all_input_nodes
            )
        return self.rerouted[node]

    def _is_made_again(self, node: fx.Node) -> bool:
        if node in self.late or node in self.kept or node.op != "call_function":
            return False
        if not _is_floating(node.meta.get("val")):
            return False  # an index or a mask from rounded values would be another one
        if self.storage.role[node] is Role.COMPUTE and not is_memory_bound(node):
            return False
        return is_repeatable(node) and not reads_replaced_operand(
            node, self.written, self.storage.base
        )

    def _again(self, node: fx.Node) -> fx.Node:
        if node not in self.again:
            if node in self.bits:
                self.again[node] = self._dequantised(node)
            else:
                self.again[node] = self._copied(node)
        return self.again[node]

    def _copied(self, node: fx.Node) -> fx.Node:
        """The same op on what is made again."""
        form = recomputed_form(node)
        target, args, kwargs = node.target, node.args, node.kwargs
        if form is not None:
            target, args, kwargs = form.target, form.args, {}
        changed = {a: self._again(a) for a in node.all_input_nodes if self._is_rerouted(a)}
        args, kwargs = fx.map_arg((args, kwargs), lambda n: changed.get(n, n))
        copy = self.graph.call_function(target, args, kwargs)  # type: ignore[arg-type]
        copy.meta = dict(node.meta)
        if form is not None:
            copy.meta["val"] = tuple(node.meta["val"][: len(form.results)])
        return copy

    def _dequantised(self, node: fx.Node) -> fx.Node:
        ops: Any = torch.ops.graphopt
        value, bits = node.meta["val"], self.bits[node]
        order = memory_order(value)
        assert order is not None, "only dense values are sites"
        with self.graph.inserting_after(node):
            packed = insert(self.graph, ops.quantise.default, node, bits, order)
        packed.meta = {**node.meta, "val": packed.meta["val"]}
        self.packed[node] = packed
        sizes = sizes_of(self.graph, node)
        return insert(self.graph, ops.dequantise.default, packed, bits, order, sizes, value.dtype)


def _is_floating(value: Any) -> bool:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return all(isinstance(part, torch.Tensor) and part.is_floating_point() for part in parts)
