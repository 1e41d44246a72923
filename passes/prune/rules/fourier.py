"""Fourier transforms: linear along their axes; all others go through."""

from __future__ import annotations

import numpy as np
import torch

from graphopt.passes.prune.rule import Call, Result, Value, axes_of, known, rule

aten = torch.ops.aten

_TRANSFORMS = known(
    aten, "fft_fft", "fft_ifft", "fft_rfft", "fft_irfft", "fft_hfft", "fft_ihfft", "fft_fft2",
    "fft_ifft2", "fft_rfft2", "fft_irfft2", "fft_fftn", "fft_ifftn", "fft_rfftn", "fft_irfftn",
    "fft_fftshift", "fft_ifftshift",
)  # fmt: skip


@rule(*_TRANSFORMS)
def _transform(call: Call) -> Result:
    x = call["self"]
    if len(call.shape) != len(x.axes):
        return call.opaque("there is no rule for this transform")
    sizes, dims = call.raw("s"), call.raw("dim")
    if dims is None and sizes is not None:
        dims = list(range(-len(sizes), 0))
    axes = list(x.axes)
    for axis in axes_of(dims, len(axes)):
        call.freeze(axes[axis], "a Fourier transform is taken along it")
        axes[axis] = np.zeros(call.shape[axis], dtype=np.int64)
    return Value(tuple(axes), x.zero)


@rule(*known(aten, "view_as_real", "view_as_complex"))
def _complex(call: Call) -> Result:
    """A last axis for real and imaginary parts comes or goes."""
    x = call["self"]
    if len(call.shape) < len(x.axes):
        call.freeze(x.axes[-1], "it holds real and imaginary parts")
        return x.take(range(len(call.shape)))
    return Value((*x.axes, np.zeros(2, dtype=np.int64)), (*x.zero, True))
