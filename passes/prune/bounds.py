"""How narrow and how wide each dimension may become: `min_keep`, `caps` and `round_to`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from graphopt.errors import PipelineError
from graphopt.passes.prune.criteria.base import places
from graphopt.passes.prune.dimensions import Dimension, Dimensions
from graphopt.passes.prune.names import matches, no_match
from graphopt.solvers.widths import Dimension as WidthDimension

_SHARE = r"(?:(?P<{}>\d+(?:\.\d+)?)%)?"
_CAP = re.compile(
    rf"(?P<pattern>\S+):{_SHARE.format('low')}(?P<range>\.\.)?{_SHARE.format('high')}"
)


@dataclass(frozen=True)
class Cap:
    """Bounds on the kept share of dimensions.

    Attributes:
        pattern: A glob of parameter names, or of names with an axis (``fc.weight:0``).
        low: The least share that is kept.
        high: The largest share.
    """

    pattern: str
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.pattern}:{self.low:.4g}..{self.high:.4g}"

    def matches(self, names: set[str]) -> bool:
        """Whether any name of a parameter matches."""
        return matches(self.pattern, names)


def read_caps(text: str) -> tuple[Cap, ...]:
    """Read ``encoder.*:25%..75% head.*:100% stem.*:50%..``, separated by blanks.

    A single share is both bounds; one that is left out is 0 % or 100 %.

    Raises:
        PipelineError: Malformed, or bounds that exclude each other.
    """
    return tuple(map(_read_cap, text.split()))


def _read_cap(text: str) -> Cap:
    found = _CAP.fullmatch(text)
    if found is None or not (found["low"] or found["high"]):
        raise PipelineError(f"malformed cap {text!r}", hint="caps=encoder.*:25%..75% head.*:100%")
    low = float(found["low"]) / 100 if found["low"] else 0.0
    high = float(found["high"]) / 100 if found["high"] else 1.0
    if not found["range"]:
        high = low
    if not 0 <= low <= high <= 1 or high == 0:
        raise PipelineError(f"cap {text!r}: shares must rise and lie between 0 % and 100 %")
    return Cap(found["pattern"], low, high)


@dataclass(frozen=True)
class Bound:
    """The widths that a dimension may have.

    Attributes:
        width: The full width.
        least: The fewest units that are kept.
        most: The most.
        step: Widths are its multiples, or full.
    """

    width: int
    least: int
    most: int
    step: int

    def dimension(self, name: str, gains: tuple[float, ...], done: float = 1.0) -> WidthDimension:
        """The dimension of a width problem.

        Args:
            name: For people.
            gains: Of the units that are left, falling.
            done: How much of the way is done, 1 for the last round. Before that all widths are
                allowed, such that the last round can keep these bounds.
        """
        left = len(gains)
        if done < 1:
            most = math.ceil(self.width - (self.width - self.most) * done)
            return _dimension(name, gains, self.least, most, 1)
        most = min(self.most, left)
        if most < self.width:  # not the full width of the source
            most = max(most // self.step * self.step, min(self.least, left))
        return _dimension(name, gains, self.least, most, self.step)


def _dimension(
    name: str, gains: tuple[float, ...], least: int, most: int, step: int
) -> WidthDimension:
    left = len(gains)
    return WidthDimension(name, gains, min(least, left), most if most < left else None, step)


def bounds(
    dimensions: Dimensions, min_keep: float, caps: tuple[Cap, ...], step: Callable[[int], int]
) -> list[Bound]:
    """The bounds of each dimension.

    Args:
        dimensions: The dimensions.
        min_keep: The least share of each that is kept.
        caps: Bounds on those whose parameters match; several hold together.
        step: For a full width what widths are multiples of, if not full.

    Raises:
        PipelineError: A cap matches no parameter, or no width is left.
    """
    _check_patterns(dimensions, caps)
    names = _names(dimensions)
    return [
        _bound(dim, min_keep, [c for c in caps if c.matches(names[i])], step(dim.width))
        for i, dim in enumerate(dimensions.all)
    ]


def _bound(dim: Dimension, min_keep: float, caps: list[Cap], step: int) -> Bound:
    low = max([min_keep, *(cap.low for cap in caps)])
    high = min([1.0, *(cap.high for cap in caps)])
    least = max(1, math.ceil(low * dim.width - 1e-9))
    most = max(1, math.floor(high * dim.width + 1e-9))
    if low <= high < least / dim.width:  # no whole unit lies between: the next one
        most = least
    rounded = min(math.ceil(least / step) * step, dim.width)
    if rounded > most and caps:
        said = " and ".join(map(str, caps))
        raise PipelineError(
            f"no width of {dim.name} ({dim.width} units) is within {said}",
            hint=f"widths are multiples of round_to={step}, and min_keep is {min_keep:g}",
        )
    return Bound(dim.width, rounded, most, step)


def _names(dimensions: Dimensions) -> list[set[str]]:
    """For each dimension its parameters, with and without the axis."""
    names: list[set[str]] = [set() for _ in dimensions.all]
    for slot, axis in places(dimensions):
        for index in dimensions.of([slot.value.axes[axis]]):
            names[index] |= {slot.path, f"{slot.path}:{axis}"}
    return names


def _check_patterns(dimensions: Dimensions, caps: tuple[Cap, ...]) -> None:
    slots = dimensions.analysis.slots.values()
    every = {
        name for s in slots for name in (s.path, *(f"{s.path}:{a}" for a in range(s.tensor.dim())))
    }
    prunable = set().union(*_names(dimensions))
    for cap in caps:
        if not cap.matches(every):
            raise no_match("caps", cap.pattern, every)
        if cap.high < 1 and not cap.matches(prunable):
            raise PipelineError(
                f"caps: nothing of {cap.pattern!r} can be pruned to {cap.high:.4g}",
                hint="the report's section prune, under frozen, says what keeps its size, and why",
            )
