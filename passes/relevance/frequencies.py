"""Real values that are computed from real ones by way of complex numbers.

Complex numbers carry no relevance of their own.  What leads from real values through Fourier
transforms, filters and back is one map of these values; where it is homogeneous, Euler's theorem
says what each of them contributes: a filter is linear, a correlation of two signals is of degree
two.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from graphopt.passes.relevance import families
from graphopt.passes.relevance.families import Family

_LINEAR = frozenset(
    {
        "view_as_complex", "view_as_real", "complex", "real", "imag", "abs", "conj", "_conj",
        "conj_physical", "resolve_conj", "neg", "mean", "sum", "stft", "istft",
    }
)  # fmt: skip
_PRODUCTS = families.MATRIX - {"addmm", "baddbmm", "addbmm", "linear"} | {"mul", "multiply"}
_QUOTIENTS = frozenset({"div", "divide", "true_divide"})
_ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})


def is_complex(value: Any) -> bool:
    """Whether a fake value is a complex tensor."""
    return isinstance(value, torch.Tensor) and value.is_complex()


def degree(nodes: Sequence[fx.Node], inside: Collection[fx.Node]) -> int | None:
    """The degree of homogeneity of a region in what it reads that carries relevance.

    Args:
        nodes: The calls in order; the last one gives the result.
        inside: The carrying values.

    Returns:
        At least 1; None where the region isn't homogeneous, or doesn't change with its size.
    """
    found: dict[fx.Node, int] = {}
    for node in nodes:
        read = {s: found.get(s, 1) for s in node.all_input_nodes if s in inside}
        mine = _degree(node, read)
        if mine is None or mine < 1:
            return None
        found[node] = mine
    return found[nodes[-1]]


def _degree(node: fx.Node, read: dict[fx.Node, int]) -> int | None:
    """The degree of one call, given those of what it reads that carries relevance."""
    name = families.op_name(node)
    if name == "einsum":
        return sum(read.get(a, 0) for a in pytree.tree_leaves(node.args[1]))
    if name in _PRODUCTS:
        return sum(read[a] for a in node.args[:2] if isinstance(a, fx.Node) and a in read)
    if name in _QUOTIENTS:
        above, below = (read.get(a, 0) if isinstance(a, fx.Node) else 0 for a in node.args[:2])
        return above - below
    if len({*read.values()}) != 1:
        return None
    (same,) = {*read.values()}
    if name in ("add", "sub"):
        return same if all(a in read for a in node.args[:2]) else None
    spec = families.spec_of(node)
    if spec is not None and spec.family is Family.ROUTE:
        return same if _fills_zeros(node, spec, read) else None
    return same if "fft" in name or name in _LINEAR else None


def _fills_zeros(node: fx.Node, spec: families.Spec, read: dict[fx.Node, int]) -> bool:
    """Whether all that a call moves besides data is zero."""
    moved = pytree.tree_leaves([node.args[p] for p in spec.data if p < len(node.args)])
    return all(each in read or _is_zero(each) for each in moved)


def _is_zero(value: Any) -> bool:
    while isinstance(value, fx.Node) and value.op == "call_function":
        if families.op_name(value) in _ZEROS:
            return True
        spec = families.spec_of(value)
        if spec is None or spec.family is not Family.ROUTE or len(spec.data) > 1:
            return False
        value = value.args[0]
    return not isinstance(value, fx.Node) and value == 0
