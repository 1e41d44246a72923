"""`graphopt diff`: what differs between two graphs, node by node."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from graphopt.cli.app import common, model_options
from graphopt.cli.console import message, progress, show_json
from graphopt.cli.views import VIEWS, captured
from graphopt.errors import EXIT_DIFFERENT, EXIT_OK, FileFormatError, ModelError, UsageError


@click.command()
@model_options
@click.argument("other", required=False)
@click.option("--passes", "-p", metavar="TEXT", help="Compare MODEL before and after a pipeline.")
@click.option("--view", type=click.Choice(VIEWS), default="program", show_default=True)
@click.option(
    "--context",
    "-U",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="N",
    help="Unchanged nodes shown around a change.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--exit-code", is_flag=True, help="Exit with 6 if there is a difference.")
@click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    default="auto",
    show_default=True,
    help="auto: on a terminal, unless NO_COLOR is set.",
)
@click.option("--output", "-o", metavar="FILE", help="Write there instead of to stdout.")
@common
def diff(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    other: str | None,
    passes: str | None,
    view: str,
    context: int,
    as_json: bool,
    exit_code: bool,
    color: str,
    output: str | None,
    quiet: bool,
) -> int:
    """Show how the graph of MODEL differs from OTHER's, or from its own after a pipeline.

    MODEL and OTHER may also be JSON dumps, as `dump -f json` and `optimize --dump-dir` write them.
    Nodes are paired by what they do and where they stand, not by line. Prints nothing if there is
    no difference.
    """
    from graphopt import inspect, registry
    from graphopt.files import ensure_writable, write_text

    if (other is None) == (passes is None):
        raise UsageError("what to compare with?", hint="give either OTHER or --passes")
    if output is not None:
        ensure_writable(output)
    pipeline = None if passes is None else registry.parse(passes)
    with progress(quiet) as told:
        told("capturing the model")
        before = _side(model, dynamic, evaluation, trust)
        if pipeline is None:
            after = _side(str(other), dynamic, evaluation, trust)
        else:
            after = _after(before, pipeline, told)
        told("comparing")
        graphs = [side if isinstance(side, dict) else side[1] for side in (before, after)]
        found = inspect.diff(*graphs, view=view, training=not evaluation)
    if as_json:
        _write_json(found, output)
    elif output is not None:
        write_text(output, found.text(context))
    elif found:
        click.echo(_rendered(found.coloured(context), color), nl=False, color=True)
    if output is not None:
        message(f"wrote {output}")
    if not found and not as_json:
        message("no difference")
    return EXIT_DIFFERENT if exit_code and found else EXIT_OK


def _side(name: str, dynamic: str, evaluation: bool, trust: bool) -> Any:
    """The data of a JSON dump, or a loaded model with its program."""
    path = Path(name)
    if path.suffix != ".json":
        return captured(name, dynamic, evaluation, trust)
    if not path.is_file():
        raise ModelError(f"no dump {name!r}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(f"{name} is no JSON: {error}") from None
    if not isinstance(data, dict):
        raise FileFormatError(f"{name} is no dump of a graph")
    return data


def _after(before: Any, pipeline: Any, told: Any) -> Any:
    from graphopt.pipeline import PassContext

    if isinstance(before, dict):
        raise UsageError("no pipeline runs on a dump", hint="name the model itself")
    loaded, program = before
    context = PassContext(loaded.args, loaded.kwargs, loaded.model, progress=told)
    return loaded, pipeline.run(program, context)


def _write_json(found: Any, output: str | None) -> None:
    from graphopt.files import write_text

    if output is None:
        show_json(found.to_dict())
    else:
        write_text(output, json.dumps(found.to_dict(), indent=2))


def _rendered(text: Any, color: str) -> str:
    """A `rich` text for stdout, with escape sequences where colours are wanted."""
    from rich.console import Console

    if color == "never" or (color == "auto" and not Console(file=sys.stdout).color_system):
        return text.plain
    console = Console(force_terminal=True, color_system="standard", no_color=False, width=10_000)
    with console.capture() as captured_text:
        console.print(text, end="", soft_wrap=True)
    return captured_text.get()
