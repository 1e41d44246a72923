"""Table and plot of the rematerialization benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from tests.benchmarks.rematerialization import Point

STYLES = {
    "eager": ("black", "*", "eager"),
    "checkpoint": ("#d95f02", "s", "torch.utils.checkpoint, per block"),
    "min-cut": ("#7570b3", "^", "torch.compile, activation_memory_budget"),
    "alone": ("#66a61e", "v", "graphopt, rematerialize alone"),
    "graphopt": ("#1b9e77", "o", "graphopt"),
    "granted": ("#e7298a", "D", "graphopt, gradient error 1 %"),
}


def _cells(point: Point, eager: Point) -> list[str]:
    if point.note:
        return [point.method, point.setting, *[""] * 10, point.note]
    ratio = "-" if point.time_ratio is None else f"{point.time_ratio:.2f}"
    predicted = "-" if point.predicted is None else f"{point.predicted / point.peak - 1:+.1%}"
    overhead = "-" if point.overhead is None else f"{point.overhead:.2%}"
    bound = "-" if point.lower_bound is None else f"{point.lower_bound:.2%}"
    return [
        point.method,
        point.setting,
        f"{point.saved:,}",
        f"{point.peak:,}",
        f"{point.peak / eager.peak:.1%}",
        predicted,
        f"{point.recomputed / eager.flops:+.1%}",
        overhead,
        bound,
        ratio,
        f"{point.plan_seconds:.1f}",
        f"{point.gradient_error:.0e}",
        "",
    ]


def row_text(point: Point, eager: Point) -> str:
    """One line of progress."""
    return "  ".join(_cells(point, eager))


def print_table(
    by_model: Mapping[str, Sequence[Point]], found: Mapping[str, Mapping[str, Any]]
) -> None:
    """Print a table for each model, and how ours stands against the peers."""
    console = Console(width=170)
    for name, points in by_model.items():
        table = Table(title=name)
        for head in ("method", "setting"):
            table.add_column(head)
        for head in (
            "saved B",
            "peak B",
            "of eager",
            "predicted",
            "recomputed",
            "overhead",
            "bound",
            "time",
            "plan s",
            "grad. error",
        ):
            table.add_column(head, justify="right")
        table.add_column("note")
        for point in points:
            table.add_row(*_cells(point, points[0]))
        console.print(table)
        for key, value in found[name].items():
            text = f"{value:.3f}" if isinstance(value, float) else str(value)
            console.print(f"  {key}: {text}")


def plot(by_model: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw peak against recomputed FLOPs, one panel a model, one curve a method."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    count = len(by_model)
    figure, axes = plt.subplots(1, count, figsize=(6.2 * count, 4.6), squeeze=False)
    for axis, (name, points) in zip(axes[0], by_model.items(), strict=True):
        _panel(axis, name, points)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.suptitle("Peak memory of a training step against recomputation")
    figure.legend(
        handles, labels, loc="lower center", ncols=2 * len(by_model), fontsize=8, frameon=False
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axis: Any, name: str, points: Sequence[Point]) -> None:
    eager = points[0]
    for method, (color, marker, label) in STYLES.items():
        mine = [p for p in points if p.method == method and not p.note]
        if not mine:
            continue
        if method in ("alone", "graphopt", "granted"):
            mine.sort(key=lambda p: (p.recomputed, -p.peak))
        x = [100 * p.recomputed / eager.flops for p in mine]
        y = [p.peak / 1e6 for p in mine]
        line = "none" if len(mine) == 1 else "-"
        axis.plot(x, y, color=color, marker=marker, linestyle=line, label=label, linewidth=1.4)
        if method == "min-cut":
            for a, b, p in zip(x, y, mine, strict=True):
                axis.annotate(p.setting, (a, b), (4, 4), textcoords="offset points", fontsize=7)
    axis.axhline(eager.peak / 1e6, color="black", linewidth=0.6, linestyle=":")
    axis.set_ylim(bottom=0)
    axis.set_xlabel("recomputed FLOPs, % of an eager step")
    axis.set_ylabel("allocator's peak, MB")
    axis.set_title(name)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
