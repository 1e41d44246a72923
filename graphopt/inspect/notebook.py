"""What a notebook shows of programs and reports: small pieces of HTML, without script or network.

Everything that comes from a model is escaped.  Colours are those of the notebook's own theme.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import GraphoptError
from graphopt.inspect.document import scope_of
from graphopt.inspect.text import one_line, short_target, tensor_type
from graphopt.plain import human_bytes, human_count
from graphopt.report import human_value

if TYPE_CHECKING:
    from graphopt.ir.program import Program
    from graphopt.report import Report

_CELL = "padding:1px 10px;border-bottom:1px solid rgba(128,128,128,.35)"
_BAR = "display:inline-block;height:.7em;background:#0072b2;vertical-align:baseline"
_MOST_ROWS, _MOST_LINES, _MOST_NODES = 40, 300, 1000
_BYTES = ("peak", "budget", "bytes", "saved")


def report_html(report: Report) -> str:
    """A report: the passes, and a table of each section, bytes with bars."""
    passes = [
        (record.spec or record.name, "yes" if record.changed else "no", f"{record.seconds:.2f} s")
        for record in report.passes
    ]
    budget = ", ".join(f"{name}={value}" for name, value in report.budget.items())
    parts = [_head("graphopt report", [f"budget {budget}"] if budget else [])]
    parts.append(_table(("pass", "changed", "seconds"), passes))
    for name, section in report.sections.items():
        parts.append(_folded(name, _section(section), is_open=True))
    return _framed(parts)


def program_html(program: Program) -> str:
    """A program: what it takes and holds, its nodes by module, and its code."""
    nodes = [node for node in program.module.graph.nodes if node.op == "call_function"]
    facts = [f"{len(nodes)} nodes", _parameters(program)]
    if program.planner is not None:
        facts.append("planned")
    facts += [f"passes {', '.join(r.spec or r.name for r in program.history) or 'none'}"]
    inputs = [
        (leaf.name, tensor_type(tuple(leaf.shape), leaf.dtype)) for leaf in program.signature.inputs
    ]
    parts = [_head("graphopt program", facts), _table(("input", "type"), inputs)]
    parts.append(_folded("nodes by module", _by_module(nodes)))
    counts = Counter(short_target(node) for node in nodes)
    rows = [(name, str(count)) for name, count in counts.most_common()]
    parts.append(_folded("nodes by op", _table(("op", "nodes"), rows)))
    if len(nodes) <= _MOST_NODES:  # a notebook shouldn't wait for what nobody reads there
        parts.append(_folded("code", _code(program)))
    return _framed(parts)


def _parameters(program: Program) -> str:
    tensors = list(dict(program.module.named_parameters()).values())
    count = sum(tensor.numel() for tensor in tensors)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return f"{human_count(count)} parameters ({human_bytes(size)})"


def _by_module(nodes: Iterable[Any]) -> str:
    counts: Counter[tuple[str, str]] = Counter(scope_of(node) for node in nodes)
    rows = [(path or "root", cls, str(count)) for (path, cls), count in counts.items()]
    return _table(("module", "class", "nodes"), rows)


def _code(program: Program) -> str:
    from graphopt.inspect import dump

    try:
        lines = dump(program, "py", view="program").splitlines()
    except GraphoptError as error:
        return f"<p>{html.escape(error.message)}</p>"
    start = next((i for i, line in enumerate(lines) if line.startswith("def forward")), 0)
    end = next((i for i, line in enumerate(lines) if line.startswith("def example")), len(lines))
    shown = lines[start:end]
    if len(shown) > _MOST_LINES:
        shown = [*shown[:_MOST_LINES], f"    # ... {len(shown) - _MOST_LINES} lines more"]
    text = html.escape("\n".join(shown).rstrip())
    return f'<pre style="overflow:auto;max-height:30em;text-align:left">{text}</pre>'


def _section(section: Mapping[str, Any]) -> str:
    sizes = {k: v for k, v in section.items() if _is_bytes(k, v)}
    largest = max(sizes.values(), default=0)
    rows = []
    for key, value in section.items():
        if isinstance(value, (list, dict)):
            continue
        bar = ""
        if key in sizes and largest > 0:
            bar = f'<span style="{_BAR};width:{8 * sizes[key] / largest:.2f}em"></span>'
        rows.append((_text(key.replace("_", " ")), _text(human_value(key, value)), bar))
    parts = [_rows(("", "", ""), rows)]
    for key, value in section.items():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            parts.append(_folded(f"{key.replace('_', ' ')} ({len(value)})", _records(value)))
        elif isinstance(value, (list, dict)) and value:
            parts.append(_folded(f"{key.replace('_', ' ')} ({len(value)})", _plain(value)))
    return "".join(parts)


def _is_bytes(key: str, value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and any(part in key for part in _BYTES)


def _records(records: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(key for record in records for key in record))
    rows = [[human_value(name, record.get(name)) for name in names] for record in records]
    return _table([name.replace("_", " ") for name in names], rows)


def _plain(value: Any) -> str:
    text = one_line(value)
    return f"<p>{html.escape(text if len(text) <= 2000 else f'{text[:2000]} ...')}</p>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = [[_text(cell) for cell in row] for row in rows[:_MOST_ROWS]]
    more = len(rows) - len(shown)
    return _rows(head, shown) + (f"<p>... {more} more</p>" if more else "")


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are HTML already."""
    top = "".join(f'<th style="{_CELL};text-align:left">{_text(name)}</th>' for name in head)
    lines = [f"<tr>{top}</tr>"] if any(head) else []
    for row in rows:
        cells = "".join(f'<td style="{_CELL};text-align:left">{cell}</td>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<table style="border-collapse:collapse;margin:.3em 0">{"".join(lines)}</table>'


def _head(title: str, facts: Sequence[str]) -> str:
    return f"<div><b>{_text(title)}</b> {_text(' · '.join(facts))}</div>"


def _folded(title: str, inside: str, is_open: bool = False) -> str:
    state = " open" if is_open else ""
    return f"<details{state}><summary>{_text(title)}</summary>{inside}</details>"


def _framed(parts: Sequence[str]) -> str:
    return f'<div class="graphopt" style="font-size:90%">{"".join(parts)}</div>'


def _text(text: Any) -> str:
    return html.escape(one_line(text))
