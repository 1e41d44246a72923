"""Charts for notebooks, as matplotlib figures: memory against overhead, and Pareto curves.

points = graphopt.frontier(model, (x,))
graphopt.inspect.plot_frontier(points, budget="50%")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from graphopt.budget import Quantity, read_field
from graphopt.charts import COLOURS, MARKERS, new_figure
from graphopt.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Better = Literal["higher", "lower"]

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def plot_frontier(
    points: Sequence[tuple[float, float, float]],
    *,
    budget: Any = None,
    measured: tuple[float, float] | None = None,
    title: str = "",
) -> Figure:
    """Draw what memory budgets cost: overhead over peak bytes, above its lower bound.

    Args:
        points: ``(peak bytes, overhead, lower bound)`` as `graphopt.frontier` gives them; overheads
            are fractions of a step.
        budget: A budget to mark: bytes, text such as ``"2GiB"``, or ``"50%"`` of the largest peak.
        measured: ``(peak bytes, overhead)`` of a module that was made, to mark.
        title: Shown above.

    Returns:
        The figure; it is not shown, and no global state of matplotlib is touched.

    Raises:
        UnsupportedError: matplotlib isn't installed.
        UsageError: No points, or points with something that is no number.
        BudgetError: A malformed budget.
    """
    found = _curve(_numbers(points, 3))
    figure, axes = _figure(title)
    scale, unit = _unit(found[-1][0])
    peaks = [point[0] / scale for point in found]
    overheads = [100 * point[1] for point in found]
    bounds = [100 * point[2] for point in found]
    axes.fill_between(peaks, 0, bounds, color="0.5", alpha=0.15, linewidth=0)
    axes.plot(peaks, bounds, "--", color="0.45", linewidth=1, label="proven lower bound")
    axes.plot(peaks, overheads, "o-", color=COLOURS[0], label="planned")
    if measured is not None:
        ((peak, overhead),) = _numbers([measured], 2)
        axes.plot([peak / scale], [100 * overhead], "D", color=COLOURS[1], label="measured")
    if budget is not None:
        limit = _bytes(budget, found[-1][0]) / scale
        axes.axvline(limit, color=COLOURS[1], linewidth=1, linestyle=":", label="budget")
    axes.set_xlabel(f"peak memory, {unit}")
    axes.set_ylabel("overhead, % of a step")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, frameon=False)
    return figure


def plot_pareto(
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    cost: str,
    value: str,
    better: Better = "higher",
    title: str = "",
) -> Figure:
    """Draw points of several methods, those that no other of the same method beats joined.

    Args:
        series: Method -> points ``(cost, value)``; less cost is better.
        cost: Label of the costs, with the unit.
        value: Label of the values.
        better: Whether ``higher`` or ``lower`` values are better.
        title: Shown above.

    Returns:
        The figure.

    Raises:
        UnsupportedError: matplotlib isn't installed.
        UsageError: No points, or points with something that is no number.
    """
    if not series:
        raise UsageError("nothing to draw", hint="give at least one series of points")
    found = {name: _numbers(points, 2) for name, points in series.items()}
    figure, axes = _figure(title)
    styles = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS))
    for (name, points), (colour, marker) in zip(found.items(), styles, strict=False):
        best = pareto(points, better)
        beaten = [point for point in points if point not in best]
        axes.plot(
            [p[0] for p in best], [p[1] for p in best], color=colour, marker=marker, label=name
        )
        axes.scatter(
            [p[0] for p in beaten], [p[1] for p in beaten], marker=marker, facecolors="none",
            edgecolors=colour, alpha=0.7,
        )  # fmt: skip
    axes.set_xlabel(cost, parse_math=False)
    axes.set_ylabel(value, parse_math=False)
    for text in axes.legend(fontsize=8, frameon=False).get_texts():
        text.set_parse_math(False)  # names are text, dollars and all
    return figure


def pareto(
    points: Sequence[tuple[float, ...]], better: Better = "higher"
) -> list[tuple[float, ...]]:
    """The points that no other beats in cost and value, by rising cost.

    Args:
        points: ``(cost, value)``; less cost is better.
        better: Whether ``higher`` or ``lower`` values are better.
    """
    sign = -1.0 if better == "higher" else 1.0
    result: list[tuple[float, ...]] = []
    least = math.inf
    for point in sorted(set(points), key=lambda p: (p[0], sign * p[1])):
        if sign * point[1] < least:
            result.append(point)
            least = sign * point[1]
    return result


def _curve(points: Sequence[tuple[float, ...]]) -> list[tuple[float, float, float]]:
    """One point for each peak, rising; what is proven for a budget holds for smaller ones."""
    best: dict[float, tuple[float, float]] = {}
    for peak, overhead, bound in points:
        known = best.get(peak, (overhead, bound))
        best[peak] = (min(known[0], overhead), max(known[1], bound))
    result = []
    proven = -math.inf
    for peak, (overhead, bound) in sorted(best.items(), reverse=True):
        proven = max(proven, bound)
        result.append((peak, overhead, proven))
    return result[::-1]


def _figure(title: str) -> tuple[Any, Any]:
    figure = new_figure(5.6, 3.8, layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if title:
        axes.set_title(title, fontsize=10, parse_math=False)
    return figure, axes


def _numbers(points: Sequence[Sequence[float]], size: int) -> list[tuple[float, ...]]:
    found = [tuple(float(number) for number in point) for point in points]
    if not found:
        raise UsageError("nothing to draw", hint="give at least one point")
    for point in found:
        if len(point) != size or not all(map(math.isfinite, point)):
            raise UsageError(f"{point} is no point of {size} finite numbers")
    return found


def _unit(largest: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if largest >= unit[0]), _UNITS[-1])


def _bytes(budget: Any, whole: float) -> float:
    read = read_field("memory", budget)
    if isinstance(read, Quantity):
        return whole * read.amount / 100 if read.relative else float(read.amount)
    return float(read)
