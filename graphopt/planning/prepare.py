"""Makes a joint graph plannable: nothing in it forbids running a node again without need."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from graphopt.ir.dropout import split_dropout
from graphopt.ir.joint import JointInput, JointView
from graphopt.ir.ops import recomputed_form

aten = torch.ops.aten


def prepare(view: JointView) -> dict[JointInput, fx.Node]:
    """Rewrites the (derived, throw-away) joint graph in place.

    * Metadata asserts go.
    * The backward of a training BatchNorm does not read running statistics: its arguments go, so
      that new statistics are needed by nobody but their commit.
    * ReLU becomes the clamp that it is computed as: that can write over its argument.
    * Dropout becomes a mask and a product.
    * oneDNN's RNN layers run in training mode where a backward pass follows.
    * Where a mutated operand is read in the backward pass, a copy taken in forward is read.

    Args:
        view: The joint view.

    Returns:
        Mutated operand -> the node of its new value.
    """
    _drop_asserts(view.graph)
    _free_batch_norm_backward(view.graph)
    split_dropout(view.graph)
    _clamp_for_relu(view.graph)
    _keep_rnn_workspace(view.graph)
    committed = {
        output.of: output.node
        for output in view.outputs_of("mutation")
        if isinstance(output.of, JointInput) and output.node is not None
    }
    late = depends_on_tangents(view)
    for operand in committed:
        _snapshot(view.graph, operand.node, late)
    return committed


def depends_on_tangents(view: JointView) -> set[fx.Node]:
    """Nodes of the backward pass proper."""
    return depending_on(view.graph, (i.node for i in view.inputs_of("tangent")))


def depending_on(graph: fx.Graph, roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The roots, and all nodes that are computed from one of them."""
    found = set(roots)
    for node in graph.nodes:
        if any(argument in found for argument in node.all_input_nodes):
            found.add(node)
    return found


def _drop_asserts(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten._assert_tensor_metadata.default):
        graph.erase_node(node)


def _free_batch_norm_backward(graph: fx.Graph) -> None:
    for node in graph.find_nodes(
        op="call_function", target=aten.native_batch_norm_backward.default
    ):
        if node.args[7] is True:
            node.args = (*node.args[:3], None, None, *node.args[5:])


def _clamp_for_relu(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.clamp_min.default
        node.args = (node.args[0], 0)


def _keep_rnn_workspace(graph: fx.Graph) -> None:
    """An RNN of oneDNN is traced in inference mode, but backward needs what training keeps."""
    op = getattr(aten, "mkldnn_rnn_layer", None)
    if op is None:
        return
    for node in graph.find_nodes(op="call_function", target=op.default):
        if any(user.args[1] == 3 and user.users for user in node.users):
            node.args = (*node.args[:15], True)


def _snapshot(graph: fx.Graph, operand: fx.Node, late: set[fx.Node]) -> None:
    """Backward readers of an operand that forward writes to get a copy of the old value."""
    readers = [user for user in operand.users if user in late and user.op != "output"]
    if not readers:
        return
    last_input = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last_input):
        copy = graph.call_function(aten.clone.default, (operand,))
    copy.meta = {"val": operand.meta["val"]}
    for reader in readers:
        reader.replace_input_with(operand, copy)


def reads_replaced_operand(node: fx.Node, mutated: set[fx.Node], storage_base: dict) -> bool:
    """Whether running `node` again would see an operand's new value instead of its old one."""
    form = recomputed_form(node)
    arguments = (
        node.all_input_nodes if form is None else [a for a in form.args if isinstance(a, fx.Node)]
    )
    return any(storage_base[a] in mutated for a in arguments)
