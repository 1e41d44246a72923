"""A self-contained HTML page of one program, or of a program before and after passes.

It needs no network and no script: tables by module, live bytes over the step as a drawing, and all
nodes by stage and module, folded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from graphopt.errors import UnsupportedError
from graphopt.inspect.document import Document, Mode
from graphopt.inspect.live import LiveBytes, live_bytes
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.summary import Summary, summarize
from graphopt.inspect.text import one_line
from graphopt.inspect.views import document
from graphopt.plain import human_bytes, human_count

if TYPE_CHECKING:
    from graphopt.ir.program import Program

_WIDTH, _HEIGHT = 960, 220
_COLOURS = ("#b3541e", "#1a56b8")
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1100px; color: #222; }
table { border-collapse: collapse; margin: .5em 0 1.5em; }
th, td { padding: 2px 10px; border-bottom: 1px solid #e3e3e3; text-align: right; }
th:first-child, td:first-child, td.text { text-align: left; }
code, pre, td { font-variant-numeric: tabular-nums; }
details { margin: 2px 0; } summary { cursor: pointer; }
.recomputed { background: #fff3b0; }
.backward { background: #fdeee3; }
.saved { background: #dff0df; }
.bar { display: inline-block; height: 9px; background: #7aa5e8; margin-right: 4px; }
.muted { color: #777; }
"""


def page(shown: Document, summary: Summary | None = None) -> str:
    """One document as a page."""
    parts = [f"<h1>{_text(shown.title)}: {_text(shown.view)}</h1>", _passes(shown)]
    live = live_bytes(shown)
    parts += [_chart([_Curve(shown.view, live)])]
    if summary is not None:
        parts += ["<h2>Modules</h2>", _summary_table(summary)]
    return _whole(shown.title, [*parts, "<h2>Nodes</h2>", *_node_lists(shown)])


def compare_html(before: Program, after: Program, *, training: Mode = True) -> str:
    """A page that compares two programs: modules, live bytes, and what runs afterwards.

    Args:
        before: The program as captured.
        after: The program after passes.
        training: Mode of the model, or of each module path.
    """
    shown = [_step(before, training), _step(after, training)]
    curves = [
        _Curve(f"{name} ({d.view})", live_bytes(d))
        for name, d in zip(("before", "after"), shown, strict=True)
    ]
    parts = [f"<h1>{_text(shown[0].title)}: before and after</h1>", _passes(shown[1])]
    parts += ["<h2>Live bytes over the step</h2>", _chart(curves)]
    for name, program in (("before", before), ("after", after)):
        parts += [f"<h2>Modules {name}</h2>", _summary_table(summarize(program, training=training))]
    parts += ["<h2>What runs afterwards</h2>", *_node_lists(shown[1])]
    return _whole(shown[0].title, parts)


@dataclass(frozen=True)
class _Curve:
    name: str
    live: LiveBytes


def _step(program: Program, training: Mode) -> Document:
    """The most that can be shown of a step: its plan, else the joint graph, else the program."""
    views = ("plan", "joint", "program") if program.planner is not None else ("joint", "program")
    for view in views[:-1]:
        try:
            return document(program, view, training=training)
        except UnsupportedError:
            continue
    return document(program, views[-1], training=training)


def _whole(title: str, parts: Sequence[str]) -> str:
    head = f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><meta charset="utf-8">{head}\n{body}\n</html>\n'


def _text(value: object) -> str:
    return escape(one_line(value))


def _passes(shown: Document) -> str:
    return f"<p>Passes: <code>{_text(', '.join(shown.history) or 'none')}</code></p>"


def _chart(curves: Sequence[_Curve]) -> str:
    """Live bytes over the step, each curve over the whole width."""
    top = max([curve.live.peak for curve in curves] or [0]) or 1
    lines = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + 20 * len(curves)}" role="img">']
    lines.append(f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fafafa" stroke="#ccc"/>')
    for index, curve in enumerate(curves):
        colour = _COLOURS[index % len(_COLOURS)]
        count = max(1, len(curve.live.timeline) - 1)
        points = " ".join(
            f"{_WIDTH * i / count:.1f},{_HEIGHT - (_HEIGHT - 10) * size / top:.1f}"
            for i, (_, size) in enumerate(curve.live.timeline)
        )
        at = curve.live.at.name if curve.live.at is not None else ""
        label = f"{curve.name}: peak {human_bytes(curve.live.peak)} at {at}"
        style = f'fill="none" stroke="{colour}" stroke-width="1.5"'
        lines.append(
            f'<polyline points="{points}" {style}><title>{_text(label)}</title></polyline>'
        )
        height = _HEIGHT + 16 + 20 * index
        lines.append(f'<text x="4" y="{height}" fill="{colour}">{_text(label)}</text>')
    return "\n".join([*lines, "</svg>"])


def _summary_table(summary: Summary) -> str:
    names = ("module", "nodes", "parameters", "FLOPs", "activations", "saved", "of peak")
    lines = ["<table><tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"]
    for row in summary.rows:
        name = row.path.rpartition(".")[2] or "(model)"
        share = 100 * row.peak_share
        cells = [row.nodes, human_count(row.parameters), human_count(row.flops)]
        cells += [human_bytes(row.activation_bytes), human_bytes(row.saved_bytes)]
        label = f'{_text(name)} <span class="muted">{_text(row.module)}</span>'
        bar = f'<span class="bar" style="width:{0.6 * share:.0f}px"></span>{share:.1f} %'
        lines.append(
            f'<tr><td style="padding-left:{10 + 16 * row.depth}px">{label}</td>'
            + "".join(f"<td>{_text(cell)}</td>" for cell in cells)
            + f"<td>{bar}</td></tr>"
        )
    peak = f"Peak of {summary.peak_of}: {human_bytes(summary.peak)} at {summary.peak_at[0]}."
    notes = " ".join([peak, *summary.notes])
    return "\n".join([*lines, "</table>", f"<p>{_text(notes)}</p>"])


def _node_lists(shown: Document) -> list[str]:
    """All calls, folded by stage, then by runs of one module."""
    calls = [node for node in node_views(shown) if node.op == "call"]
    lines = []
    for title, stage in groupby(calls, key=lambda node: node.segment):
        nodes = list(stage)
        again = sum(node.phase == "recomputed" for node in nodes)
        label = f"{title}: {len(nodes)} nodes" + (f", {again} recomputed" if again else "")
        lines.append(f"<details open><summary>{_text(label)}</summary>")
        for scope, run in groupby(nodes, key=lambda node: (node.scope, node.module)):
            lines.append(_module_list(scope, list(run)))
        lines.append("</details>")
    return lines


def _module_list(scope: tuple[str, str], nodes: Sequence[NodeView]) -> str:
    path, module = scope
    size = sum(node.bytes or 0 for node in nodes)
    label = f"{path or '(model)'} {module}: {len(nodes)} nodes, {human_bytes(size)}"
    lines = [f'<details style="margin-left:1em"><summary>{_text(label)}</summary><table>']
    for node in nodes:
        kind = "saved" if node.saved else node.phase
        note = f"saved {human_bytes(node.saved)} for {', '.join(node.saved_for)}"
        size_text = "" if not node.bytes else human_bytes(node.bytes)
        cells = [node.target, ", ".join((*node.inputs, *node.state)), node.type, size_text]
        cells += [note if node.saved else "", node.source or ""]
        lines.append(
            f'<tr class="{kind}"><td>{_text(node.name)}</td>'
            + "".join(f'<td class="text">{_text(cell)}</td>' for cell in cells)
            + "</tr>"
        )
    return "\n".join([*lines, "</table></details>"])
