"""Which family an operator belongs to, and what its arguments are to it.

A rule is chosen for a family, so this table is what relevance knows of ATen: an operator that isn't
in it is decomposed, and refused by name where that doesn't help.
"""

from __future__ import annotations

import difflib
import enum
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx


class Family(enum.StrEnum):
    """What an operator means to relevance."""

    LINEAR = "linear"  # a matrix product with constant weights, and a bias
    CONV = "conv"  # a convolution, transposed or not
    PRODUCT = "product"  # several data operands multiplied or divided, elementwise or as matrices
    ADD = "add"  # a signed sum of operands
    SCALE = "scale"  # data times a constant
    REDUCE = "reduce"  # sums and means over dimensions
    POOL = "pool"  # averages over windows, interpolation
    MAX = "max"  # the largest of several values
    ACTIVATION = "activation"  # elementwise functions of one value
    NORM = "norm"  # layer, group, batch, instance and RMS norms
    STATISTIC = "statistic"  # homogeneous functions of many values: norms, standard deviations
    SOFTMAX = "softmax"
    ATTENTION = "attention"  # the fused scaled dot product attention
    ROUTE = "route"  # values are moved, copied, selected or masked


@dataclass(frozen=True)
class Spec:
    """What is known of an operator.

    Attributes:
        family: Its family where only one operand carries relevance.
        data: Places of the operands that may carry relevance.
        weight: Place of the weight, or None.
        bias: Place of what is added, or None.
        degree: Of a homogeneous `Family.STATISTIC`.
    """

    family: Family
    data: tuple[int, ...] = (0,)
    weight: int | None = None
    bias: int | None = None
    degree: float = 1.0


_ROUTE = """
    view reshape _unsafe_view _reshape_alias view_as reshape_as transpose t numpy_T mT permute
    expand expand_as broadcast_to contiguous clone alias slice select squeeze unsqueeze
    flatten unflatten split split_with_sizes unsafe_split unsafe_chunk chunk unbind tensor_split
    narrow index_select gather take_along_dim roll flip rot90 repeat repeat_interleave tile pad
    constant_pad_nd reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
    replication_pad2d replication_pad3d pixel_shuffle pixel_unshuffle channel_shuffle unfold
    im2col movedim moveaxis swapaxes swapdims tril triu diagonal diag_embed type_as to _to_copy
    dropout feature_dropout alpha_dropout feature_alpha_dropout native_dropout
    topk sort upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d masked_select _unsafe_index real ravel
    index take adjoint squeeze_copy expand_copy view_copy permute_copy unsqueeze_copy
    slice_copy select_copy t_copy transpose_copy nan_to_num max_unpool2d max_unpool3d
"""
_ROUTE_MANY = {  # several operands are woven into one value
    "cat": (0,), "concat": (0,), "concatenate": (0,), "stack": (0,), "hstack": (0,),
    "vstack": (0,), "where": (1, 2), "masked_fill": (0, 2), "scatter": (0, 3),
    "slice_scatter": (0, 1), "select_scatter": (0, 1), "index_put": (0, 2),
    "_unsafe_index_put": (0, 2), "masked_scatter": (0, 2), "index_copy": (0, 3),
    "diagonal_scatter": (0, 1), "index_fill": (0,), "broadcast_tensors": (0,),
}  # fmt: skip
_ACTIVATION = """
    relu relu6 gelu silu elu selu celu leaky_relu rrelu prelu hardtanh hardswish hardsigmoid
    tanh sigmoid softplus mish exp exp2 expm1 log log2 log10 log1p sqrt rsqrt reciprocal pow abs
    square sin cos tan sinh cosh asin acos atan asinh acosh atanh erf erfc clamp clip clamp_min
    clamp_max threshold log_sigmoid hardshrink softshrink sign floor ceil
    round trunc frac _prelu_kernel erfinv logit lgamma digamma sinc positive float_power
    log_sigmoid_forward
"""
_REDUCE = "sum mean cumsum nansum nanmean trace diff"
_POOL = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d upsample_linear1d upsample_bilinear2d
    upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
    grid_sampler grid_sampler_2d grid_sampler_3d col2im
"""
_MAX = """
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool3d_with_indices
    max_pool1d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d amax
    cummax cummin
    amin median nanmedian mode kthvalue
"""
# degrees; a product's is the number of its factors
_STATISTIC = {
    "linalg_vector_norm": 1.0, "norm": 1.0, "frobenius_norm": 1.0, "std": 1.0, "var": 2.0,
    "prod": 1.0,
}  # fmt: skip
_NORM = """
    layer_norm native_layer_norm group_norm native_group_norm batch_norm instance_norm rms_norm
    _fused_rms_norm _native_batch_norm_legit_no_training native_batch_norm
