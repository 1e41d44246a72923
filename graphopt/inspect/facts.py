"""Facts about nodes as overlays of an inspection: from the passes' reports, and from the graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt import registry
from graphopt.errors import GraphoptError
from graphopt.inspect.nodes import NodeView
from graphopt.inspect.states import State, origin_of
from graphopt.inspect.timeline import Timeline
from graphopt.overlays import Overlay
from graphopt.pipeline import Pass

_FIELDS = (
    ("phase", "forward or backward", "categorical", ""),
    ("bytes", "bytes allocated", "sequential", "bytes"),
    ("flops", "FLOPs", "sequential", "flops"),
    ("seconds", "seconds", "sequential", "seconds"),
)


def field_overlays(nodes: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Overlays whose values are fields of the nodes."""
    return [
        {"name": name, "title": title, "kind": kind, "unit": unit, "field": name}
        for name, title, kind, unit in _FIELDS
        if kind == "categorical" or any(node.get(name) for node in nodes)
    ]


def memory_overlays(before: Timeline, after: Timeline | None) -> Iterator[dict[str, Any]]:
    """What is saved for backward, and what is live at the peak, before and after."""
    for name, title, of in (
        ("saved", "bytes saved for backward", Timeline.over_boundary),
        ("peak", "bytes live at the peak", Timeline.at_peak),
    ):
        first = of(before)
        second = first if after is None else of(after)
        if first or second:
            yield {
                "name": name,
                "title": title,
                "kind": "sequential",
                "unit": "bytes",
                "values": second,
                "before": first,
            }


def pass_overlays(states: Sequence[State]) -> tuple[list[dict[str, Any]], list[str]]:
    """What each pass reported of nodes; and what could not be read."""
    found: list[dict[str, Any]] = []
    notes: list[str] = []
    for position, state in enumerate(states):
        if state.record is None:
            continue
        try:
            reported = _class_of(state.record.name).facts(state.record.report)
        except GraphoptError as error:
            notes.append(f"facts of {state.record.name} can't be shown: {error.message}")
            continue
        for overlay in reported:
            data = _placed(overlay, states[: position + 1])
            if overlay.of != "state" and len(data["values"]) < len(overlay.values):
                missing = len(overlay.values) - len(data["values"])
                notes.append(
                    f"{overlay.title}: {missing} of {len(overlay.values)} not in the graph"
                )
            if data["values"]:
                data.update(since=position, **{"pass": state.label})
                found.append(data)
    return _uniquely_named(found), notes


def kept_overlay(states: Sequence[State]) -> Iterator[dict[str, Any]]:
    """How much of each parameter is left, where some lost channels."""
    first, last = states[0].shown.state, states[-1].shown.state
    values: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, view in states[-1].nodes():
        texts, share = [], 1.0
        for path in view.state:
            if path not in first or path not in last or first[path].shape == last[path].shape:
                continue
            pairs = list(zip(last[path].shape, first[path].shape, strict=False))
            texts.append(f"{path}: " + " × ".join(f"{k} of {n}" for k, n in pairs))
            axes = [k / n for k, n in pairs if n and k != n]
            share = min([share, *axes])
        if texts:
            values[name], notes[name] = share, "; ".join(texts)
    if values:
        yield {
            "name": "channels",
            "title": "channels kept",
            "kind": "sequential",
            "unit": "fraction",
            "values": values,
            "notes": notes,
        }


def _class_of(name: str) -> type[Pass]:
    try:
        return registry.get(name)
    except GraphoptError:  # a pass that isn't installed here: what every pass reports is known
        return Pass


def _placed(overlay: Overlay, states: Sequence[State]) -> dict[str, Any]:
    """An overlay by the names of the union."""
    places = _places(overlay.of, states)

    def spread(values: Mapping[str, Any]) -> dict[str, Any]:
        return {name: v for own, v in values.items() for name in places.get(own, ())}

    data: dict[str, Any] = {
        "name": overlay.name,
        "title": overlay.title,
        "kind": overlay.kind,
        "unit": overlay.unit,
        "values": spread(overlay.values),
    }
    for key in ("before", "notes"):
        if getattr(overlay, key):
            data[key] = spread(getattr(overlay, key))
    if overlay.legend:
        data["legend"] = dict(overlay.legend)
    return data


def _places(space: str, states: Sequence[State]) -> dict[str, tuple[str, ...]]:
    """Name in a space -> names in the union; a later state wins."""
    found: dict[str, tuple[str, ...]] = {}
    for state in states:
        found.update({"state": _readers, "program": _traced, "joint": _own}[space](state))
    return found


def _readers(state: State) -> dict[str, tuple[str, ...]]:
    readers: dict[str, list[str]] = {}
    for view in state.found.views:
        for path in view.state if view.op == "call" else ():
            readers.setdefault(path, []).append(state.names[view.name])
    return {path: tuple(names) for path, names in readers.items()}


def _traced(state: State) -> dict[str, tuple[str, ...]]:
    """Of several nodes that one was traced into, the last that makes something stands for it.

    A linear layer, for example, is the transpose of its weight, a product, and views.
    """
    found: dict[str, NodeView] = {}
    for view in state.found.views:
        node = state.found.nodes.get(view.name)
        if view.phase == "forward" and view.op != "output":
            own = view.name if node is None else origin_of(node) or node.name
            if own not in found or view.bytes != 0:
                found[own] = view
    places = {own: (state.names[view.name],) for own, view in found.items()}
    named = {holder: places[name] for holder, name in state.holders.items() if name in places}
    return {**places, **named}


def _own(state: State) -> dict[str, tuple[str, ...]]:
    return {own: (name,) for own, name in state.own_names().items()}


def _uniquely_named(overlays: list[dict[str, Any]]) -> list[dict[str, Any]]:
    taken: set[str] = {name for name, *_ in _FIELDS} | {"saved", "peak", "channels", "change"}
    for overlay in overlays:
        wish, count = overlay["name"], 1
        while overlay["name"] in taken:
            count += 1
            overlay["name"] = f"{wish}-{count}"
        taken.add(overlay["name"])
    return overlays
