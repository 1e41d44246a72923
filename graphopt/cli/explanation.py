"""An explanation as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MOST = 4
"""How many samples are shown; ``--json`` and ``--html`` have more."""


def tables(view: Any) -> Iterator[Any]:
    """What is printed of an `ExplanationView`."""
    for number, sample in enumerate(view.samples[:MOST]):
        yield _ledger(number, sample)
        for each in sample.inputs:
            if each.kind == "tokens":
                yield _strip(each)
            yield _input(each)
    if len(view.samples) > MOST:
        yield f"{len(view.samples) - MOST} samples more are not shown"
    if view.others:
        yield _others(view)
    yield _rules(view)
    yield f"largest residual of an operation {view.worst:.1e}"


def _ledger(number: int, sample: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    what = "output"
    if sample.target is not None:
        index = f"class {sample.target.index}"
        what = f"{sample.target.name} ({index})" if sample.target.name else index
    title = escape(f"sample {number}: {what}, {sample.explained:.5g}")
    table = Table("ledger", title=title, title_justify="left")
    table.add_column("relevance", justify="right")
    table.add_column("of it", justify="right")
    for name, value in sample.ledger.items():
        share = f"{100 * value / sample.explained:.2f} %" if sample.explained else ""
        table.add_row(escape(name), f"{value:+.5g}", share)
    table.add_row("residual", f"{sample.residual:.1e}", "")
    return table


def _strip(each: Any) -> Any:
    from rich.text import Text

    from graphopt.inspect.relevance import token_text

    return Text.assemble(f"{each.name}: ", token_text(each.tokens, each.relevance))


def _input(each: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{each.name}: {float(each.relevance.sum()):+.5g}")
    table = Table("largest at", title=title, title_justify="left")
    if each.tokens:
        table.add_column("token")
    table.add_column("relevance", justify="right")
    for row in each.top(5):
        at = ", ".join(map(str, row["at"])) or "0"
        token = [Text(row["token"])] if each.tokens else []
        table.add_row(at, *token, f"{row['relevance']:+.4g}")
    return table


def _others(view: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "shape", title="parameters and values", title_justify="left")
    for name in ("relevance", "absolute"):
        table.add_column(name, justify="right")
    for each in view.others:
        shape = "x".join(map(str, each["shape"]))
        figures = (f"{each['relevance']:+.4g}", f"{each['size']:.4g}")
        table.add_row(escape(each["name"]), shape, *figures)
    return table


def _rules(view: Any) -> Any:
    from rich.markup import escape
    from rich.table import Table

    count = sum(each["operations"] for each in view.rules)
    title = f"{view.settings['composite']}: {count} operations"
    table = Table("family", "rule", title=escape(title), title_justify="left")
    table.add_column("operations", justify="right")
    for each in view.rules:
        table.add_row(each["family"], escape(each["rule"]), str(each["operations"]))
    return table
