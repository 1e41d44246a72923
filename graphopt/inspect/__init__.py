"""Views of a program: a table by module; its graph as Python, JSON, DOT, SVG, HTML."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from graphopt.errors import UnsupportedError, suggest
from graphopt.inspect.bisect import Bisect, Finding
from graphopt.inspect.diff import Change, Diff, StateChange, diff
from graphopt.inspect.document import Document, Mode
from graphopt.inspect.drawing import dot_text, svg_text
from graphopt.inspect.explorer import explorer_data, explorer_form
from graphopt.inspect.inspection import Recorder, document_inspection, inspection
from graphopt.inspect.live import LiveBytes, live_bytes
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.page import compare_html, inspection_html, page
from graphopt.inspect.plots import pareto, plot_frontier, plot_pareto
from graphopt.inspect.python import Notes, python_text
from graphopt.inspect.schema import SCHEMA_VERSION
from graphopt.inspect.schema import read as read_inspection
from graphopt.inspect.summary import ScopeRow, Summary, summarize
from graphopt.inspect.trail import Trail, step_facts, tensor_facts
from graphopt.inspect.views import document

if TYPE_CHECKING:
    from rich.table import Table

    from graphopt.ir.program import Program

__all__ = [
    "FORMATS",
    "SCHEMA_VERSION",
    "Bisect",
    "Change",
    "Diff",
    "Document",
    "Finding",
    "LiveBytes",
    "NodeView",
    "Recorder",
    "ScopeRow",
    "StateChange",
    "Summary",
    "Trail",
    "compare_html",
    "diff",
    "document",
    "dump",
    "inspection",
    "inspection_html",
    "live_bytes",
    "node_views",
    "pareto",
    "plot_frontier",
    "plot_pareto",
    "read_inspection",
    "summarize",
    "table",
]


def json_text(shown: Document) -> str:
    """A document as JSON."""
    return json.dumps(document_inspection(shown), indent=1, allow_nan=False)


_PRINTERS = {
    "json": json_text,
    "dot": dot_text,
    "svg": svg_text,
    "html": page,
    "model-explorer": lambda shown: json.dumps(explorer_form(shown), indent=1, allow_nan=False),
}
OVERLAID = "model-explorer-data"
FORMATS = ("py", *_PRINTERS, OVERLAID)


def dump(
    program: Program,
    form: str = "py",
    *,
    view: str | None = None,
    training: Mode = True,
    notes: Notes | None = None,
    overlay: str = "bytes",
) -> str:
    """A program's graph as text.

    Args:
        program: A captured program.
        form: ``py`` (readable Python that runs), ``json``, ``dot``, ``svg``, ``html``,
            ``model-explorer`` (the JSON that Model Explorer opens), ``model-explorer-data`` (its
            data by node, which colours that graph).
        view: ``program`` (the forward graph), ``joint`` (with the backward graph), ``plan`` (the
            stages of a planned step); default: the plan if there is one, else the program.
        training: Mode of the model.
        notes: For Python: names of nodes of the forward graph -> what passes did there (see
            `Trail`), for the comments.  What passes report of parameters, and of nodes of a plan,
            is there without.
        overlay: For ``model-explorer-data``: ``bytes``, ``flops``, ``saved``, ``phase``, ``type``,
            ``scope``, or ``notes``.

    Returns:
        The text.

    Raises:
        UnsupportedError: An unknown format, view or overlay; no plan to show; no Graphviz for
            ``svg``; something that Python text can't express.
    """
    if form not in FORMATS:
        known = ", ".join(FORMATS)
        hint = suggest(form, FORMATS) or f"one of {known}"
        raise UnsupportedError(f"no format {form!r} for dumps", hint=hint)
    shown = _shown(program, view, training)
    if form in _PRINTERS:
        return _PRINTERS[form](shown)
    told = (notes or {}) if shown.view == "program" else step_facts(program.history)
    if form == "py":
        return python_text(shown, told, tensor_facts(program.history))
    facts = {"notes": {name: "; ".join(texts) for name, texts in told.items()}}
    return json.dumps(explorer_data(shown, overlay, facts), indent=1, allow_nan=False)


def _shown(program: Program, view: str | None, training: Mode) -> Document:
    if view is None and program.planner is not None:
        try:
            return document(program, "plan", training=training)
        except UnsupportedError:  # planned for the other mode, for example
            pass
    return document(program, view or "program", training=training)


def table(program: Program, *, training: Mode = True, depth: int | None = None) -> Table:
    """The table of a program by module, for a terminal; `summarize` gives the data."""
    return summarize(program, training=training).table(depth)
