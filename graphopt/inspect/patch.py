"""A difference of two graphs as coloured text, with the modules as headings."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from graphopt.inspect.text import one_line
from graphopt.plain import human_bytes

if TYPE_CHECKING:
    from rich.text import Text

    from graphopt.inspect.diff import Change, Diff
    from graphopt.inspect.entries import Entry

_STYLES = {"-": "red", "+": "green", "~": "yellow", " ": "dim", "@": "bold cyan", "#": "dim"}


@dataclass(frozen=True)
class _Line:
    """One line: its sign, the text, and whose module it stands in."""

    sign: str
    text: str
    scope: str = ""


def patch(diff: Diff, context: int) -> Text:
    """A `rich` text of a difference; empty if there is none."""
    from rich.text import Text

    result = Text()
    for sign, text in _laid_out(diff, context):
        result.append(f"{text}\n", style=_STYLES[sign])
    return result


def patch_html(diff: Diff) -> str:
    """A difference as a piece of HTML."""
    # On a light and on a dark page.
    colours = {"-": "#d1453b", "+": "#2e9b57", "~": "#b07d00", "@": "#2f81d6"}
    rows = [
        f'<span style="color:{colours.get(sign, "inherit")}">{html.escape(text)}</span>'
        for sign, text in _laid_out(diff, 1)
    ]
    return f"<pre>{chr(10).join(rows) or 'no difference'}</pre>"


def _laid_out(diff: Diff, context: int) -> Iterator[tuple[str, str]]:
    """Signs and lines: headings, changes, and the unchanged nodes around them."""
    lines = list(_lines(diff))
    shown = _near(lines, context)
    scope: str | None = None
    skipped = 0
    for line, is_shown in zip(lines, shown, strict=True):
        if not is_shown:
            skipped += 1
            continue
        if skipped:
            yield "#", f"     ... {skipped} unchanged"
            skipped = 0
        if line.scope != scope:
            scope = line.scope
            yield "@", f"@@ {scope}"
        yield line.sign, f"{line.sign}    {line.text}".rstrip()
    if skipped and any(shown):
        yield "#", f"     ... {skipped} unchanged"
    for change in diff.state:
        sign = {"added": "+", "removed": "-"}.get(change.kind, "~")
        types = dict.fromkeys(text for text in (change.before, change.after) if text)
        what = "other values" if change.kind == "values" else change.kind
        text = f"state[{one_line(change.path)!r}] {' -> '.join(types)} ({what})"
        yield sign, f"{sign}    {text}"


def _near(lines: list[_Line], context: int) -> list[bool]:
    places = [index for index, line in enumerate(lines) if line.sign != " "]
    shown = [False] * len(lines)
    for place in places:
        for index in range(max(0, place - context), min(len(lines), place + context + 1)):
            shown[index] = True
    return shown


def _lines(diff: Diff) -> Iterator[_Line]:
    """All nodes in the order of the second graph, removed ones behind those that they followed."""
    partner = {two: one for one, two in diff.pairs.items()}
    at: dict[str, list[Change]] = {}
    removed: dict[str | None, list[Change]] = {}
    for change in diff.changes:
        if change.after is not None:
            at.setdefault(change.after.name, []).append(change)
    gone = {c.before.name: c for c in diff.changes if c.after is None and c.before is not None}
    last: str | None = None
    for entry in diff.before.entries:
        if entry.name in gone:
            removed.setdefault(last, []).append(gone[entry.name])
        else:
            last = entry.name
    for change in removed.get(None, ()):
        yield from _changed(change)
    for entry in diff.after.entries:
        if entry.name in at:
            for change in at[entry.name]:
                yield from _changed(change)
        else:
            yield _Line(" ", _described(entry), _heading(entry))
        for change in removed.get(partner.get(entry.name, ""), ()):
            yield from _changed(change)


def _changed(change: Change) -> Iterator[_Line]:
    before, after = change.before, change.after
    if change.kind == "rewired" and before is not None and after is not None:
        was, now = change.fields["operands"]
        yield _Line("~", f"{_described(after)}; reads {now}, was {was}", _heading(after))
        return
    if before is not None:
        yield _Line("-", _described(before), _heading(change.entry))
    if after is not None:
        yield _Line("+", _described(after), _heading(after))


def _described(entry: Entry) -> str:
    notes = [entry.type] if entry.type else []
    notes += [human_bytes(entry.bytes)] if entry.bytes else []
    comment = f"  # {', '.join(notes)}" if notes else ""
    return one_line(f"{entry.text()}{comment}")


def _heading(entry: Entry) -> str:
    if entry.op != "call":
        return f"{entry.op}s"
    path = entry.scope or "root"
    text = f"{path}: {entry.module}" if entry.module else path
    return one_line(text if entry.phase == "forward" else f"{text} ({entry.phase})")


def summary(diff: Diff) -> dict[str, Any]:
    """How many nodes have which kind of change."""
    counts: dict[str, Any] = {}
    for change in diff.changes:
        counts[change.kind] = counts.get(change.kind, 0) + 1
    if diff.state:
        counts["tensors"] = len(diff.state)
    return counts
