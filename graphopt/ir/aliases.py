"""Who may share memory with whom in a pre-dispatch graph, which isn't functional.

`graphopt.ir.storage` reads functional graphs, where a schema says it all.  Before dispatch there
are in-place ops, and composite ops whose schema promises nothing: `dropout` returns its input in
eval mode, `reshape` copies or not, `type_as` may return its input.  So this file answers two
questions: what *may* share memory (then a write is seen there, perhaps), and what is *surely* a
view (then it can be derived anew from a new base).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.ir.sharing import opname, shared_arguments

aten = torch.ops.aten

# Composite ops without alias annotations that always give fresh memory.
_FRESH_COMPOSITES = frozenset(
    "linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d batch_norm "
    "layer_norm rms_norm group_norm instance_norm matmul softmax log_softmax lstm gru rnn_tanh "
    "rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell max_pool1d max_pool2d max_pool3d "
    "max_pool1d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "avg_pool1d cross_entropy_loss nll_loss nll_loss_nd bilinear scaled_dot_product_attention "
    "embedding_bag outer inner dot tensordot kron cosine_similarity pairwise_distance one_hot "
    "binary_cross_entropy_with_logits l1_loss mse_loss huber_loss silu mish selu relu6 "
    "leaky_relu hardswish logsumexp std var cumsum square where pad gather take_along_dim "
    "argsort hstack vstack dstack isfinite".split()
)
# Composite ops with alias annotations that are views on any input.
_SURE_COMPOSITES = frozenset(
    "chunk narrow movedim moveaxis expand_as view_as unflatten swapaxes swapdims mT mH "
    "numpy_T matrix_H adjoint squeeze unsqueeze select tensor_split".split()
)
# Ops whose results share memory with the input but not with each other.
_DISJOINT = frozenset("split split_with_sizes chunk unbind tensor_split".split())


def writes(node: fx.Node) -> list[fx.Node]:
    """Nodes whose memory ``node`` changes, sub-graphs of higher-order ops included."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if not target._schema.is_mutable:
            return []
        return [
            leaf
            for argument, value in _bound(node)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in _nodes(value)
        ]
    if isinstance(target, torch._ops.HigherOrderOperator):
        return _written_by_subgraphs(node)
    return []


def writes_to_values(graph: fx.Graph) -> bool:
    """Whether a call writes to what another one computed, or to an input."""
    return any(written.op != "get_attr" for node in graph.nodes for written in writes(node))


def is_written(node: fx.Node) -> bool:
    """Whether a call may write to the memory of a node, itself or a view of it."""
    return any(each in writes(user) for each in affected(node) for user in each.users)


def shares(node: fx.Node) -> list[fx.Node]:
    """Inputs with which the result of ``node`` may share memory."""
    target = node.target
    if node.op != "call_function":
        return []
    if target is operator.getitem:
        return _nodes(node.args[0])
    if isinstance(target, torch._ops.HigherOrderOperator):
        return [n for n in node.all_input_nodes if _is_tensor(n)]
    if not isinstance(target, torch._ops.OpOverload):
        return []
    annotated = _annotated(node)
    if annotated:
        return annotated
    loose = _is_composite(target) and opname(target) not in _FRESH_COMPOSITES
    return [n for n in node.all_input_nodes if _is_tensor(n)] if loose else []


def is_sure_view(node: fx.Node) -> bool:
    """Whether the result shares the memory of its first input for inputs of any size."""
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and is_sure_view(source)
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    if not _annotated(node):
        return False
    return not _is_composite(target) or opname(target) in _SURE_COMPOSITES


def affected(node: fx.Node) -> Iterator[fx.Node]:
    """All nodes whose value may change when the memory of ``node`` is written, itself first.

    Parts of one `split` don't overlap, so writing one leaves the others alone.
    """
    seen = {node}
    yield node
    queue: list[tuple[fx.Node, fx.Node | None]] = [(node, None)]
    while queue:
        current, below = queue.pop()
        for neighbour in _neighbours(current, below):
            if neighbour not in seen:
                seen.add(neighbour)
                yield neighbour
                came_up = neighbour in shares(current)
                queue.append((neighbour, current if came_up else None))


def _neighbours(node: fx.Node, below: fx.Node | None) -> list[fx.Node]:
    """Sharing inputs and users; coming up from one part of a split, not its other parts."""
    up = shares(node)
    down = [user for user in node.users if node in shares(user)]
    parts = isinstance(node.target, torch._ops.OpOverload) and opname(node.target) in _DISJOINT
    if parts and below is not None:
        index = below.args[1]
        down = [d for d in down if d.target is operator.getitem and d.args[1] == index]
    return [*up, *down]


def _annotated(node: fx.Node) -> list[fx.Node]:
    """Inputs that the table of `graphopt.ir.sharing` ties to a result."""
    target: Any = node.target
    shared = shared_arguments(target)
    return [leaf for a, value in _bound(node) if a.name in shared for leaf in _nodes(value)]


def _bound(node: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Schema arguments with the values that the node passes."""
    target: Any = node.target
    for position, argument in enumerate(target._schema.arguments):
        if position < len(node.args):
            yield argument, node.args[position]
        elif argument.name in node.kwargs:
            yield argument, node.kwargs[argument.name]


def _written_by_subgraphs(node: fx.Node) -> list[fx.Node]:
    written: list[fx.Node] = []
    bodies = [a for a in node.args if isinstance(a, fx.Node) and subgraph(a) is not None]
    operands = [n for a in node.args if a not in bodies for n in _nodes(a)]
    for body in bodies:
        graph_module = subgraph(body)
        assert graph_module is not None
        inputs = graph_module.graph.find_nodes(op="placeholder")
        for inner in graph_module.graph.nodes:
            for base in (b for w in writes(inner) for b in affected(w)):
                if base in inputs and len(inputs) == len(operands):
                    written.append(operands[inputs.index(base)])
                elif base.op == "placeholder":
                    written += operands
    return written


def subgraph(node: fx.Node) -> fx.GraphModule | None:
    """The graph module that a ``get_attr`` node fetches, or None."""
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return None
    value: Any = owner
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, fx.GraphModule) else None


def _is_composite(target: torch._ops.OpOverload) -> bool:
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    try:
        return target.has_kernel_for_dispatch_key(key)
    except RuntimeError:  # an op that TorchScript alone knows: nothing is known about it here
        return True


def _nodes(value: Any) -> list[fx.Node]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]


def _is_tensor(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)
