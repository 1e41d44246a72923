"""Photos that ship with scikit-image and scikit-learn, and crops of them as networks take them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_PHOTOS = (
    "astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "immunohistochemistry",
    "retina", "camera", "coins", "clock", "page", "moon",
)  # fmt: skip
_MEAN, _STD = 0.498, 0.502


def photos() -> list[Tensor]:
    """Photos that ship with scikit-image and scikit-learn, as (3, height, width) in [0, 1]."""
    import skimage.data
    from sklearn.datasets import load_sample_images

    arrays = [getattr(skimage.data, name)() for name in _PHOTOS]
    found = []
    for array in [*arrays, skimage.data.stereo_motorcycle()[0], *load_sample_images().images]:
        image = torch.from_numpy(array.copy()).float() / 255
        image = image.expand(3, -1, -1) if image.dim() == 2 else image[..., :3].permute(2, 0, 1)
        found.append(image)
    return found


def crops(images: Sequence[Tensor], each: int, seed: int, side: int = 224) -> Tensor:
    """Random square crops, every other one mirrored, normalised.

    Args:
        images: Photos, ``(3, height, width)`` in [0, 1].
        each: Crops of each photo.
        seed: Of the places.
        side: Of the crops, in pixels.

    Returns:
        ``(photos * each, 3, side, side)``.
    """
    generator = torch.Generator().manual_seed(seed)
    found = []
    for image in images:
        height, width = image.shape[1:]
        for index in range(each):
            share, top, left = torch.rand(3, generator=generator).tolist()
            length = int((0.6 + 0.4 * share) * min(height, width))
            top, left = int(top * (height - length)), int(left * (width - length))
            part = image[None, :, top : top + length, left : left + length]
            part = nn.functional.interpolate(part, (side, side), mode="bilinear", antialias=True)
            found.append(part.flip(-1) if index % 2 else part)
    return (torch.cat(found) - _MEAN) / _STD
