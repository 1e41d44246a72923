"""The memory of a step over time, by what it is for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.inspect.document import Document, phase_of
from graphopt.inspect.live import LiveBytes

CATEGORIES = ("saved", "forward", "recomputed", "backward", "workspace")
"""``saved``: made forward, read backward; ``forward``: made and let go forward; ``recomputed``:
forward work that is done again; ``backward``: gradients and what leads to them; ``workspace``: what
lives only while one op runs."""


@dataclass(frozen=True)
class Timeline:
    """Live bytes of a step.

    Attributes:
        title: What it is of.
        live: The simulation.
        boundary: The first step of the backward pass, or None.
        names: FX node -> name in the union.
        categories: What each of `live.lifetimes` is.
    """

    title: str
    live: LiveBytes
    boundary: int | None
    names: Mapping[fx.Node, str]
    categories: tuple[str, ...]

    def over_boundary(self) -> dict[str, int]:
        """Node -> bytes of it that are kept from forward for backward."""
        found: dict[str, int] = {}
        for lifetime, category in zip(self.live.lifetimes, self.categories, strict=True):
            if category == "saved":
                name = self.names[lifetime.node]
                found[name] = found.get(name, 0) + lifetime.bytes
        return found

    def at_peak(self) -> dict[str, int]:
        """Node -> bytes of it that are live at the peak."""
        found: dict[str, int] = {}
        for node, size in self.live.holders.items():
            found[self.names[node]] = found.get(self.names[node], 0) + size
        return found

    def to_dict(self, index: Mapping[str, int], budget: int | None) -> dict[str, Any]:
        """JSON-able form.

        Args:
            index: Name -> position among the document's nodes.
            budget: What was allowed, in bytes.
        """
        steps = [node for node, _ in self.live.timeline]
        peak_step = next((i for i, n in enumerate(steps) if n is self.live.at), None)
        spans = [
            [index[self.names[each.node]], each.start, each.end, each.bytes, CATEGORIES.index(kind)]
            for each, kind in zip(self.live.lifetimes, self.categories, strict=True)
        ]
        return {
            "title": self.title,
            "categories": list(CATEGORIES),
            "steps": [index[self.names[node]] for node in steps],
            "boundary": self.boundary,
            "spans": spans,
            "workspace": [self.live.measured[node].workspace for node in steps],
            "peak": self.live.peak,
            "peak_step": peak_step,
            "budget": budget,
        }


def timeline(
    title: str, shown: Document, live: LiveBytes, names: Mapping[fx.Node, str]
) -> Timeline:
    """Sort the allocations of a simulated step into categories.

    Args:
        title: What the step is of.
        shown: Its document.
        live: The simulation of it.
        names: FX node -> name in the union.
    """
    phases = {n: phase_of(s, n) for s in shown.segments for n in s.module.graph.nodes}
    segments = {n: s.phase for s in shown.segments for n in s.module.graph.nodes}
    boundary = None
    for step, (node, _) in enumerate(live.timeline):
        if phases[node] == "backward" or segments[node] == "backward":
            boundary = step
            break
    kinds = []
    for lifetime in live.lifetimes:
        phase = phases[lifetime.node]
        if phase == "forward" and boundary is not None and lifetime.end >= boundary:
            phase = "saved" if lifetime.start < boundary else "recomputed"
        kinds.append(phase)
    return Timeline(title, live, boundary, names, tuple(kinds))
