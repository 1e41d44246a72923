"""A call of each operator that relevance knows, between a linear layer and a weighed sum."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

aten: Any = torch.ops.aten

Call = Callable[[Tensor], Any]


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


W = random(6, 6, seed=1)
V = random(6, seed=2)
IMAGE, VOLUME = (2, 4, 6, 6), (2, 2, 4, 4, 4)


class Sample:
    """A call of one operator.

    Args:
        call: Makes the result from the input.
        shape: Of the input.
        positive: Whether the input is positive.
        bar: How far sums may be off, as a part of all that is summed; None: as double precision.
    """

    def __init__(
        self,
        call: Call,
        shape: tuple[int, ...] = (2, 4, 6),
        positive: bool = False,
        bar: float | None = None,
    ) -> None:
        self.call, self.shape, self.positive, self.bar = call, shape, positive, bar


class Net(nn.Module):
    """Operators between a linear layer and a weighed sum, so that all of their results count."""

    def __init__(self, samples: list[Sample]) -> None:
        super().__init__()
        self.samples = samples
        for index, sample in enumerate(samples):
            size = sample.shape[-1]
            self.register_buffer(f"weight{index}", random(size, size, seed=3))

    def forward(self, *inputs: Tensor) -> Tensor:
        parts = []
        for index, (sample, x) in enumerate(zip(self.samples, inputs, strict=True)):
            y = x @ self.get_buffer(f"weight{index}")
            found = sample.call(y.abs() + 0.5 if sample.positive else y)
            results = found if isinstance(found, tuple | list) else (found,)
            parts += [r.reshape(-1) for r in results if r.is_floating_point()]
        result = torch.cat(parts)
        weights = torch.arange(result.shape[0], dtype=result.dtype).remainder(7) / 7 + 0.5
        return (result * weights).sum().reshape(1)


def plain(names: str, *args: Any, **fields: Any) -> dict[str, Sample]:
    """Operators called with the input and some constants."""

    def make(name: str) -> Sample:
        return Sample(lambda x: getattr(aten, name)(x, *args), **fields)

    return {name: make(name) for name in names.split()}


def pair(call: Callable[..., Any], **fields: Any) -> Sample:
    """An operator called with two values of the same data."""
    return Sample(lambda x: call(x, x.flip(-1) * 0.5 + 0.25), **fields)


INDEX = torch.tensor([0, 2, 3, 1])
EXPERTS, ENDS = random(3, 8, 8, seed=6), torch.tensor([1, 1, 4], dtype=torch.int32)
GRID = random(1, 5, 5, 2, seed=4).tanh()
GRID3 = random(1, 3, 3, 3, 3, seed=4).tanh()


def grouped(x: Tensor) -> Tensor:
    """Experts, by torch's operator, which exists in half precision only where it is captured."""
    rows, weight = x.reshape(-1, 8).bfloat16(), EXPERTS.bfloat16()
    return aten._grouped_mm(rows, weight, ENDS * x.shape[0]).to(x.dtype)


def grouped_by_loop(x: Tensor) -> Tensor:
    """Experts, by the operator that stands for torch's in other precisions."""
    import transformers.integrations.moe  # noqa: F401 -- brings the operator along

    call = torch.ops.transformers.grouped_mm_fallback
    return call(x.reshape(-1, 8), EXPERTS, offs=ENDS * x.shape[0])


