"""Rules of ops that only move data: which place goes where is found by running the op on places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from graphopt.errors import UnsupportedError
from graphopt.private.builder import Builder, Ids, Plain, Shared, Value
from graphopt.private.rules import aten, rule

_MOVING = (
    aten.view, aten.view_as, aten.reshape, aten.reshape_as, aten.broadcast_to, aten.ravel,
    aten._unsafe_view, aten.flatten, aten.unflatten, aten.permute,
    aten.transpose, aten.t, aten.movedim, aten.squeeze, aten.unsqueeze, aten.expand,
    aten.expand_as, aten.select, aten.slice, aten.narrow, aten.index_select, aten.gather,
    aten.index.Tensor, aten.take, aten.take_along_dim, aten.cat, aten.stack, aten.flip, aten.roll,
    aten.repeat, aten.tile, aten.repeat_interleave, aten.split, aten.split_with_sizes, aten.chunk,
    aten.unbind, aten.tensor_split, aten.index_copy, aten.scatter.src, aten.slice_scatter,
    aten.select_scatter, aten.tril, aten.triu, aten.pixel_shuffle, aten.pixel_unshuffle,
    aten.channel_shuffle, aten.upsample_nearest2d, aten.diagonal, aten.numpy_T, aten.mT,
    aten.swapaxes, aten.unfold, aten.im2col, aten.reflection_pad2d, aten.replication_pad2d,
)  # fmt: skip

_SAME = (
    aten.clone, aten.contiguous, aten.detach, aten.detach_, aten.alias, aten._to_copy, aten.to,
    aten.lift_fresh_copy,
)  # fmt: skip


def _moving(target: Any) -> Any:
    def move(b: Builder, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if _is_data(leaf)]

        def run(*places: torch.Tensor) -> Any:
            given = [leaf.tensor if isinstance(leaf, Plain) else leaf for leaf in leaves]
            for i, place in zip(where, places, strict=True):
                given[i] = place
            positional, keywords = pytree.tree_unflatten(given, spec)
            result = target(*positional, **keywords)
            return (result,) if isinstance(result, torch.Tensor) else result

        results = b.moves(run, [leaves[i] for i in where], whole=False)
        return results[0] if target._schema.returns[0].type.kind() == "TensorType" else results

    return move


def _is_data(leaf: Any) -> bool:
    if isinstance(leaf, Plain):
        return leaf.tensor.is_floating_point()
    return isinstance(leaf, Shared)


def _register() -> None:
    for known in _MOVING:
        if isinstance(known, torch._ops.OpOverload):
            rule(known)(_moving(known))
        else:
            for name in known.overloads():
                overload = getattr(known, name)
                rule(overload)(_moving(overload))


_register()


@rule(*_SAME)
def _same(b: Builder, x: Value, *args: Any, **kwargs: Any) -> Value:
    return x


@rule(aten.type_as)
def _type_as(b: Builder, x: Value, other: Value) -> Value:
    if isinstance(x, Plain) and isinstance(other, Shared):
        return Plain(x.tensor.double(), x.secret)
    return x


@rule(aten.embedding)
def _embedding(b: Builder, weight: Value, ids: Ids, *options: Any) -> Value:
    return b.matmul(b.one_hot(ids, weight.shape[0]), weight)


@rule(aten.dropout, aten.dropout_, aten.feature_dropout, aten.alpha_dropout)
def _dropout(b: Builder, x: Value, p: float, train: bool) -> Value:
    if train and p:
        raise UnsupportedError("dropout in training mode", hint="use eval mode")
    return x


@rule(aten.constant_pad_nd, aten.pad)
def _pad(
    b: Builder, x: Value, pad: Sequence[int], mode: Any = "constant", value: float | None = 0.0
) -> Value:
    if not isinstance(mode, str):
        mode, value = "constant", mode
    if mode == "constant" and value:
        raise UnsupportedError(f"padding with {value}")
    return b.move(lambda t: torch.nn.functional.pad(t, list(pad), mode), [x], whole=False)


@rule(aten.index_put)
def _index_put(b: Builder, x: Value, indices: Any, values: Value, accumulate: bool = False) -> Any:
    places = [None if i is None else i.tensor for i in indices]

    def put(base: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten.index_put(base, places, new)

    return _placed(b, put, x, values, accumulate)


@rule(aten.index_add)
def _index_add(
    b: Builder, x: Value, dim: int, index: Plain, source: Value, *, alpha: float = 1
) -> Any:
    source = source if alpha == 1 else b.multiply(source, alpha)
    return _placed(b, lambda t, s: t.index_copy(dim, index.tensor, s), x, source, True)


@rule(aten.scatter_add)
def _scatter_add(b: Builder, x: Value, dim: int, index: Plain, source: Value) -> Any:
    return _placed(b, lambda t, s: t.scatter(dim, index.tensor, s), x, source, True)


def _placed(b: Builder, put: Any, x: Value, values: Value, accumulate: bool) -> Any:
    """What lands at places that are written once; added there or put."""
    if not accumulate:
        return b.move(put, [x, values], whole=False)
    written = put(torch.zeros(x.shape), torch.ones(values.shape))
    if int(written.sum()) != torch.ones(values.shape).numel():
        raise UnsupportedError("adding several elements to the same place")
    blank = Plain(torch.zeros(x.shape, dtype=torch.float64))
    return b.add(x, b.move(put, [blank, values], whole=False))


TAKES_IDS = frozenset({aten.embedding, aten.clone, aten.detach, aten.alias, aten.dropout})
"""Ops that may be given secret integers."""

SHAPE_ONLY = frozenset(
    {
        aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones,
        aten.new_full, aten.empty_like, aten.new_empty, aten.sym_size, aten.sym_numel,
    }
)  # fmt: skip
"""Ops that read no element of their tensors: they run in the clear on stand-ins of that shape."""
