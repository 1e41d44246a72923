"""Colours of relevance: a diverging map that is symmetric around zero.

Blue is against, white is nothing, orange-red is for.  The hues are the blue and the vermillion of
Okabe and Ito's palette (Color Universal Design, 2008), which people with any of the common colour
vision deficiencies tell apart; the same size has nearly the same lightness on both sides.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import NonFiniteError, UsageError

Image = NDArray[np.uint8]
"""``(height, width, 3)``."""

# From zero to the largest size.
_FOR = ((255, 255, 255), (250, 190, 140), (213, 94, 0), (122, 40, 0))
_AGAINST = ((255, 255, 255), (150, 203, 238), (0, 114, 178), (0, 55, 100))

FOR = "#d55e00"
"""What speaks for the output, as a plain colour."""
AGAINST = "#0072b2"
"""What speaks against it."""


def as_array(values: Any) -> NDArray[np.float64]:
    """Relevance as numbers, from a tensor on any device or an array.

    Raises:
        NonFiniteError: It holds NaN or infinities.
    """
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    found = np.asarray(values, dtype=np.float64)
    if not np.isfinite(found).all():
        raise NonFiniteError("the relevance that shall be drawn holds NaN or infinities")
    return found


def scale_of(values: Any, percentile: float = 99.5) -> float:
    """The size that gets the strongest colour.

    Args:
        values: Relevance of any shape.
        percentile: Of the absolute values: a few far larger ones don't make the rest pale.

    Returns:
        A positive number; 1 where everything is zero.

    Raises:
        UsageError: A percentile out of (0, 100].
    """
    if not 0 < percentile <= 100:
        raise UsageError(f"percentile={percentile} is not in (0, 100]")
    sizes = np.abs(as_array(values))
    if sizes.size == 0 or not sizes.any():
        return 1.0
    found = float(np.percentile(sizes, percentile))
    # Where hardly anything is relevant, the percentile of all places is zero.
    return found if found > 0 else float(np.percentile(sizes[sizes > 0], percentile))


def normalised(values: Any, scale: float | None = None) -> NDArray[np.float64]:
    """Relevance as numbers in [-1, 1].

    Args:
        values: Relevance of any shape.
        scale: What becomes 1; None: `scale_of` it.
    """
    found = as_array(values)
    return np.clip(found / (scale_of(found) if scale is None else scale), -1.0, 1.0)


def colours(values: Any) -> Image:
    """Colours of numbers in [-1, 1].

    Args:
        values: Of any shape; what lies outside gets the strongest colour.

    Returns:
        The same shape with a last dimension of 3: red, green, blue.
    """
    found = np.clip(as_array(values), -1.0, 1.0)
    sizes = np.abs(found) * (len(_FOR) - 1)
    places = np.arange(len(_FOR))
    parts = [
        np.where(
            found >= 0,
            np.interp(sizes, places, [c[i] for c in _FOR]),
            np.interp(sizes, places, [c[i] for c in _AGAINST]),
        )
        for i in range(3)
    ]
    return np.rint(np.stack(parts, -1)).astype(np.uint8)


def hexadecimal(value: float) -> str:
    """The colour of one number in [-1, 1], such as ``#d55e00``."""
    return "#" + "".join(f"{int(c):02x}" for c in colours(value))


def readable_on(value: float) -> str:
    """Black or white, whichever is read better on the colour of a number in [-1, 1]."""
    light = luminance(colours(value))
    return "#000000" if (light + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"


def luminance(colour: Any) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.2), between 0 and 1."""
    channels = np.asarray(colour, dtype=np.float64) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))