SAMPLES: dict[str, Sample] = {
    # --- routes ---
    "view": Sample(lambda x: aten.view(x, [-1, 24])),
    "reshape": Sample(lambda x: aten.reshape(x, [-1, 24])),
    "_unsafe_view": Sample(lambda x: aten._unsafe_view(x, [x.shape[0], 24])),
    "_reshape_alias": Sample(lambda x: aten._reshape_alias(x, [x.shape[0], 24], [24, 1])),
    "view_as": Sample(lambda x: aten.view_as(x, x.new_zeros(x.shape[0], 24))),
    "reshape_as": Sample(lambda x: aten.reshape_as(x, x.new_zeros(x.shape[0], 24))),
    **plain("transpose swapaxes swapdims transpose_copy movedim moveaxis", 1, 2),
    **plain("t t_copy numpy_T", shape=(4, 4)),
    "t": Sample(lambda x: aten.t(aten.t(x) * 2), shape=(4, 4)),
    "t_copy": Sample(lambda x: aten.t_copy(aten.t_copy(x) * 2), shape=(4, 4)),
    "numpy_T": Sample(lambda x: aten.numpy_T(aten.numpy_T(x) * 2), shape=(4, 4)),
    **plain("mT adjoint contiguous clone alias real ravel positive"),
    **plain("nan_to_num squeeze squeeze_copy"),
    "ravel": Sample(lambda x: aten.ravel(x).reshape(x.shape)),
    **plain("permute permute_copy", [0, 2, 1]),
    **plain("expand expand_copy broadcast_to", [3, 2, 4, 6]),
    "expand": Sample(lambda x: aten.expand(x.unsqueeze(1), [-1, 3, -1, -1])),
    "expand_copy": Sample(lambda x: aten.expand_copy(x.unsqueeze(1), [-1, 3, -1, -1])),
    "broadcast_to": Sample(lambda x: aten.broadcast_to(x.unsqueeze(1), [x.shape[0], 3, 4, 6])),
    "expand_as": Sample(lambda x: aten.expand_as(x[:, :1], x)),
    **plain("slice slice_copy", 1, 1, 3),
    **plain("select select_copy", 1, 2),
    **plain("unsqueeze unsqueeze_copy", 1),
    "flatten": Sample(lambda x: aten.flatten(x, 1)),
    "unflatten": Sample(lambda x: aten.unflatten(x, -1, [2, 3])),
    "view_copy": Sample(lambda x: aten.view_copy(x, [-1, 24])),
    **plain("split unsafe_split", 2, 1),
    **plain("split_with_sizes", [1, 3], 1),
    **plain("chunk unsafe_chunk tensor_split", 2, 1),
    "unbind": Sample(lambda x: aten.unbind(x, 1)),
    **plain("narrow", 1, 1, 2),
    "index_select": Sample(lambda x: aten.index_select(x, 1, INDEX)),
    "gather": Sample(lambda x: aten.gather(x, 2, INDEX[:2].expand(x.shape[0], 4, 2))),
    "take_along_dim": Sample(
        lambda x: aten.take_along_dim(x, INDEX[:2].expand(x.shape[0], 4, 2), 2)
    ),
    "index": Sample(lambda x: aten.index(x, [None, INDEX])),
    "take": Sample(lambda x: aten.take(x, torch.arange(x.numel()).reshape(x.shape))),
    **plain("roll", [1], [1]),
    **plain("flip", [1]),
    "rot90": Sample(lambda x: aten.rot90(x, 1, [1, 2])),
    **plain("repeat tile", [1, 2, 1]),
    "repeat_interleave": Sample(lambda x: aten.repeat_interleave(x, 2, 1)),
    "pad": Sample(lambda x: aten.pad(x, [1, 1], "constant", 0.5)),
    "constant_pad_nd": Sample(lambda x: aten.constant_pad_nd(x, [1, 1], 0.5)),
    **plain("reflection_pad1d replication_pad1d", [1, 1]),
    **plain("reflection_pad2d replication_pad2d", [1, 1, 1, 1], shape=IMAGE),
    **plain("reflection_pad3d replication_pad3d", [1, 1, 1, 1, 1, 1], shape=VOLUME),
    **plain("pixel_shuffle pixel_unshuffle channel_shuffle", 2, shape=IMAGE),
    "unfold": Sample(lambda x: aten.unfold(x, 2, 3, 1)),
    "im2col": Sample(lambda x: aten.im2col(x, [2, 2], [1, 1], [0, 0], [2, 2]), shape=IMAGE),
    **plain("tril triu"),
    "diagonal": Sample(lambda x: aten.diagonal(x, 0, 1, 2)),
    "diag_embed": Sample(lambda x: aten.diag_embed(x)),
    "type_as": Sample(lambda x: aten.type_as(x, torch.zeros((), dtype=torch.float64))),
    "to": Sample(lambda x: aten.to(x, torch.float64)),
    "_to_copy": Sample(lambda x: aten._to_copy(x, dtype=torch.float64)),
    **plain("dropout feature_dropout alpha_dropout feature_alpha_dropout", 0.5, False),
    "native_dropout": Sample(lambda x: aten.native_dropout(x, 0.5, False)[0]),
    **plain("topk", 2, 1),
    **plain("sort", 1),
    **plain("upsample_nearest1d _upsample_nearest_exact1d", [9]),
    **plain("upsample_nearest2d _upsample_nearest_exact2d", [9, 9], shape=IMAGE),
    **plain("upsample_nearest3d _upsample_nearest_exact3d", [6, 6, 6], shape=VOLUME),
    "embedding": Sample(lambda x: aten.embedding(x.reshape(-1, 6), torch.arange(0, x.shape[0]))),
    "cat": Sample(lambda x: aten.cat([x, x.abs(), torch.full_like(x, 0.5)], 1)),
    "concat": Sample(lambda x: aten.concat([x, x * 2], 1)),
    "concatenate": Sample(lambda x: aten.concatenate([x, x * 2], 1)),
    "stack": Sample(lambda x: aten.stack([x, torch.ones_like(x)], 1)),
    "hstack": Sample(lambda x: aten.hstack([x, x * 2])),
    "vstack": Sample(lambda x: aten.vstack([x.transpose(0, 1), x.transpose(0, 1)]).transpose(0, 1)),
    "where": Sample(lambda x: aten.where(x > 0, x * 2, V)),
    "masked_fill": Sample(lambda x: aten.masked_fill(x, x > 0, 0.5)),
    "masked_scatter": Sample(lambda x: aten.masked_scatter(x, x > 0, x.flip(2) * 2)),
    "masked_select": Sample(
        lambda x: aten.masked_select(x, x > 0).sum() + aten.sum(x, [1, 2])
    ),
    "scatter": Sample(lambda x: aten.scatter(x, 2, INDEX[:2].expand(x.shape[0], 4, 2), x * 2)),
    "slice_scatter": Sample(lambda x: aten.slice_scatter(x, x[:, :2] * 2, 1, 0, 2)),
    "select_scatter": Sample(lambda x: aten.select_scatter(x, x[:, 0] * 2, 1, 1)),
    "diagonal_scatter": Sample(lambda x: aten.diagonal_scatter(x, x[:, :, 0] * 2, 0, 1, 2)),
    "index_put": Sample(lambda x: aten.index_put(x, [None, INDEX[:2]], x[:, :2] * 2)),
    "_unsafe_index_put": Sample(
        lambda x: aten._unsafe_index_put(x, [None, INDEX[:2]], x[:, :2] * 2)
    ),
    "_unsafe_index": Sample(lambda x: aten._unsafe_index(x, [None, INDEX])),
    "index_copy": Sample(lambda x: aten.index_copy(x, 1, INDEX[:2], x[:, :2] * 2)),
    "max_unpool2d": Sample(
        lambda x: aten.max_unpool2d(
            *aten.max_pool2d_with_indices(x, [2, 2]), [x.shape[2], x.shape[3]]
        ),
        shape=IMAGE,
    ),
    "max_unpool3d": Sample(
        lambda x: aten.max_unpool3d(
            *aten.max_pool3d_with_indices(x, [1, 1, 1]), list(x.shape[2:]), [1, 1, 1], [0, 0, 0]
        ),
        shape=VOLUME,
    ),
    "index_fill": Sample(lambda x: aten.index_fill(x, 1, INDEX[:2], 0.5)),
    "broadcast_tensors": Sample(lambda x: aten.broadcast_tensors([x[:, :1], x])),
    # --- activations ---
    **plain(
        "relu relu6 gelu silu elu selu celu leaky_relu hardtanh hardswish hardsigmoid tanh sigmoid "
        "softplus mish exp exp2 expm1 abs square sin cos tan sinh cosh asinh atan erf erfc "
        "log_sigmoid hardshrink softshrink sinc log_sigmoid_forward rrelu ceil floor round trunc "
        "sign frac"
    ),
    "log_sigmoid_forward": Sample(lambda x: aten.log_sigmoid_forward(x)[0]),
    **plain("log log2 log10 log1p sqrt rsqrt reciprocal lgamma digamma", positive=True),
    "asin": Sample(lambda x: aten.asin(x.tanh())),
    "acos": Sample(lambda x: aten.acos(x.tanh())),
    "atanh": Sample(lambda x: aten.atanh(x.tanh() * 0.9)),
    "acosh": Sample(lambda x: aten.acosh(x + 1.5), positive=True),
    "erfinv": Sample(lambda x: aten.erfinv(x.tanh() * 0.9)),
    "logit": Sample(lambda x: aten.logit(x.sigmoid())),
    "prelu": Sample(lambda x: aten.prelu(x, V[:4].abs())),
    "_prelu_kernel": Sample(lambda x: aten._prelu_kernel(x, V[:4].abs().reshape(1, 4, 1))),
    "pow": Sample(lambda x: aten.pow(x, 3)),
    "float_power": Sample(lambda x: aten.float_power(x, 2)),
    **plain("clamp clip", -0.5, 0.5),
    **plain("clamp_min", -0.5),
    **plain("clamp_max", 0.5),
    **plain("threshold", 0.1, 0.2),
    # --- sums ---
    "add": pair(aten.add),
    "sub": pair(aten.sub),
    "subtract": pair(aten.subtract),
    "rsub": pair(aten.rsub),
    "index_add": Sample(lambda x: aten.index_add(x, 1, INDEX[:2], x[:, :2] * 2)),
    "scatter_add": Sample(
        lambda x: aten.scatter_add(x, 2, INDEX[:2].expand(x.shape[0], 4, 2), x * 2)
    ),
    "scatter_reduce": Sample(
        lambda x: aten.scatter_reduce(
            x, 2, INDEX[:2].expand(x.shape[0], 4, 2), x * 2, "mean", include_self=False
        )
    ),
    "index_reduce": Sample(lambda x: aten.index_reduce(x, 1, INDEX[:2], x[:, :2] * 2, "amax")),
    **plain("neg negative"),
    "sum": Sample(lambda x: aten.sum(x, [1])),
    "nansum": Sample(lambda x: aten.nansum(x, [1])),
    "mean": Sample(lambda x: aten.mean(x, [1])),
    "nanmean": Sample(lambda x: aten.nanmean(x, [1])),
    "cumsum": Sample(lambda x: aten.cumsum(x, 1)),
    "diff": Sample(lambda x: aten.diff(x, 1, 1)),
    "trace": Sample(lambda x: aten.trace(x[0]) + x.sum([1, 2])),
    # --- averages over windows ---
    **plain("avg_pool1d", [2]),
    **plain("avg_pool2d", [2, 2], shape=IMAGE),
    **plain("avg_pool3d", [2, 2, 2], shape=VOLUME),
    **plain("adaptive_avg_pool1d", [4]),
    **plain("adaptive_avg_pool2d _adaptive_avg_pool2d", [4, 4], shape=IMAGE),
    **plain("adaptive_avg_pool3d _adaptive_avg_pool3d", [3, 3, 3], shape=VOLUME),
    **plain("upsample_linear1d", [9], False),
    **plain("upsample_bilinear2d upsample_bicubic2d", [9, 9], False, shape=IMAGE),
    **plain("_upsample_bilinear2d_aa", [4, 4], False, shape=IMAGE),
    **plain("upsample_trilinear3d", [6, 6, 6], False, shape=VOLUME),
    "grid_sampler": Sample(
        lambda x: aten.grid_sampler(x, GRID.expand(x.shape[0], 5, 5, 2), 0, 0, False), IMAGE
    ),
    "grid_sampler_2d": Sample(
        lambda x: aten.grid_sampler_2d(x, GRID.expand(x.shape[0], 5, 5, 2), 0, 0, False), IMAGE
    ),
    "grid_sampler_3d": Sample(
        lambda x: aten.grid_sampler_3d(x, GRID3.expand(x.shape[0], 3, 3, 3, 3), 0, 0, False), VOLUME
    ),
    "col2im": Sample(
        lambda x: aten.col2im(x, [4, 4], [2, 2], [1, 1], [0, 0], [1, 1]), shape=(2, 8, 9)
    ),
    # --- the largest ---
    **plain("max_pool1d max_pool1d_with_indices", [2]),
    **plain("max_pool2d max_pool2d_with_indices", [2, 2], shape=IMAGE),
    **plain("max_pool3d max_pool3d_with_indices", [2, 2, 2], shape=VOLUME),
    **plain("adaptive_max_pool1d", [4]),
    **plain("adaptive_max_pool2d", [4, 4], shape=IMAGE),
    **plain("adaptive_max_pool3d", [3, 3, 3], shape=VOLUME),
    **plain("amax amin", [1]),
    **plain("max min median nanmedian mode cummax cummin", 1),
    **plain("kthvalue", 2, 1),
    "maximum": pair(aten.maximum),
    "minimum": pair(aten.minimum),
    "fmax": Sample(lambda x: aten.fmax(x, V)),
    "fmin": Sample(lambda x: aten.fmin(x, V)),
    # --- statistics ---
    "linalg_vector_norm": Sample(lambda x: aten.linalg_vector_norm(x, 2, [1])),
    "norm": Sample(lambda x: aten.norm(x, 2, [1])),
    "frobenius_norm": Sample(lambda x: aten.frobenius_norm(x, [1, 2])),
    "std": Sample(lambda x: aten.std(x, [1])),
    "var": Sample(lambda x: aten.var(x, [1])),
    "prod": Sample(lambda x: aten.prod(x, 1)),
    # --- norms ---
    "layer_norm": Sample(lambda x: aten.layer_norm(x, [6], V, V.flip(0))),
    "native_layer_norm": Sample(lambda x: aten.native_layer_norm(x, [6], V, V.flip(0), 1e-5)[0]),
    "rms_norm": Sample(lambda x: aten.rms_norm(x, [6], V)),
    "_fused_rms_norm": Sample(lambda x: aten._fused_rms_norm(x, [6], V, 1e-5)[0]),
    "group_norm": Sample(lambda x: aten.group_norm(x, 2, V[:4], V[2:]), shape=IMAGE),
    "native_group_norm": Sample(
        lambda x: aten.native_group_norm(x, V[:4], V[2:], x.shape[0], 4, 36, 2, 1e-5)[0],
        shape=IMAGE,
    ),
    "instance_norm": Sample(
        lambda x: aten.instance_norm(x, V[:4], V[2:], None, None, True, 0.1, 1e-5, False)
    ),
    "batch_norm": Sample(
        lambda x: aten.batch_norm(x, V[:4], V[2:], V[:4], V[:4].abs(), False, 0.1, 1e-5, False)
    ),
    "native_batch_norm": Sample(
        lambda x: aten.native_batch_norm(x, V[:4], V[2:], V[:4], V[:4].abs(), False, 0.1, 1e-5)[0]
    ),
    "_native_batch_norm_legit_no_training": Sample(
        lambda x: aten._native_batch_norm_legit_no_training(
            x, V[:4], V[2:], V[:4], V[:4].abs(), 0.1, 1e-5
        )[0]
    ),
    # --- softmax and attention ---
    **plain("softmax log_softmax", -1),
    **plain("_softmax _log_softmax", -1, False),
    **plain("_safe_softmax", -1),
    **plain("logsumexp", [1]),
    **plain("logcumsumexp", 1),
    "scaled_dot_product_attention": Sample(
        lambda x: aten.scaled_dot_product_attention(x, x * 2, x.flip(1))
    ),
    # --- products ---
    "mul": pair(aten.mul),
    "multiply": pair(aten.multiply),
    "div": pair(aten.div, positive=True),
    "divide": pair(aten.divide, positive=True),
    "true_divide": pair(aten.true_divide, positive=True),
    "matmul": Sample(lambda x: aten.matmul(x, x.transpose(1, 2))),
    "bmm": Sample(lambda x: aten.bmm(x, x.transpose(1, 2))),
    "mm": Sample(lambda x: aten.mm(x.reshape(-1, 6), W)),
    "mv": Sample(lambda x: aten.mv(x.reshape(-1, 6), V)),
    "dot": Sample(lambda x: aten.dot(x[0, 0], V) + x.sum([1, 2])),
    "vdot": Sample(lambda x: aten.vdot(x[0, 0], V) + x.sum([1, 2])),
    "inner": Sample(lambda x: aten.inner(x, V)),
    "outer": Sample(lambda x: aten.outer(x[:, 0, 0], V)),
    # --- linear layers and convolutions ---
    "linear": Sample(lambda x: aten.linear(x, W, V)),
    "addmm": Sample(lambda x: aten.addmm(V, x.reshape(-1, 6), W)),
    "baddbmm": Sample(lambda x: aten.baddbmm(V, x, W.expand(x.shape[0], 6, 6))),
    "addbmm": Sample(
        lambda x: aten.addbmm(V, x, W.expand(x.shape[0], 6, 6)).sum() + x.sum([1, 2])
    ),
    "conv1d": Sample(lambda x: aten.conv1d(x, W[:4, :4, None], V[:4])),
    "conv2d": Sample(lambda x: aten.conv2d(x, W[:4, :4, None, None], V[:4]), shape=IMAGE),
    "conv3d": Sample(lambda x: aten.conv3d(x, W[:2, :2, None, None, None], V[:2]), shape=VOLUME),
    "conv_transpose1d": Sample(lambda x: aten.conv_transpose1d(x, W[:4, :4, None], V[:4])),
    "conv_transpose2d": Sample(
        lambda x: aten.conv_transpose2d(x, W[:4, :4, None, None], V[:4]), shape=IMAGE
    ),
    "conv_transpose3d": Sample(
        lambda x: aten.conv_transpose3d(x, W[:2, :2, None, None, None], V[:2]), shape=VOLUME
    ),
    "convolution": Sample(
        lambda x: aten.convolution(x, W[:4, :4, None], V[:4], [1], [0], [1], False, [0], 1)
    ),
    "_convolution": Sample(
        lambda x: aten._convolution(
            x, W[:4, :4, None], V[:4], [1], [0], [1], False, [0], 1, False, False, False, False
        )
    ),
    "_grouped_mm": Sample(grouped, shape=(2, 4, 8), bar=2**-9),
    "grouped_mm_fallback": Sample(grouped_by_loop, shape=(2, 4, 8)),
}  # fmt: skip
