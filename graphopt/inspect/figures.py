"""The summary of an inspection: budget, before and after, what each pass did, bounds, warnings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from graphopt.inspect.states import State
from graphopt.report import human_value

_UNITS = (
    (("bytes", "peak", "saved"), "bytes"),
    (("flops",), "flops"),
    (("seconds", "latency"), "seconds"),
)
_LABELS = {
    "saved": "saved for backward",
    "flops": "FLOPs of one forward",
    "params": "parameters",
    "bytes": "bytes of parameters",
    "relus": "elements of non-linearities",
    "weights": "weights that are not zero",
}
_OBJECTIVES = ("overhead", "objective", "damage", "value")
_LISTED = 8


def summary_form(
    states: Sequence[State], budget: Mapping[str, str], notes: Sequence[str]
) -> dict[str, Any]:
    """The summary as JSON-able data.

    Args:
        states: The states, aligned.
        budget: What was asked for, as fields of text.
        notes: What limits the figures or the view.
    """
    sections = _sections(states)
    return {
        "budget": dict(budget) or _budget_of(states),
        "figures": list(_figures(sections)),
        "bounds": list(_bounds(sections)),
        "warnings": [*notes, *_warnings(sections)],
        "passes": [
            {
                "pass": state.label,
                "changed": state.record.changed,
                "seconds": state.record.seconds,
                "facts": _facts(state.record.report),
            }
            for state in states
            if state.record is not None
        ],
    }


def _sections(states: Sequence[State]) -> dict[str, Mapping[str, Any]]:
    """Sections by name; where two passes report the same one, the last wins."""
    found: dict[str, Mapping[str, Any]] = {}
    for state in states:
        if state.record is not None:
            items = state.record.report.items()
            found.update({n: data for n, data in items if isinstance(data, Mapping)})
    return found


def _budget_of(states: Sequence[State]) -> dict[str, str]:
    """The options of the passes that look like budgets, where nobody says what was asked for."""
    found: dict[str, str] = {}
    for state in states:
        options = state.label.partition("{")[2].removesuffix("}")
        for part in options.split(","):
            key, equals, value = part.partition("=")
            if equals and value[:1].isdigit():
                found[key] = value
    return found


def _unit(key: str) -> str:
    return next((unit for parts, unit in _UNITS if any(p in key for p in parts)), "")


def _figures(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    told: set[tuple[Any, Any]] = set()
    memory = sections.get("memory", {})
    if {"eager_peak", "measured_peak"} <= set(memory):
        told.add((memory["eager_peak"], memory["measured_peak"]))
        yield {
            "label": "peak memory of a step" if memory.get("mode") != "eval" else "peak memory",
            "before": memory["eager_peak"],
            "after": memory["measured_peak"],
            "limit": memory.get("budget"),
            "unit": "bytes",
        }
    for section in sections.values():
        for key, before in section.items():
            stem = key.removesuffix("_before")
            after = section.get(f"{stem}_after")
            if key == stem or not _is_number(before) or not _is_number(after):
                continue
            if (before, after) in told:
                continue
            told.add((before, after))
            yield {
                "label": _LABELS.get(stem, stem.replace("_", " ")),
                "before": before,
                "after": after,
                "unit": _unit(stem),
            }


def _bounds(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for name, section in sections.items():
        bound = section.get("lower_bound", section.get("bound"))
        key = next((k for k in _OBJECTIVES if _is_number(section.get(k))), None)
        if key is None or not _is_number(bound):
            continue
        gap = section.get("gap")
        yield {
            "section": name,
            "what": key.replace("_", " "),
            "value": section[key],
            "bound": bound,
            "gap": gap if _is_number(gap) else abs(section[key] - bound),
            "status": str(section.get("status", "")),
            "unit": "fraction" if key == "overhead" else "",
            "scope": str(section.get("scope", "")),
        }


def _facts(report: Mapping[str, Any]) -> list[list[str]]:
    """``[section, label, text]`` of every figure of a pass."""
    return [
        [name, key.replace("_", " "), human_value(key, value)]
        for name, section in report.items()
        if isinstance(section, Mapping)
        for key, value in section.items()
        if key != "overlays"
    ]


def _warnings(sections: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for name, section in sections.items():
        refused = section.get("refused") or ()
        yield from _listed(
            f"{name}: not applied", [f"{e['rule']} at {e['node']}: {e['reason']}" for e in refused]
        )
        frozen = section.get("frozen") or ()
        if frozen:
            first = frozen[0]
            yield (
                f"{name}: {len(frozen)} axes of parameters can't be pruned (see their readers), "
                f"such as {first['parameter']}, axis {first['axis']}: {first['reason']}"
            )


def _listed(title: str, entries: Sequence[str]) -> Iterator[str]:
    for entry in entries[:_LISTED]:
        yield f"{title}: {entry}"
    if len(entries) > _LISTED:
        yield f"{title}: {len(entries) - _LISTED} more"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
