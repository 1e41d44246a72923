"""`graphopt inspect` and `graphopt dump`."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli.app import common, model_options
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import dynamic_axes, load_model

_FORMATS = ("py", "json", "dot", "svg", "model-explorer", "html")
VIEWS = ("program", "joint", "plan")


def captured(name: str, dynamic: str, evaluation: bool, trust: bool) -> tuple[Any, Any]:
    """A loaded model and its program."""
    from graphopt import api

    loaded = load_model(name, trust=trust, evaluation=evaluation)
    program = api.capture(loaded.model, loaded.args, loaded.kwargs, dynamic=dynamic_axes(dynamic))
    return loaded, program


@click.command()
@model_options
@click.option("--depth", type=click.IntRange(min=0), help="Deepest module scope that is shown.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@common
def inspect(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    depth: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """A table of MODEL by module: nodes, parameters, FLOPs, activations, bytes saved, peak."""
    from graphopt import inspect as views

    with progress(quiet) as told:
        told("capturing the model")
        loaded, program = captured(model, dynamic, evaluation, trust)
        told("measuring")
        summary = views.summarize(program, training=loaded.model.training)
    if as_json:
        show_json(summary.to_dict())
    else:
        show(summary.table(depth))


@click.command()
@model_options
@click.option("--format", "-f", "form", type=click.Choice(_FORMATS), default="py")
@click.option("--view", type=click.Choice(VIEWS), default="program", show_default=True)
@click.option("--output", "-o", metavar="FILE", help="Write there instead of to stdout.")
@common
def dump(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    form: str,
    view: str,
    output: str | None,
    quiet: bool,
) -> None:
    """Print the graph of MODEL as runnable Python, JSON, DOT, SVG or HTML."""
    from graphopt import inspect as views
    from graphopt.files import ensure_writable, write_text

    if output is not None:
        ensure_writable(output)
    with progress(quiet) as told:
        told("capturing the model")
        loaded, program = captured(model, dynamic, evaluation, trust)
        told("drawing")
        text = views.dump(program, form, view=view, training=loaded.model.training)
    if output is None:
        click.echo(text)
    else:
        write_text(output, text)
        message(f"wrote {output}")
