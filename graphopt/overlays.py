"""Facts about single nodes that passes report, in one form that every view can draw.

A pass draws nothing itself: `graphopt.pipeline.Pass.facts` turns the sections of its report into
`Overlay`s.  The default understands the sections of `graphopt.report`, and any section with a key
``overlays`` that holds a list of mappings with the fields of an `Overlay`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from graphopt.errors import GraphoptError

Value = str | float
_KINDS = ("categorical", "sequential", "diverging")
_SPACES = ("program", "joint", "state")
_RULES = {
    "keep": "kept between forward and backward",
    "recompute": "made again for the backward pass",
}


@dataclass(frozen=True)
class Overlay:
    """One fact about many nodes.

    Attributes:
        name: Identifier, unique within a pass.
        title: What people read.
        kind: ``categorical`` (values are text), ``sequential`` (numbers from 0 up), or
            ``diverging`` (numbers on both sides of 0).
        values: Value by name.
        of: What the names are: nodes of the program's forward graph, nodes of its joint graph, or
            parameters and buffers (their readers show the value).
        unit: Of numbers: ``bytes``, ``flops``, ``seconds``, ``fraction``, or empty.
        before: The same before the pass, where that differs.
        legend: What each category means.
        notes: A sentence for single names.
    """

    name: str
    title: str
    kind: Literal["categorical", "sequential", "diverging"]
    values: Mapping[str, Value]
    of: Literal["program", "joint", "state"] = "program"
    unit: str = ""
    before: Mapping[str, Value] = field(default_factory=dict)
    legend: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in _KINDS or self.of not in _SPACES:
            raise GraphoptError(
                f"overlay {self.name!r}: kind {self.kind!r}, of {self.of!r}",
                hint=f"kind is one of {', '.join(_KINDS)}; of is one of {', '.join(_SPACES)}",
            )
        wanted = str if self.kind == "categorical" else (int, float)
        for name, value in (*self.values.items(), *self.before.items()):
            finite = isinstance(value, str) or math.isfinite(value)
            if not isinstance(value, wanted) or isinstance(value, bool) or not finite:
                raise GraphoptError(f"overlay {self.name!r}: {name} has the value {value!r}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Overlay:
        """Read one from plain data.

        Raises:
            GraphoptError: Fields that are missing, unknown or out of range.
        """
        known = {f.name for f in dataclasses.fields(cls)}
        if not isinstance(data, Mapping) or set(data) - known:
            raise GraphoptError(f"an overlay has the fields {', '.join(sorted(known))}")
        try:
            return cls(**data)
        except TypeError as error:
            raise GraphoptError(f"an overlay can't be read: {error}") from None


def section_overlays(name: str, section: Mapping[str, Any]) -> Iterator[Overlay]:
    """The overlays of a section of a report.

    Args:
        name: Name of the section.
        section: Its plain data.
    """
    if name == "share":
        yield from _share(section)
    if name == "prune":
        yield from _prune(section)
    if name == "sparsify":
        yield from _sparsify(section)
    for data in section.get("overlays") or ():
        yield Overlay.from_dict(data)


def _share(section: Mapping[str, Any]) -> Iterator[Overlay]:
    sites = section.get("sites") or ()
    rules = {site["node"]: str(site["rule"]) for site in sites}
    if not rules:
        return
    legend = {rule: _RULES.get(rule, f"kept as: {rule}") for rule in sorted(set(rules.values()))}
    reasons = {
        entry["node"]: f"{entry['rule']} not applied: {entry['reason']}"
        for entry in section.get("refused") or ()
    }
    yield Overlay(
        "decision", "decision", "categorical", rules, "joint", legend=legend, notes=reasons
    )
    yield Overlay(
        "kept",
        "bytes kept for backward",
        "sequential",
        {site["node"]: site["bytes_after"] for site in sites},
        "joint",
        "bytes",
        before={site["node"]: site["bytes_before"] for site in sites},
    )


def _prune(section: Mapping[str, Any]) -> Iterator[Overlay]:
    frozen: dict[str, list[str]] = {}
    for entry in section.get("frozen") or ():
        text = f"{entry['parameter']}, axis {entry['axis']}: {entry['reason']}"
        frozen.setdefault(entry["parameter"], []).append(text)
    pruned = dict.fromkeys(section.get("kept") or (), "pruned")
    values = {**dict.fromkeys(frozen, "frozen"), **pruned}
    if values:
        legend = {"pruned": "some units removed", "frozen": "nothing can be removed"}
        notes = {name: "; ".join(texts) for name, texts in frozen.items()}
        yield Overlay(
            "pruned", "pruned", "categorical", values, "state", legend=legend, notes=notes
        )


def _sparsify(section: Mapping[str, Any]) -> Iterator[Overlay]:
    matrices = section.get("matrices") or ()
    values = {name: kept / total for name, total, kept in matrices if total}
    notes = {name: f"{kept} of {total} weights kept" for name, total, kept in matrices}
    if values:
        yield Overlay(
            "weights", "weights kept", "sequential", values, "state", "fraction", notes=notes
        )
