"""`graphopt inspect`, `graphopt dump` and `graphopt diff`."""

from __future__ import annotations

import difflib
from typing import Any

import click

from graphopt.cli.app import common, model_options
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import dynamic_axes, load_model
from graphopt.errors import EXIT_OK

_FORMATS = ("py", "json", "dot", "svg", "model-explorer", "html")
_VIEWS = ("program", "joint", "plan")


def _program(name: str, dynamic: str, evaluation: bool, trust: bool) -> tuple[Any, Any]:
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
        loaded, program = _program(model, dynamic, evaluation, trust)
        told("measuring")
        summary = views.summarize(program, training=loaded.model.training)
    if as_json:
        show_json(summary.to_dict())
    else:
        show(summary.table(depth))


@click.command()
@model_options
@click.option("--format", "-f", "form", type=click.Choice(_FORMATS), default="py")
@click.option("--view", type=click.Choice(_VIEWS), default="program", show_default=True)
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
        loaded, program = _program(model, dynamic, evaluation, trust)
        told("drawing")
        text = views.dump(program, form, view=view, training=loaded.model.training)
    if output is None:
        click.echo(text)
    else:
        write_text(output, text)
        message(f"wrote {output}")


@click.command()
@model_options
@click.argument("other", required=False)
@click.option("--passes", "-p", metavar="TEXT", help="Compare MODEL before and after a pipeline.")
@click.option("--output", "-o", metavar="FILE", help="Write there instead of to stdout.")
@common
def diff(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    other: str | None,
    passes: str | None,
    output: str | None,
    quiet: bool,
) -> int:
    """Show how the graph of MODEL differs from OTHER's, or from its own after a pipeline."""
    from graphopt import registry
    from graphopt.errors import UsageError
    from graphopt.files import ensure_writable, write_text
    from graphopt.pipeline import PassContext

    if (other is None) == (passes is None):
        raise UsageError("what to compare with?", hint="give either OTHER or --passes")
    if output is not None:
        ensure_writable(output)
    pipeline = None if passes is None else registry.parse(passes)
    with progress(quiet) as told:
        told("capturing the model")
        loaded, program = _program(model, dynamic, evaluation, trust)
        if pipeline is None:
            _, changed = _program(str(other), dynamic, evaluation, trust)
        else:
            context = PassContext(loaded.args, loaded.kwargs, loaded.model, progress=told)
            changed = pipeline.run(program, context)
    names = (model, other or f"{model} after {passes}")
    text = "".join(
        difflib.unified_diff(
            program.emit().code.splitlines(keepends=True),
            changed.emit().code.splitlines(keepends=True),
            *names,
        )
    )
    if output is None:
        click.echo(text, nl=False)
    else:
        write_text(output, text)
    if not text:
        message("no difference")
    return EXIT_OK
