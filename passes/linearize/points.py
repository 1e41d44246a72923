"""The points of a Pareto sweep, which of them are worth having, and their table."""

from __future__ import annotations

import csv
import dataclasses
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from graphopt.errors import UsageError
from graphopt.files import write_text
from graphopt.plain import to_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Measure = Literal["evaluated", "agreement", "likeness"]
COSTS = ("relus", "relu_sites", "bytes", "rounds", "seconds")


@dataclass(frozen=True)
class Point:
    """A network under a protocol.

    Attributes:
        option: Options of the pass; empty for the source itself.
        budget: The budget; empty for the source itself.
        relus: Elements of one sample that non-linearities evaluate.
        relu_sites: Calls of non-linearities that evaluate any.
        protocol: Under which it is priced.
        bytes: Predicted, of all parties, for one inference on the example inputs.
        rounds: Predicted.
        seconds: Of communication, predicted.
        accuracy: Higher is better; see `Sweep.measure`.
        reason: Why there are no figures, or None.
    """

    option: str
    budget: str
    relus: int | None = None
    relu_sites: int | None = None
    protocol: str = ""
    bytes: float | None = None
    rounds: int | None = None
    seconds: float | None = None
    accuracy: float | None = None
    reason: str | None = None

    @property
    def is_source(self) -> bool:
        """Whether this is the model as it came."""
        return not self.budget


@dataclass(frozen=True)
class Sweep:
    """All points of a sweep.

    Attributes:
        points: The source's own first, for each protocol; then by option and budget.
        measure: What accuracy is: ``evaluated`` by the user's function; ``agreement``: share of
            samples with the source's largest output; ``likeness``: 1 less the relative error of
            the outputs.
        protocols: The protocols.
        network: The network.
        interrupted: Whether Ctrl-C ended the sweep before all points were found.
    """

    points: tuple[Point, ...]
    measure: Measure
    protocols: tuple[str, ...]
    network: str
    interrupted: bool = False

    def frontier(
        self, by: str | Sequence[str] = "seconds", protocol: str | None = None
    ) -> tuple[Point, ...]:
        """The points that no other beats: none is as accurate and as cheap, and better in one.

        Args:
            by: The cost, or several: ``relus``, ``relu_sites``, ``bytes``, ``rounds``,
                ``seconds``.
            protocol: Of the protocols; default: the first.

        Returns:
            The points by rising (first) cost.

        Raises:
            UsageError: An unknown cost or protocol.
        """
        costs = (by,) if isinstance(by, str) else tuple(by)
        name = self.protocols[0] if protocol is None else protocol
        for given, known in ((costs, COSTS), ((name,), self.protocols)):
            if not given or not set(given) <= set(known):
                raise UsageError(f"no {', '.join(given)} here", hint=f"one of {', '.join(known)}")
        told = [
            (point, _figures(point, costs))
            for point in self.points
            if point.protocol == name and None not in _figures(point, costs)
        ]
        kept = [p for p, mine in told if not any(_beats(other, mine) for _, other in told)]
        return tuple(sorted(kept, key=lambda p: _figures(p, costs)))

    def rows(self) -> list[dict[str, Any]]:
        """The points as plain mappings, with what is on the frontier of seconds."""
        best = {id(p) for name in self.protocols for p in self.frontier("seconds", name)}
        return [{**dataclasses.asdict(p), "frontier": id(p) in best} for p in self.points]

    def csv(self) -> str:
        """The table as text: a line of names, a line for each point; what is missing is empty."""
        lines = io.StringIO()
        names = [*(f.name for f in dataclasses.fields(Point)), "network", "frontier"]
        writer = csv.DictWriter(lines, names, lineterminator="\n")
        writer.writeheader()
        for row in self.rows():
            writer.writerow({**row, "network": self.network, "frontier": int(row["frontier"])})
        return lines.getvalue()

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write `csv` to a file, whole or not at all.

        Raises:
            OutputError: It can't be written.
        """
        write_text(path, self.csv())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {
            "schema_version": 1,
            "measure": self.measure,
            "network": self.network,
            "interrupted": self.interrupted,
            "points": to_plain(self.rows()),
        }

    def plot(self) -> Figure:
        """Draw accuracy against the seconds under each protocol, and against the count.

        Returns:
            A matplotlib figure; ``figure.savefig("frontier.png")`` writes it.

        Raises:
            UnsupportedError: matplotlib isn't installed.
        """
        from graphopt.passes.linearize.chart import draw

        whole: Any = self  # to a type checker the class is another one by its installed path
        return draw(whole)


def _figures(point: Point, costs: Sequence[str]) -> tuple[Any, ...]:
    """Costs, and what accuracy lacks: less is better in all."""
    lacking = None if point.accuracy is None else -point.accuracy
    return (*(getattr(point, cost) for cost in costs), lacking)


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)
