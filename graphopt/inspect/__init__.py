"""Views of a program: a table by module; its graph as Python, JSON, DOT, SVG, HTML."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from graphopt.errors import UnsupportedError, suggest
from graphopt.inspect.document import Document, Mode
from graphopt.inspect.drawing import dot_text, explorer_form, svg_text
from graphopt.inspect.inspection import Recorder, document_inspection, inspection
from graphopt.inspect.live import LiveBytes, live_bytes
from graphopt.inspect.nodes import NodeView, node_views
from graphopt.inspect.page import compare_html, inspection_html, page
from graphopt.inspect.python import python_text
from graphopt.inspect.schema import SCHEMA_VERSION
from graphopt.inspect.schema import read as read_inspection
from graphopt.inspect.summary import ScopeRow, Summary, summarize
from graphopt.inspect.views import document

if TYPE_CHECKING:
    from rich.table import Table

    from graphopt.ir.program import Program

__all__ = [
    "FORMATS",
    "SCHEMA_VERSION",
    "Document",
    "LiveBytes",
    "NodeView",
    "Recorder",
    "ScopeRow",
    "Summary",
    "compare_html",
    "document",
    "dump",
    "inspection",
    "inspection_html",
    "live_bytes",
    "node_views",
    "read_inspection",
    "summarize",
    "table",
]

_PRINTERS = {
    "py": python_text,
    "json": lambda shown: json.dumps(document_inspection(shown), indent=1, allow_nan=False),
    "dot": dot_text,
    "svg": svg_text,
    "html": page,
    "model-explorer": lambda shown: json.dumps(explorer_form(shown), indent=1, allow_nan=False),
}
FORMATS = tuple(_PRINTERS)


def dump(
    program: Program, form: str = "py", *, view: str | None = None, training: Mode = True
) -> str:
    """A program's graph as text.

    Args:
        program: A captured program.
        form: ``py`` (readable Python that runs), ``json``, ``dot``, ``svg``, ``html``,
            ``model-explorer`` (the JSON that Model Explorer opens).
        view: ``program`` (the forward graph), ``joint`` (with the backward graph), ``plan`` (the
            stages of a planned step); default: the plan if there is one, else the program.
        training: Mode of the model.

    Returns:
        The text.

    Raises:
        UnsupportedError: An unknown format or view; no plan to show; no Graphviz for ``svg``;
            something that Python text can't express.
    """
    printer = _PRINTERS.get(form)
    if printer is None:
        known = ", ".join(FORMATS)
        hint = suggest(form, FORMATS) or f"one of {known}"
        raise UnsupportedError(f"no format {form!r} for dumps", hint=hint)
    if view is not None:
        return printer(document(program, view, training=training))
    if program.planner is not None:
        try:
            return printer(document(program, "plan", training=training))
        except UnsupportedError:  # planned for the other mode, for example
            pass
    return printer(document(program, "program", training=training))


def table(program: Program, *, training: Mode = True, depth: int | None = None) -> Table:
    """The table of a program by module, for a terminal; `summarize` gives the data."""
    return summarize(program, training=training).table(depth)
