"""Relevance of images as pictures: heat maps, over the photo or alone, in grids, as PNG."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from graphopt.charts import new_figure
from graphopt.errors import UsageError
from graphopt.inspect.relevance.colours import Image, as_array, colours, normalised, scale_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 4


def pixels(relevance: Any) -> NDArray[np.float64]:
    """The relevance of each pixel: summed over channels.

    Args:
        relevance: ``(channels, height, width)`` or ``(height, width)``.

    Returns:
        ``(height, width)``.

    Raises:
        UsageError: Another shape.
    """
    found = as_array(relevance)
    if found.ndim not in (2, 3) or 0 in found.shape:
        raise UsageError(
            f"relevance of shape {found.shape} is no image",
            hint="give (channels, height, width) or (height, width), one sample at a time",
        )
    return found.sum(0) if found.ndim == 3 else found


def heatmap(
    relevance: Any,
    photo: Any = None,
    *,
    alpha: float = 0.75,
    percentile: float = 99.5,
    scale: float | None = None,
) -> Image:
    """A picture of relevance.

    Args:
        relevance: ``(channels, height, width)`` or ``(height, width)``.
        photo: What lies under it, see `as_photo`; it is drawn in greys. The colour covers it the
            more the more relevant a pixel is; None: white.
        alpha: How much of the photo the strongest colour covers, in [0, 1].
        percentile: Of the absolute values; the one that gets the strongest colour.
        scale: That value itself, so that several pictures can be compared.

    Returns:
        ``(height, width, 3)``; a pixel without relevance is white, or as in the grey photo.

    Raises:
        UsageError: A shape or an option that doesn't fit.
        NonFiniteError: NaN.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"alpha={alpha} is not in [0, 1]")
    values = pixels(relevance)
    shares = normalised(values, scale_of(values, percentile) if scale is None else scale)
    drawn = colours(shares)
    if photo is None:
        return drawn
    below = as_photo(photo)
    if below.shape != drawn.shape:
        raise UsageError(f"a photo of {below.shape[:2]} pixels under relevance of {values.shape}")
    grey = below.astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    grey = np.repeat((64 + 0.75 * grey)[..., None], 3, -1)  # lighter, so that colours show
    # The square root lets middling relevance be seen; zero stays zero.
    cover = alpha * np.sqrt(np.abs(shares))[..., None]
    return np.rint(cover * drawn + (1 - cover) * grey).astype(np.uint8)


def as_photo(image: Any) -> Image:
    """A photo as bytes.

    Args:
        image: Bytes ``(height, width, 3)`` or ``(height, width)``, or floating values
            ``(channels, height, width)`` with one or three channels: those in [0, 1] are taken as
            they are, others are stretched from their smallest to their largest.

    Raises:
        UsageError: Another shape.
    """
    if hasattr(image, "detach"):
        image = image.detach().cpu()
        image = (image.double() if image.is_floating_point() else image).numpy()  # or bfloat16
    found = np.asarray(image)
    if found.dtype != np.uint8:
        found = as_array(found)
        low, high = float(found.min()), float(found.max())
        if low < 0 or high > 1:
            found = (found - low) / ((high - low) or 1.0)
        found = np.rint(255 * found).astype(np.uint8)
        found = np.moveaxis(found, 0, -1) if found.ndim == 3 else found
    if found.ndim == 2:
        found = found[..., None]
    if found.ndim != 3 or found.shape[-1] not in (1, 3):
        raise UsageError(f"an image of shape {found.shape}", hint="one or three channels")
    return np.repeat(found, 3, -1) if found.shape[-1] == 1 else found


def grid(pictures: Sequence[Image], columns: int | None = None, gap: int = _GAP) -> Image:
    """Pictures of one size side by side, on white.

    Args:
        pictures: Each ``(height, width, 3)``.
        columns: How many stand in a row; None: about as many as there are rows.
        gap: Pixels between them.

    Raises:
        UsageError: No pictures, or several sizes.
    """
    if not pictures or len({p.shape for p in pictures}) > 1:
        raise UsageError("a grid is made of pictures of one size")
    across = max(1, math.ceil(math.sqrt(len(pictures))) if columns is None else columns)
    across = min(across, len(pictures))
    down = math.ceil(len(pictures) / across)
    height, width, _ = pictures[0].shape
    sheet = np.full((down * (height + gap) - gap, across * (width + gap) - gap, 3), 255, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = index // across * (height + gap), index % across * (width + gap)
        sheet[top : top + height, left : left + width] = picture
    return sheet


def enlarged(picture: Image, side: int = 224) -> Image:
    """A small picture with each pixel repeated, so that its shorter side is nearly ``side``."""
    times = max(1, side // min(picture.shape[:2]))
    return np.repeat(np.repeat(picture, times, 0), times, 1)


def png(picture: Image) -> bytes:
    """A picture as a PNG file (ISO/IEC 15948), 8 bits a channel.

    Raises:
        UsageError: It isn't ``(height, width, 3)`` bytes.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3 or not picture.size:
        raise UsageError("a PNG is made of bytes (height, width, 3)")
    height, width, _ = picture.shape
    rows = np.ascontiguousarray(picture).reshape(height, 3 * width)
    lines = np.concatenate([np.zeros((height, 1), np.uint8), rows], 1)  # each begins with filter 0
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(lines.tobytes(), 9)
    chunks = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, data) for kind, data in chunks)


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def image_figure(
    relevance: Any,
    photos: Any = None,
    *,
    titles: Sequence[str] = (),
    alpha: float = 0.75,
    percentile: float = 99.5,
) -> Figure:
    """A matplotlib figure of a batch: each photo, its heat map, and a colour bar.

    Args:
        relevance: ``(samples, channels, height, width)``, or one sample without the first.
        photos: As many images (see `as_photo`), or None.
        titles: One for each sample.
        alpha: See `heatmap`.
        percentile: See `heatmap`; of each sample by itself.

    Raises:
        UnsupportedError: matplotlib isn't installed.
        UsageError: Shapes that don't fit.
    """
    found = as_array(relevance)
    several = found if found.ndim == 4 else found[None]
    given = _several_photos(photos, len(several), found.ndim == 4)
    wide = 1 if given is None else 2
    figure = new_figure(3.2 * wide + 0.8, 3.2 * len(several), layout="constrained")
    axes = figure.subplots(len(several), wide, squeeze=False)
    for index, (sample, row) in enumerate(zip(several, axes, strict=True)):
        photo = None if given is None else as_photo(given[index])
        if photo is not None:
            row[0].imshow(photo)
        row[-1].imshow(heatmap(sample, photo, alpha=alpha, percentile=percentile))
        row[0].set_title(titles[index] if index < len(titles) else "", fontsize=9)
        for each in row:
            each.set_axis_off()
        bar(figure, row[-1], scale_of(pixels(sample), percentile))
    return figure


def _several_photos(photos: Any, samples: int, batched: bool) -> Sequence[Any] | None:
    if photos is None:
        return None
    found = list(photos) if batched else [photos]
    if len(found) != samples:
        raise UsageError(f"{len(found)} photos for {samples} samples")
    return found


def bar(figure: Figure, axes: Any, scale: float) -> None:
    """Put a colour bar from ``-scale`` to ``scale`` beside axes."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    listed = ListedColormap((colours(np.linspace(-1, 1, 255)) / 255).tolist())
    shown = ScalarMappable(Normalize(-scale, scale), listed)
    figure.colorbar(shown, ax=axes, shrink=0.8, label="relevance")
