"""One self-contained HTML file from an inspection: the inspector.

The scripts in ``assets/`` are ES modules that are put together here, in the order in which they
need each other.  The page fetches nothing, and its policy forbids it to; whatever it shows is set
as text.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from graphopt.inspect.document import Document, Mode
from graphopt.inspect.inspection import Recorder, document_inspection, inspection
from graphopt.inspect.schema import check
from graphopt.inspect.text import one_line

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule
    from graphopt.ir.program import Program

MODULES = (
    *("data", "text", "colours", "tree", "boxes", "layouter", "graph"),
    *("timeline", "panel", "summary", "search", "app"),
)
_IMPORT = re.compile(r"^import\s[^;]*;\n", re.MULTILINE)
_EXPORT = re.compile(r"^export (?=(?:async )?(?:function|class|const|let)\b)", re.MULTILINE)
_SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*\n?", re.MULTILINE)


def inspection_html(data: Mapping[str, Any]) -> str:
    """The inspector of an inspection.

    Args:
        data: What `graphopt.inspect.inspection` gave, or `graphopt.inspect.schema.read` read.

    Raises:
        FileFormatError: It is something else, or of another version.
    """
    check(data)
    return render(data)


def render(data: Mapping[str, Any]) -> str:
    """The same without a check."""
    script, layout, style = _script(), _layout(), _asset("style.css")
    title = one_line(data.get("title", ""))
    parts = {
        "policy": _policy(script, layout, style),
        "title": escape(f"{title} – graphopt"),
        "name": escape(title),
        "style": style,
        "data": _json(data),
        "layout": layout,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("page.html"))


def page(shown: Document) -> str:
    """The inspector of one graph: a program, a joint graph or a plan."""
    return render(document_inspection(shown))


def compare_html(
    before: Program,
    after: Program | OptimizedModule,
    *,
    training: Mode | None = None,
    recorded: Recorder | Sequence[Program] = (),
    budget: Mapping[str, str] | None = None,
) -> str:
    """The inspector of a program before and after passes.

    Args:
        before: The program as captured.
        after: The program after passes, or the module that `graphopt.optimize` gave.
        training: Mode of the model, or of each module path; default: that of the module that was
            given, else training.
        recorded: The program after each pass, or the `Recorder` that watched the run.
        budget: What was asked for; default: what the module's report says.
    """
    made = inspection(before, after, recorded=recorded, training=training, budget=budget)
    return render(made)


def _json(data: Mapping[str, Any]) -> str:
    """JSON that can't end the element that it stands in."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "backslashreplace").decode()


def _policy(*texts: str) -> str:
    script, layout, style = (f"'sha256-{_digest(text)}'" for text in texts)
    return (
        f"default-src 'none'; script-src {script} {layout}; style-src {style}; "
        "worker-src blob:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@functools.cache
def _asset(name: str) -> str:
    return resources.files("graphopt.inspect").joinpath("assets", name).read_text("utf-8")


@functools.cache
def _script() -> str:
    """The modules as one script: imports go, since all share one scope."""
    parts = [_EXPORT.sub("", _IMPORT.sub("", _asset(f"{name}.js"))) for name in MODULES]
    return _contained('"use strict";\n(() => {\n' + "\n".join(parts) + "})();\n")


@functools.cache
def _layout() -> str:
    """What a worker runs: dagre and the layout."""
    dagre = _SOURCE_MAP.sub("", _asset("vendor/dagre.min.js"))
    return _contained(f"{dagre}\n{_asset('layout.js')}")


def _contained(text: str) -> str:
    assert "</script" not in text.lower()
    assert "<!--" not in text
    return text
