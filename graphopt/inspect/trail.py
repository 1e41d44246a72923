"""What passes did, as notes on nodes: from their reports, and from the graphs before and after.

Reports name nodes in lists of records (``{"node": ..., ...}``); any pass that does so is
understood.  Passes that plan the step name nodes of the joint graph, all others those of the
forward graph that they were given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt import registry
from graphopt.inspect.diff import Change, Diff, compare, plain_document
from graphopt.inspect.entries import listing
from graphopt.instruments import Instrument
from graphopt.pipeline import Position
from graphopt.plain import human_bytes, to_plain

if TYPE_CHECKING:
    from graphopt.inspect.document import Mode
    from graphopt.ir.program import PassRecord, Program
    from graphopt.pipeline import Pass, PassContext, PassResult

Notes = Mapping[str, Sequence[str]]
_LISTS = ("sites",)  # lists whose name adds nothing to the note


def node_facts(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Notes by node name that a pass's report holds.

    Args:
        report: Sections by name, as in `graphopt.ir.program.PassRecord`.
    """
    notes: dict[str, list[str]] = {}
    for section, values in to_plain(report).items():
        for key, value in values.items() if isinstance(values, dict) else ():
            for record in value if isinstance(value, list) else ():
                if isinstance(record, dict) and isinstance(record.get("node"), str):
                    label = section if key in _LISTS or key == section else f"{section} {key}"
                    notes.setdefault(record["node"], []).append(f"{label}: {_text(record)}")
    return notes


def tensor_facts(history: Sequence[PassRecord]) -> dict[str, list[str]]:
    """Notes by parameter: what is kept of it.

    Args:
        history: The passes that ran.
    """
    notes: dict[str, list[str]] = {}
    for record in history:
        for section, values in record.report.items():
            kept = values.get("kept") if isinstance(values, Mapping) else None
            for path, axes in kept.items() if isinstance(kept, Mapping) else ():
                if isinstance(axes, Mapping):
                    parts = [f"{len(places)} kept on axis {axis}" for axis, places in axes.items()]
                    notes.setdefault(str(path), []).append(f"{section}: {', '.join(parts)}")
    return notes


def step_facts(history: Sequence[PassRecord]) -> dict[str, list[str]]:
    """Notes by node of the joint graph, from the passes that plan the step."""
    notes: dict[str, list[str]] = {}
    known = registry.passes()
    for record in history:
        cls = known.get(record.name)
        if cls is not None and cls.position >= Position.BACKWARD:
            for name, texts in node_facts(record.report).items():
                notes.setdefault(name, []).extend(texts)
    return notes


def _text(record: Mapping[str, Any]) -> str:
    values = {k: v for k, v in record.items() if k not in ("node", "op") and v is not None}
    parts = [str(v) for k, v in values.items() if isinstance(v, str) and k != "reason"]
    if "kept" in values and "total" in values:
        parts.append(f"{values['kept']} of {values['total']} kept")
    if "bytes_before" in values and "bytes_after" in values:
        sizes = human_bytes(values["bytes_before"]), human_bytes(values["bytes_after"])
        parts.append(sizes[0] if sizes[0] == sizes[1] else f"{sizes[0]} to {sizes[1]}")
    if isinstance(values.get("reason"), str):
        parts.append(values["reason"])
    return ", ".join(parts)


class Trail(Instrument):
    """Follows nodes through a pipeline and notes on each what the passes did to it.

    Give it to `graphopt.optimize` as an instrument; afterwards ``trail.notes`` are the notes on the
    forward graph of the last program, and ``trail.dump`` prints a program with them.
    """

    def __init__(self) -> None:
        """No notes yet."""
        self.notes: dict[str, list[str]] = {}

    def start(self, program: Program, context: PassContext) -> None:
        """Forget an earlier run."""
        self.notes = {}

    def after(self, pass_: Pass, before: Program, result: PassResult, seconds: float) -> None:
        """Note what the pass did."""
        after = result.program
        facts = {} if pass_.position >= Position.BACKWARD else node_facts(result.report)
        if after.module is before.module:
            self._add(facts)
            return
        found = compare(listing(plain_document(before)), listing(plain_document(after)))
        old, self.notes = self.notes, {}
        for one, two in found.pairs.items():
            if one in old:
                self.notes[two] = list(old[one])
        self._add({c.entry.name: list(_changed(pass_.name, c)) for c in found.changes if c.after})
        for name, texts in facts.items():
            place = found.pairs.get(name) or _successor(found, name)
            if place is not None:
                self._add({place: texts})

    def _add(self, notes: Notes) -> None:
        for name, texts in notes.items():
            if texts:
                self.notes.setdefault(name, []).extend(texts)

    def dump(self, program: Program, form: str = "py", *, training: Mode = True) -> str:
        """A program as text (see `graphopt.inspect.dump`), Python with the notes."""
        from graphopt.inspect import dump

        return dump(program, form, training=training, notes=self.notes)


def _changed(name: str, change: Change) -> Iterator[str]:
    if change.before is None:
        yield f"{name}: new"
        return
    for what, (was, _) in change.fields.items():
        if what in ("op", "type", "state"):
            yield f"{name}: was {was}"
        elif what == "arguments":
            yield f"{name}: other arguments"


def _successor(found: Diff, gone: str) -> str | None:
    """What gives the value of a node that isn't there any more: what its first reader reads."""
    after = {entry.name: entry for entry in found.after.entries}
    for entry in found.before.entries:
        if gone in entry.operands and entry.name in found.pairs:
            operands = after[found.pairs[entry.name]].operands
            place = entry.operands.index(gone)
            if len(operands) == len(entry.operands):
                return operands[place]
    return None
