"""`graphopt inspect` and `graphopt dump`."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli.app import common, model_options
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import dynamic_axes, load_model

FORMATS = ("py", "json", "dot", "svg", "html", "model-explorer", "model-explorer-data")
VIEWS = ("program", "joint", "plan")
_OVERLAYS = ("bytes", "flops", "saved", "phase", "type", "scope", "notes")


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
@click.option("--format", "-f", "form", type=click.Choice(FORMATS), default="py")
@click.option(
    "--view",
    type=click.Choice(VIEWS),
    help="[default: program; with --passes the plan, if they make one]",
)
@click.option("--passes", "-p", metavar="TEXT", help="Show MODEL after a pipeline, with notes.")
@click.option(
    "--overlay",
    type=click.Choice(_OVERLAYS),
    default="bytes",
    show_default=True,
    help="What model-explorer-data colours.",
)
@click.option("--output", "-o", metavar="FILE", help="Write there instead of to stdout.")
@common
def dump(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    form: str,
    view: str | None,
    passes: str | None,
    overlay: str,
    output: str | None,
    quiet: bool,
) -> None:
    """Print the graph of MODEL as runnable Python, JSON, DOT, SVG, HTML, or for Model Explorer.

    model-explorer is the graph, model-explorer-data an overlay for it: open both with
    `model-explorer GRAPH.json --node_data_paths DATA.json`.
    """
    from graphopt import inspect as views
    from graphopt import registry
    from graphopt.files import ensure_writable, write_text
    from graphopt.pipeline import PassContext

    if output is not None:
        ensure_writable(output)
    pipeline = None if passes is None else registry.parse(passes)
    trail = views.Trail()
    with progress(quiet) as told:
        told("capturing the model")
        loaded, program = captured(model, dynamic, evaluation, trust)
        if pipeline is None:
            view = view or "program"
        else:
            context = PassContext(loaded.args, loaded.kwargs, loaded.model, progress=told)
            program = pipeline.run(program, context, [trail])
        told("drawing")
        text = views.dump(
            program,
            form,
            view=view,
            training=loaded.model.training,
            notes=trail.notes,
            overlay=overlay,
        )
    if output is None:
        click.echo(text)
    else:
        write_text(output, text)
        message(f"wrote {output}")
