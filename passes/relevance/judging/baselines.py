"""What stands in the place of what is removed."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.errors import InputMismatch, NonFiniteError, UsageError, suggest

NAMES = ("zero", "mean", "blur")
_SIGMA = 10 / 224
_REACH = 3.0


def baseline_of(inputs: Tensor, spec: Any) -> Tensor:
    """Read a baseline.

    Args:
        inputs: ``(batch, *sample)``.
        spec: ``zero``; ``mean``: of each channel over the positions of its own sample; ``blur``:
            `blurred` images; a number (for token ids: the mask or padding token's id); a tensor
            that broadcasts to the inputs (such as the embedding of the mask token).

    Returns:
        Of the inputs' shape and dtype.

    Raises:
        UsageError: An unknown name, or one that has no meaning for these inputs.
        InputMismatch: A tensor that doesn't broadcast to the inputs.
        NonFiniteError: A baseline with NaN or infinity.
    """
    found = _named(inputs, spec) if isinstance(spec, str) else _given(inputs, spec)
    if not torch.isfinite(found).all():
        raise NonFiniteError("the baseline holds NaN or infinity")
    return found


def blurred(images: Tensor, sigma: float | None = None) -> Tensor:
    """Gaussian blur, with borders mirrored.

    Args:
        images: ``(batch, channels, height, width)``, floating.
        sigma: Deviation in pixels; None: 10 in an image of 224 (Fong and Vedaldi 2017), in
            proportion to the smaller side in others.
    """
    side = min(images.shape[-2:])
    sigma = side * _SIGMA if sigma is None else sigma
    if not sigma > 0:
        raise UsageError(f"sigma={sigma}: a blur needs a positive deviation")
    reach = min(math.ceil(_REACH * sigma), side - 1)
    offsets = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, -1)
    padded = F.pad(images, (reach,) * 4, mode="reflect")
    rows = F.conv2d(padded, kernel.unsqueeze(2), groups=images.shape[1])
    return F.conv2d(rows, kernel.unsqueeze(3), groups=images.shape[1])


def _named(inputs: Tensor, name: str) -> Tensor:
    if name not in NAMES:
        raise UsageError(f"unknown baseline {name!r}", hint=suggest(name, NAMES) or str(NAMES))
    if not inputs.is_floating_point():
        raise UsageError(
            f"baseline {name!r} has no meaning for token ids",
            hint="give the id of the mask or padding token: baseline=tokenizer.mask_token_id",
        )
    if name == "zero":
        return torch.zeros_like(inputs)
    if name == "blur":
        if inputs.dim() != 4:
            raise UsageError(f"only images can be blurred, not {inputs.dim()}-D inputs")
        return blurred(inputs)
    axes = (2, 3) if inputs.dim() == 4 else (1,)
    return inputs.mean(axes, keepdim=True).expand_as(inputs)


def _given(inputs: Tensor, spec: Any) -> Tensor:
    if isinstance(spec, bool) or not isinstance(spec, (int, float, Tensor)):
        raise UsageError(f"baseline {spec!r}", hint=f"one of {NAMES}, a number or a tensor")
    found = torch.as_tensor(spec, device=inputs.device)
    if found.is_floating_point() and not inputs.is_floating_point():
        raise UsageError("a baseline of token ids must be an integer", hint="baseline=0")
    try:
        return found.to(inputs.dtype).expand_as(inputs)
    except RuntimeError as error:
        raise InputMismatch(
            f"a baseline of shape {tuple(found.shape)} for inputs of shape {tuple(inputs.shape)}"
        ) from error
