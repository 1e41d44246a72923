"""Input-dependent parameters of state space models, found by what is done with them.

Mamba computes B, C and the step size by a linear layer from the very value ``u`` that the scan
multiplies them with: ``h = exp(dt A) h + dt B u``, ``y = C h``.  They select; ``u`` is the value
(Jafari et al. 2024, MambaLRP).  A layer makes such parameters if all that becomes of its result
ends as factors of things that are made from the layer's own input without weights.  The gate of
a SwiGLU is none: its partner comes from the same input, but through weights of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping

from torch import fx

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op

_SHAPED = (Family.ROUTE, Family.SCALE, Family.ACTIVATION, Family.LINEAR, Family.NORM)
_CARRIED = (Family.ROUTE, Family.SCALE, Family.ADD, Family.REDUCE)


def selections(ops: Mapping[fx.Node, Op]) -> set[tuple[Op, fx.Node]]:
    """Products with such a factor, and the factor.

    Args:
        ops: The operations by their results, in order.
    """
    order = {node: index for index, node in enumerate(ops)}
    found: set[tuple[Op, fx.Node]] = set()
    for op in ops.values():
        if op.family is Family.LINEAR and not op.is_region:
            found |= _of(op, ops, order)
    return found


def _of(
    layer: Op, ops: Mapping[fx.Node, Op], order: Mapping[fx.Node, int]
) -> set[tuple[Op, fx.Node]]:
    """What one layer's result selects, or nothing."""
    root = _root(layer.operands[0], ops)
    made, values = {layer.node}, {root}
    met: set[tuple[Op, fx.Node]] = set()
    users = _users(layer.node, ops) | _users(root, ops)
    queue = [order[u] for u in users]
    heapq.heapify(queue)
    nodes = list(order)
    last = -1
    while queue:
        index = heapq.heappop(queue)
        if index == last or nodes[index] is layer.node:
            continue
        last, node = index, nodes[index]
        op = ops[node]
        ours = [o for o in op.operands if o in made]
        theirs = [o for o in op.operands if o in values]
        if ours and not _is_shaped(op, ours):
            if op.family is Family.ADD and theirs and all(_scales(o, ops) for o in ours):
                values.add(node)  # dt A times a first state that is a constant
            elif op.family is not Family.PRODUCT or len(ours) != 1 or not theirs:
                return set()
            else:
                met.add((op, ours[0]))
                values.add(node)
        elif ours:
            made.add(node)
        elif len(theirs) == len(op.operands) and op.family in _CARRIED:
            values.add(node)
        else:
            continue
        for user in _users(node, ops):
            heapq.heappush(queue, order[user])
    # what nothing else reads, such as the last state of a scan, is no use of it
    several = len({op for op, _ in met}) > 1  # x * (W x) alone is a product as any other
    return met if several and all(_users(n, ops) for n in made) else set()


def _is_shaped(op: Op, ours: list[fx.Node]) -> bool:
    """Whether an operation makes a parameter of parameters alone."""
    family = op.family in _SHAPED or op.family in (Family.PRODUCT, Family.ADD)
    return family and len(ours) == len(op.operands)


def _scales(node: fx.Node, ops: Mapping[fx.Node, Op]) -> bool:
    op = ops.get(node)
    return op is not None and op.family is Family.SCALE


def _root(node: fx.Node, ops: Mapping[fx.Node, Op]) -> fx.Node:
    """The value that a value is a view or a copy of."""
    while True:
        op = ops.get(node)
        if op is None or op.family not in (Family.ROUTE, Family.SCALE) or len(op.operands) != 1:
            return node
        if op.name in ("getitem", "split", "split_with_sizes", "chunk", "slice"):
            return node
        node = op.operands[0]


def _users(node: fx.Node, ops: Mapping[fx.Node, Op]) -> set[fx.Node]:
    """Results of the operations that read a value."""
    return {u for u in node.users if u in ops and node in ops[u].operands}
