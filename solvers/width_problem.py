"""What an allocation of widths is asked for, and what comes back, as plain data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


class WidthError(ValueError):
    """A width problem that makes no sense; the message says what to change."""


@dataclass(frozen=True)
class Dimension:
    """A dimension of which some units are kept: the most valuable ones.

    Attributes:
        name: for people to read.
        gains: value of each unit, in any unit of value, non-negative, falling. Their number is
            the full width.
        least: fewest units that may be kept, at least 1; rounded up to an allowed width.
        most: most units that may be kept; None: all.
        step: allowed widths are its multiples, and the full width.
    """

    name: str
    gains: tuple[float, ...]
    least: int = 1
    most: int | None = None
    step: int = 1

    def __post_init__(self) -> None:
        """Checks that some width is allowed and that the gains fall."""
        if not all(math.isfinite(gain) and gain >= 0 for gain in self.gains):
            raise WidthError(f"{self.name}: gains must be finite and not negative")
        if any(a < b for a, b in zip(self.gains, self.gains[1:], strict=False)):
            raise WidthError(f"{self.name}: gains must be sorted, the largest first")
        if self.step < 1 or not 1 <= self.least <= len(self.gains):
            raise WidthError(
                f"{self.name}: step must be at least 1, and least between 1 and the full width "
                f"{len(self.gains)}; they are {self.step} and {self.least}"
            )
        if not self.widths:
            raise WidthError(
                f"{self.name}: no multiple of {self.step} lies between least {self.least} and "
                f"most {self.most}"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The allowed widths, rising."""
        full = len(self.gains)
        most = full if self.most is None else min(self.most, full)
        multiples = range(math.ceil(self.least / self.step) * self.step, most + 1, self.step)
        whole = (full,) if most == full and full % self.step else ()
        return (*multiples, *whole)


@dataclass(frozen=True)
class Term:
    """A monomial of a cost: coefficient times the product of width ** exponent.

    Attributes:
        coefficient: in the unit of the cost, not negative: a wider dimension never costs less.
        powers: (index of the dimension, exponent), exponents at least 1, every index once; empty
            for a constant.
    """

    coefficient: float
    powers: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        """Checks the signs."""
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            raise WidthError(f"coefficients must be finite and >= 0, not {self.coefficient!r}")
        if any(exponent < 1 for _, exponent in self.powers):
            raise WidthError(f"exponents must be at least 1: {self.powers}")
        if len({index for index, _ in self.powers}) < len(self.powers):
            raise WidthError(f"a dimension occurs twice, add its exponents: {self.powers}")


@dataclass(frozen=True)
class Cost:
    """A polynomial of the widths and the most that it may come to.

    Attributes:
        name: "flops", "params", ...
        terms: what is added up.
        limit: in the unit of the terms.
    """

    name: str
    terms: tuple[Term, ...]
    limit: float

    def __post_init__(self) -> None:
        """Checks the limit."""
        if not math.isfinite(self.limit):
            raise WidthError(f"the limit on {self.name} must be finite, not {self.limit!r}")


@dataclass(frozen=True)
class WidthProblem:
    """Which units to keep: the most value within every limit.

    Attributes:
        dimensions: what may be narrowed.
        costs: what is limited.
    """

    dimensions: tuple[Dimension, ...]
    costs: tuple[Cost, ...]

    def __post_init__(self) -> None:
        """Checks that the costs speak of dimensions that exist."""
        for cost in self.costs:
            for term in cost.terms:
                for index, _ in term.powers:
                    if not 0 <= index < len(self.dimensions):
                        raise WidthError(f"{cost.name}: there is no dimension {index}")


@dataclass(frozen=True)
class Allocation:
    """A width for every dimension and what is proven about it.

    Attributes:
        widths: units kept, by dimension. If "infeasible": the least widths.
        value: sum of the gains kept.
        bound: no allocation within the limits keeps more. If "infeasible": the value.
        gap: (bound - value) / bound; inf if "infeasible".
        status: "optimal" (gap below 1e-9), "feasible", or "infeasible" (proven: even the least
            widths exceed a limit; their costs are the smallest possible limits).
        seconds: time used.
        costs: what the widths cost, by cost; none exceeds its limit unless "infeasible".
    """

    widths: tuple[int, ...]
    value: float
    bound: float
    gap: float
    status: str
    seconds: float
    costs: tuple[float, ...]


OnProgress = Callable[[Allocation], None]
