"""What the section ``linearize`` of a report says of single calls, for views to draw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from graphopt.overlays import Overlay

_LEGEND = {
    "kept": "evaluated as in the source",
    "in part": "some elements are kept, the others replaced",
    "replaced": "a polynomial for every element",
}


def overlays(section: Mapping[str, Any]) -> Iterator[Overlay]:
    """Which non-linearities were kept, and how much of each.

    Args:
        section: The plain section.
    """
    sites = [site for site in section.get("sites") or () if site["total"]]
    if not sites:
        return
    notes = {site["node"]: _note(site) for site in sites}
    decisions = {site["node"]: _decision(site) for site in sites}
    yield Overlay(
        "linearized", "non-linearities", "categorical", decisions, legend=_LEGEND, notes=notes
    )
    shares = {site["node"]: site["kept"] / site["total"] for site in sites}
    yield Overlay("elements", "elements kept", "sequential", shares, unit="fraction", notes=notes)


def _decision(site: Mapping[str, Any]) -> str:
    if site["kept"] == site["total"]:
        return "kept"
    return "in part" if site["kept"] else "replaced"


def _note(site: Mapping[str, Any]) -> str:
    text = f"{site['kept']} of {site['total']} elements kept"
    if site["kept"] < site["total"]:
        text += f", the others by {site['choice']}"
    return f"{text}; {site['reason']}" if site.get("reason") else text
