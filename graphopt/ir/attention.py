"""Attention as ATen's one op, and written out in the ops that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.graphs import copy_place
from graphopt.ir.mode import ModeSwitch

aten = torch.ops.aten

Call = Callable[..., fx.Node]


@dataclass(frozen=True)
class Attention:
    """Arguments of a call of ``scaled_dot_product_attention``.

    Attributes:
        query: ``[..., heads, length, width]``.
        key: ``[..., heads, keys, width]``.
        value: ``[..., heads, keys, width of values]``.
        mask: Added to the scores where it is floating, else true where a key counts; or None.
        rate: Of the dropout on probabilities.
        causal: Whether a query sees no key behind its own place.
        scale: Of the scores.
        repeats: How many heads of queries share one of keys and values.
        switch: The rates in training and in eval mode, or None where they don't differ.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    rate: float
    causal: bool
    scale: float
    repeats: int
    switch: ModeSwitch | None


@dataclass(frozen=True)
class WrittenOut:
    """Nodes of an attention's parts.

    Attributes:
        scaled: The query times the scale.
        scores: Products of queries and keys.
        additive: What is added to the scores, or None.
        factor: One where a key counts, else zero, in the type of the scores; or None.
    """

    scaled: fx.Node
    scores: fx.Node
    additive: fx.Node | None
    factor: fx.Node | None


def is_attention(node: fx.Node) -> bool:
    """Whether a node calls the one op."""
    return getattr(node.target, "overloadpacket", None) is aten.scaled_dot_product_attention


_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
_DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None}
_RATES = ("args.4", "kwargs.dropout_p")


def read_attention(node: fx.Node) -> Attention | str:
    """The arguments of a call, or why it can't be written out."""
    given: dict[str, Any] = {**_DEFAULTS, **dict(zip(_NAMES, node.args, strict=False))}
    given |= node.kwargs
    query, key, value = (given[name] for name in _NAMES[:3])
    width, scale = query.meta["val"].shape[-1], given["scale"]
    switch = node.meta.get("mode")
    if switch is not None and any(place not in _RATES for place in switch.values):
        return "more than its dropout depends on the mode"
    if scale is None and not isinstance(width, int):
        return "its width is free"
    scale = width**-0.5 if scale is None else scale
    if not isinstance(scale, (int, float)) or isinstance(given["dropout_p"], fx.Node):
        return "its scale or its rate of dropout is computed"
    repeats = 1
    if given.get("enable_gqa"):
        heads = [n.meta["val"].shape[-3] for n in (query, key, value)]
        if not all(isinstance(h, int) for h in heads) or heads[1] != heads[2]:
            return "its grouped heads are of free or different numbers"
        repeats = heads[0] // heads[1]
    return Attention(
        query, key, value, given["attn_mask"], float(given["dropout_p"]),
        bool(given["is_causal"]), float(scale), repeats, switch,
    )  # fmt: skip


def caller(graph: fx.Graph, node: fx.Node) -> Call:
    """A function that adds calls which tell the line and module of a node as theirs."""

    def add(target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        made = graph.call_function(target, args, kwargs)
        copy_place(made, node)
        return made

    return add


def write_scores(add: Call, attention: Attention) -> WrittenOut:
    """Add the nodes up to the softmax.

    Args:
        add: Adds calls, as `caller` gives it.
        attention: The arguments.
    """
    scaled = add(aten.mul.Tensor, attention.query, attention.scale)
    key = _repeated(add, attention.key, attention.repeats)
    scores = add(aten.matmul.default, scaled, add(aten.transpose.int, key, -2, -1))
    mask = attention.mask
    if attention.causal:
        sizes = [add(aten.sym_size.int, n, -2) for n in (attention.query, key)]
        return WrittenOut(
            scaled, scores, None,
            add(aten.tril.default, add(aten.new_ones.default, attention.query, sizes)),
        )  # fmt: skip
    if mask is None:
        return WrittenOut(scaled, scores, None, None)
    if mask.meta["val"].dtype is torch.bool:
        return WrittenOut(scaled, scores, None, add(aten.type_as.default, mask, scores))
    return WrittenOut(scaled, scores, mask, None)


def write_result(add: Call, attention: Attention, probabilities: fx.Node) -> fx.Node:
    """Add the nodes behind the softmax: dropout, and the product with the values."""
    if attention.rate or attention.switch is not None:
        probabilities = add(aten.dropout.default, probabilities, attention.rate, True)
        if attention.switch is not None:
            (rates,) = attention.switch.values.values()
            off = rates[0] and not rates[1]
            values = {"args.2": (True, False)} if off else {"args.1": rates}
            probabilities.meta["mode"] = ModeSwitch(attention.switch.owner, values)
    value = _repeated(add, attention.value, attention.repeats)
    return add(aten.matmul.default, probabilities, value)


def _repeated(add: Call, heads: fx.Node, times: int) -> fx.Node:
    if times == 1:
        return heads
    return add(aten.repeat_interleave.self_int, heads, times, -3)
