"""The chart of a sweep: accuracy against seconds and against the count, the frontier joined."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.charts import COLOURS, MARKERS, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from graphopt.passes.linearize.points import Point, Sweep

_LABELS = {
    "evaluated": "accuracy, %",
    "agreement": "agreement with the source, %",
    "likeness": "1 - relative error of the outputs, %",
}
# From where an axis is logarithmic: the largest value to the smallest.
_WIDE = 8.0
# Directions in which a label is tried, and distances in points.
_AROUND = ((1, -1), (1, 1), (-1, 1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
_DISTANCES = (6.0, 10.0, 15.0, 22.0)
_PER_PANEL, _HEIGHT, _LEGEND = 4.8, 3.9, 0.3


def draw(sweep: Sweep) -> Figure:
    """Draw a panel for the seconds under each protocol, and one for the count.

    Raises:
        UnsupportedError: matplotlib isn't installed.
    """
    panels = [("seconds", name) for name in sweep.protocols] + [("relus", sweep.protocols[0])]
    styles = _styles(sweep)
    lines = -(-(len(styles) + 3) // (2 * len(panels)))
    height = _HEIGHT + _LEGEND * lines
    figure = new_figure(_PER_PANEL * len(panels), height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    figure.subplots_adjust(
        left=0.75 / (_PER_PANEL * len(panels)), right=0.98, wspace=0.08,
        top=1 - 0.35 / height, bottom=(0.75 + _LEGEND * lines) / height,
    )  # fmt: skip
    axes[0].set_ylabel(_LABELS[sweep.measure])
    for axis, (cost, name) in zip(axes, panels, strict=True):
        _panel(axis, sweep, cost, name, styles)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="lower center", ncols=2 * len(panels), fontsize=8, frameon=False
    )
    return figure


def _styles(sweep: Sweep) -> dict[str, tuple[str, str]]:
    """Colour and marker of each option."""
    options = dict.fromkeys(p.option for p in sweep.points if not p.is_source)
    return dict(zip(options, zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS)), strict=False))


def _panel(
    axis: Any, sweep: Sweep, cost: str, protocol: str, styles: dict[str, tuple[str, str]]
) -> None:
    """Points, the frontier, and what the points are."""
    points = [
        p
        for p in sweep.points
        if p.protocol == protocol and p.accuracy is not None and getattr(p, cost) is not None
    ]
    best = sweep.frontier(cost, protocol)

    def place(point: Point) -> tuple[float, float]:
        return float(getattr(point, cost)), 100 * float(point.accuracy or 0.0)

    line = [place(p) for p in best]
    axis.plot(
        *zip(*line, strict=True) if line else ((), ()), drawstyle="steps-post", color="0.55",
        linewidth=1.2, zorder=1, label="frontier",
    )  # fmt: skip
    for option, (color, marker) in styles.items():
        mine = [p for p in points if p.option == option and not p.is_source]
        _scatter(axis, [place(p) for p in mine if p in best], color, marker, option or "defaults")
        _scatter(axis, [place(p) for p in mine if p not in best], color, marker, None)
    _scatter(axis, [], "0.3", "o", "beaten by another", hollow=True)
    source = [place(p) for p in points if p.is_source]
    axis.plot(*zip(*source, strict=True) if source else ((), ()), "k*", ms=11, label="source")
    network = f", {sweep.network}" if cost == "seconds" else ""
    unit = "s of communication" if cost == "seconds" else "non-linearities evaluated per sample"
    axis.set_xlabel(unit)
    axis.set_title(f"{protocol}{network}" if cost == "seconds" else "count", fontsize=10)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.grid(color="0.92", linewidth=0.7, zorder=0)
    axis.set_axisbelow(True)
    axis.margins(0.09, 0.12)
    _scale(axis, [x for x, _ in map(place, points)])
    names = [("source" if p.is_source else p.budget, place(p)) for p in best]
    _name(axis, names, [place(p) for p in points], line)


def _scatter(
    axis: Any,
    places: Sequence[tuple[float, float]],
    color: str,
    marker: str,
    label: str | None,
    hollow: bool = False,
) -> None:
    """Markers; those without a label are hollow, since another point beats them."""
    x, y = zip(*places, strict=True) if places else ((), ())
    face = "white" if hollow or label is None else color
    axis.plot(
        x, y, linestyle="none", marker=marker, color=color, markerfacecolor=face, markersize=6.5,
        markeredgewidth=1.3, label=label, zorder=3,
    )  # fmt: skip


def _scale(axis: Any, values: Sequence[float]) -> None:
    """A logarithmic axis where values lie far apart; zero stays on it."""
    positive = [v for v in values if v > 0]
    if not positive or max(positive) < _WIDE * min(positive):
        axis.set_xlim(left=0) if values and min(values) == 0 else None
        return
    if min(values) > 0:
        axis.set_xscale("log")
    else:
        axis.set_xscale("symlog", linthresh=min(positive))
        axis.set_xlim(left=-0.15 * min(positive))


def _name(
    axis: Any,
    names: Sequence[tuple[str, tuple[float, float]]],
    points: Sequence[tuple[float, float]],
    line: Sequence[tuple[float, float]],
) -> None:
    """Write what points are beside them where nothing else is; not at all without room."""
    figure = axis.figure
    renderer = figure.canvas.get_renderer()
    axis.get_ylim()  # limits are settled before places on the canvas are asked for
    to_canvas = axis.transData.transform
    taken = [_box(to_canvas(place), 5.5 * figure.dpi / 72) for place in points]
    taken += [_box(each, 1.0) for each in _along(line, to_canvas)]
    inside = axis.get_window_extent(renderer)
    for text, place in names:
        for distance, (right, up) in itertools.product(_DISTANCES, _AROUND):
            label = axis.annotate(
                text, place, (right * distance, up * distance), textcoords="offset points",
                ha=("center", "left", "right")[right], va=("center", "bottom", "top")[up],
                fontsize=7.5, zorder=4,
            )  # fmt: skip
            own = label.get_window_extent(renderer)
            room = inside.x0 <= own.x0 and own.x1 <= inside.x1
            room = room and inside.y0 <= own.y0 and own.y1 <= inside.y1
            if room and not any(_overlap(own.extents, box) for box in taken):
                taken.append(tuple(own.extents))
                break
            label.remove()


def _box(center: Any, radius: float) -> tuple[float, float, float, float]:
    x, y = center
    return x - radius, y - radius, x + radius, y + radius


def _along(
    line: Sequence[tuple[float, float]], to_canvas: Callable[[Any], Any]
) -> list[tuple[float, float]]:
    """Places on the steps of a line, close to each other."""
    found: list[tuple[float, float]] = []
    for (x, y), (u, v) in itertools.pairwise(line):
        corners = [to_canvas(p) for p in ((x, y), (u, y), (u, v))]
        for a, b in itertools.pairwise(corners):
            found += [tuple(a + (b - a) * step / 60) for step in range(61)]
    return found


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
