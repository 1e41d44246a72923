"""Batch norms that are a part of the layer in front of them.

In eval mode ``norm(W x + b)`` is one affine map.  Rules that look at the signs or sizes of weights
have to see its weights, or relevance would depend on whether a model was exported with its norms
folded.  Nothing is rewritten: such a layer's rule scales weights and bias when it runs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import fx

from graphopt.passes.relevance.families import Family
from graphopt.passes.relevance.ops import Op
from graphopt.passes.relevance.rules import DetachedNorm, Folded, Rule

_BATCH_NORMS = {
    "batch_norm": 5,
    "native_batch_norm": 5,
    "_native_batch_norm_legit_no_training": None,
}
"""Batch norms, and the place of the argument that says whether the batch's statistics count."""

_DENSE = frozenset({"linear", "addmm", "mm", "matmul"})


def folded(
    ops: Mapping[fx.Node, Op], rules: Mapping[Op, Rule], kept: Collection[fx.Node]
) -> tuple[dict[Op, Op], dict[Op, Rule]]:
    """Find batch norms that layers in front of them take in.

    Args:
        ops: The operations by their results.
        rules: The rule of each.
        kept: Values whose own relevance is wanted.

    Returns:
        Layer -> its batch norm, and the rules with those of such norms replaced.
    """
    found: dict[Op, Op] = {}
    for norm in ops.values():
        layer = _layer(norm, ops)
        if (
            layer is not None
            and layer.node not in kept
            and rules[layer].folds
            and isinstance(rules[norm], DetachedNorm)
        ):
            found[layer] = norm
    return found, {**rules, **{norm: Folded() for norm in found.values()}}


def _layer(norm: Op, ops: Mapping[fx.Node, Op]) -> Op | None:
    """The layer that feeds a batch norm and nothing else, or None."""
    if norm.is_region or norm.name not in _BATCH_NORMS or norm.argument(3) is None:
        return None
    training = _BATCH_NORMS[norm.name]
    if (training is not None and norm.argument(training)) or norm.node.args[0] not in norm.operands:
        return None
    layer = ops.get(norm.operands[0])
    if layer is None or len(norm.operands) > 1 or layer.is_region or len(layer.operands) > 1:
        return None
    alone = set(layer.node.users) == {norm.node}
    return layer if alone and _has_channels_in_front(layer) else None


def _has_channels_in_front(layer: Op) -> bool:
    """Whether the channels that the layer makes are dimension 1, as a batch norm takes them."""
    ndim = layer.node.meta["val"].ndim
    if layer.family is Family.CONV:
        weight: fx.Node = layer.node.args[1]  # type: ignore[assignment]
        return ndim == weight.meta["val"].ndim
    is_last = layer.argument(layer.spec.data[0]) in layer.operands
    return layer.family is Family.LINEAR and layer.name in _DENSE and ndim == 2 and is_last
