"""What backward ops take and don't read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphopt.ir.joint import JointView
from graphopt.ir.storage import storage_map
from graphopt.planning.prepare import depends_on_tangents
from graphopt.planning.rewrites import Rewrite, Site, insert, sizes_of, strides_of

aten = torch.ops.aten


def _always(_: fx.Node) -> bool:
    return True


def _no_weight_gradient(position: int) -> Callable[[fx.Node], bool]:
    """Whether the mask of wanted gradients leaves out that of the weight."""

    def holds(node: fx.Node) -> bool:
        mask: Any = node.args[position]
        return mask[1] is False

    return holds


# Backward op -> the argument of which only sizes count, and when.
_UNREAD: dict[Any, tuple[int, Callable[[fx.Node], bool]]] = {
    aten.max_pool2d_with_indices_backward.default: (1, _always),
    aten.max_pool3d_with_indices_backward.default: (1, _always),
    aten.avg_pool2d_backward.default: (1, _always),
    aten.avg_pool3d_backward.default: (1, _always),
    aten._adaptive_avg_pool2d_backward.default: (1, _always),
    aten._adaptive_avg_pool3d_backward.default: (1, _always),
    aten.convolution_backward.default: (1, _no_weight_gradient(10)),
    aten.native_batch_norm_backward.default: (
        1,
        lambda node: node.args[7] is False and _no_weight_gradient(9)(node),
    ),
}


@dataclass(frozen=True)
class UnreadOperand(Rewrite):
    """A backward op that only asks for the sizes of an activation gets a stand-in without memory.

    Pooling, convolution with a frozen weight, BatchNorm in eval mode with a frozen weight.

    Before: pool_backward(g, x).  After: pool_backward(g, zero.expand(sizes of x)).
    """

    name: ClassVar[str] = "unread operand"

    def apply(self, view: JointView) -> Sequence[Site]:
        """Replaces every such operand that is an activation."""
        late, sites = depends_on_tangents(view), []
        base = storage_map(view.graph).base
        for node in list(view.graph.nodes):
            position, unread = _UNREAD.get(node.target, (0, None))
            if unread is None or not unread(node):
                continue
            operand = node.args[position]
            owner = base[operand]
            if owner.op == "placeholder" or owner in late:
                continue
            with view.graph.inserting_before(node):
                stand_in = _stand_in(view.graph, node.args[0], operand)
            node.update_arg(position, stand_in)
            sites.append(Site((owner.name,), self.name))
        return sites


def _stand_in(graph: fx.Graph, gradient: fx.Node, operand: fx.Node) -> fx.Node:
    """A tensor of the operand's sizes and layout; one number, where the layout is the plain one."""
    value = operand.meta["val"]
    sizes = sizes_of(graph, operand)
    if value.is_contiguous():
        zero = insert(graph, aten.new_zeros.default, gradient, [], dtype=value.dtype)
        return insert(graph, aten.expand.default, zero, sizes)
    strides = strides_of(graph, operand)
    return insert(
        graph, aten.new_empty_strided.default, gradient, sizes, strides, dtype=value.dtype
    )
