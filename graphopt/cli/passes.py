"""`graphopt passes`: which passes there are."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from graphopt.cli.app import common
from graphopt.cli.console import message, show, show_json


@click.command()
@click.argument("name", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@common
def passes(name: str | None, as_json: bool, quiet: bool) -> None:
    """List the installed passes and their options, or describe one of them."""
    from graphopt import registry

    if name is not None:
        registry.get(name)
    described = [_describe(cls) for key, cls in registry.passes().items() if name in (None, key)]
    broken = registry.catalogue().broken
    if as_json:
        show_json({"schema_version": 1, "passes": described, "broken": broken})
        return
    show(_table(described))
    for origin, reason in broken.items():
        message(f"warning: {origin} could not be imported: {reason}")


def _describe(cls: Any) -> dict[str, Any]:
    from graphopt import registry
    from graphopt.pipeline import option_types

    types = option_types(cls)
    return {
        "name": cls.name,
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
        "serves": list(cls.serves),
        "position": int(cls.position),
        "always": cls.always,
        "preserves": cls.preserves.to_dict(),
        "options": {f.name: _option(f, types[f.name]) for f in dataclasses.fields(cls)},
        "origin": registry.catalogue().passes[cls.name].origin,
    }


def _option(field: Any, kind: Any) -> dict[str, str]:
    from graphopt.arguments import format_value

    default = field.default
    if default is dataclasses.MISSING:
        default = field.default_factory()
    text = getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind)
    return {"type": text.replace("typing.", ""), "default": format_value(default)}


def _table(described: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("pass", "serves", "options", "what it does")
    for entry in described:
        options = ",".join(f"{k}={v['default']}" for k, v in entry["options"].items())
        serves = ", ".join(entry["serves"]) or ("every budget" if entry["always"] else "")
        table.add_row(entry["name"], serves, options, entry["summary"])
    return table