"""


def _table() -> dict[str, Spec]:
    table: dict[str, Spec] = {}
    for names, family in (
        (_ROUTE, Family.ROUTE),
        (_ACTIVATION, Family.ACTIVATION),
        (_REDUCE, Family.REDUCE),
        (_POOL, Family.POOL),
        (_NORM, Family.NORM),
    ):
        table |= {name: Spec(family) for name in names.split()}
    table |= {name: Spec(Family.ROUTE, places) for name, places in _ROUTE_MANY.items()}
    table |= {name: Spec(Family.MAX) for name in _MAX.split()}
    table |= {
        name: Spec(Family.MAX, (0, 1))
        for name in ("max", "min", "maximum", "minimum", "fmax", "fmin")
    }
    table |= {n: Spec(Family.STATISTIC, degree=degree) for n, degree in _STATISTIC.items()}
    table |= {name: Spec(Family.SOFTMAX) for name in ("softmax", "_softmax", "_safe_softmax")}
    table |= {name: Spec(Family.SOFTMAX) for name in ("log_softmax", "_log_softmax")}
    table |= {name: Spec(Family.SOFTMAX) for name in ("logsumexp", "logcumsumexp")}
    table |= {name: Spec(Family.ADD, (0, 1)) for name in ("add", "sub", "rsub", "subtract")}
    table |= {
        name: Spec(Family.ADD, (0, 3))
        for name in ("index_add", "scatter_add", "scatter_reduce", "index_reduce")
    }
    table |= {name: Spec(Family.SCALE) for name in ("neg", "negative")}
    table |= {
        n: Spec(Family.PRODUCT, (0, 1)) for n in ("mul", "multiply", "div", "divide", "true_divide")
    }
    table |= {
        n: Spec(Family.PRODUCT, (0, 1))
        for n in ("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer")
    }
    table["embedding"] = Spec(Family.ROUTE)
    table["linear"] = Spec(Family.LINEAR, (0, 1), weight=1, bias=2)
    table["addmm"] = Spec(Family.LINEAR, (1, 2), weight=2, bias=0)
    table["baddbmm"] = Spec(Family.LINEAR, (1, 2), weight=2, bias=0)
    table["addbmm"] = Spec(Family.LINEAR, (1, 2), weight=2, bias=0)
    # rows in groups, each with a matrix of its own: the experts of a mixture
    table["_grouped_mm"] = table["grouped_mm_fallback"] = Spec(Family.LINEAR, (0, 1), weight=1)
    for dims in ("1d", "2d", "3d"):
        table[f"conv{dims}"] = Spec(Family.CONV, (0, 1), weight=1, bias=2)
        table[f"conv_transpose{dims}"] = Spec(Family.CONV, (0, 1), weight=1, bias=2)
    table["conv_transpose2d"] = Spec(Family.CONV, (0, 1), weight=1, bias=2)
    table["convolution"] = Spec(Family.CONV, (0, 1), weight=1, bias=2)
    table["_convolution"] = Spec(Family.CONV, (0, 1), weight=1, bias=2)
    table["scaled_dot_product_attention"] = Spec(Family.ATTENTION, (0, 1, 2))
    return table


TABLE = _table()

GATES = frozenset({"softmax", "_softmax", "_safe_softmax", "sigmoid", "hardsigmoid"})
"""Operators whose results weigh other values: they lie between zero and one."""

CREATORS = frozenset(
    """
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like new_zeros new_ones
    new_full new_empty new_empty_strided bernoulli sym_size sym_numel sym_stride
    """.split()
)
"""Operators of whose results the operands give no more than shape and type."""

SHAPED_AS = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})
"""Operators of which all operands but the first one give no more than shape and type."""

FOREIGN = frozenset({"transformers::grouped_mm_fallback"})
"""Operators of other libraries that are in the table; they have derivatives of their own."""

LAID_OUT = frozenset({"_grouped_mm"})
"""Operators whose derivatives take gradients only that lie as results do."""

NORMALISERS = frozenset({"rsqrt", "reciprocal"})
"""Operators whose results scale other values to a fixed size."""

SCATTERED = frozenset({"scatter_reduce", "index_reduce"})
"""Operators that reduce values by groups, in a way that an argument names."""

MATRIX = frozenset(
    {
        "matmul",
        "mm",
        "bmm",
        "mv",
        "dot",
        "vdot",
        "inner",
        "addmm",
        "baddbmm",
        "addbmm",
        "linear",
        "_grouped_mm",
        "grouped_mm_fallback",
    }
)
"""Products that sum over a shared dimension."""


def op_name(node: fx.Node) -> str:
    """Name of an operator without namespace and overload; ``getitem`` for the Python one."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.partition("::")[2]
    return getattr(target, "__name__", str(target))


def calls(node: Any, name: str) -> TypeGuard[fx.Node]:
    """Whether an argument is a call of an operator of that name."""
    return isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) == name


def spec_of(node: fx.Node) -> Spec | None:
    """What is known of a call, or None."""
    if node.target is operator.getitem:
        return Spec(Family.ROUTE)
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    known = target.namespace == "aten" or target._schema.name in FOREIGN
    return TABLE.get(op_name(node)) if known else None


def nearest(name: str, known: Iterable[str] = TABLE) -> str | None:
    """The known operator whose name is closest, or None."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return found[0] if found else None
