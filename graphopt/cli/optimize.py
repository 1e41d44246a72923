"""`graphopt optimize`."""

from __future__ import annotations

import functools
from typing import Any

import click

from graphopt.cli.app import common, model_options, planning_options
from graphopt.cli.bisect import bisected, show_finding
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import dynamic_axes, load_model, load_named
from graphopt.cli.views import FORMATS
from graphopt.errors import EXIT_OK


@click.command()
@model_options
@click.option("--budget", "-b", metavar="TEXT", help="Such as memory=50% or memory=2GiB,flops=1e9.")
@click.option("--passes", "-p", metavar="TEXT", help="A pipeline instead of the budget's choice.")
@click.option("--memory-scope", type=click.Choice(["activations", "step"]), help="What counts.")
@click.option("--no-verify", is_flag=True, help="Don't check the claims of passes.")
@click.option("--html", metavar="FILE", help="Write a page that compares before and after.")
@click.option("--dump-dir", metavar="DIR", help="Write the program after every pass there.")
@click.option(
    "--dump-format",
    "dump_formats",
    multiple=True,
    type=click.Choice(FORMATS),
    help="A format of --dump-dir; may be repeated.  [default: py and json]",
)
@click.option(
    "--bisect",
    metavar="CHECK",
    help="Find the first pass, and its first rewrite, that break file.py:function, a check that "
    "takes the module and raises or gives False; nothing is saved.",
)
@click.option("--output", "-o", metavar="PATH", help="Save the optimised module there.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@planning_options
@common
def optimize(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    budget: str | None,
    passes: str | None,
    memory_scope: str | None,
    no_verify: bool,
    html: str | None,
    dump_dir: str | None,
    dump_formats: tuple[str, ...],
    bisect: str | None,
    output: str | None,
    as_json: bool,
    time_limit: float,
    seed: int,
    cost_model: str,
    quiet: bool,
) -> int:
    """Make a module that does the job of MODEL under a budget, and report what it took."""
    from graphopt import api

    # Everything that can be wrong in the request is found before anything long begins.
    wanted = _wanted(budget, passes, (html, output))
    check = None if bisect is None else _check(bisect, html, output)
    instruments = _instruments(dump_dir, dump_formats)
    recorder = None if html is None else _recorder()
    instruments += [recorder] if recorder is not None else []
    loaded = load_model(model, trust=trust, evaluation=evaluation)
    with progress(quiet) as told:
        run = functools.partial(
            api.optimize,
            loaded.model,
            wanted,
            loaded.args,
            example_kwargs=loaded.kwargs,
            passes=passes,
            dynamic=dynamic_axes(dynamic),
            time_limit=time_limit,
            seed=seed,
            memory_scope=memory_scope,
            cost_model=cost_model,
            progress=told,
        )
        if check is not None:
            found = bisected(run, check, loaded.model.training, instruments, told)
            return show_finding(found, as_json)
        result = run(verify=not no_verify, instruments=instruments)
        if html is not None:
            told("writing the page")
            _write_html(html, recorder, result)
        if output is not None:
            told("saving")
            _save(output, result)
    for path in (dump_dir, html, output):
        if path is not None:
            message(f"wrote {path}")
    if as_json:
        show_json(result.report.to_dict())
    else:
        show(result.report.table())
    return EXIT_OK


def _wanted(budget: str | None, passes: str | None, paths: tuple[str | None, ...]) -> Any:
    from graphopt import registry
    from graphopt.budget import Budget
    from graphopt.errors import UsageError
    from graphopt.files import ensure_writable

    if budget is None and passes is None:
        raise UsageError("nothing to do", hint="give --budget, such as memory=50%, or --passes")
    wanted = Budget.parse(budget)
    if passes is not None:
        registry.parse(passes)
    for path in paths:
        if path is not None:
            ensure_writable(path)
    return wanted


def _instruments(dump_dir: str | None, formats: tuple[str, ...]) -> list[Any]:
    from graphopt.errors import UsageError
    from graphopt.instruments import Dump

    if dump_dir is None:
        if formats:
            raise UsageError("--dump-format without --dump-dir", hint="say where to write")
        return []
    from graphopt.inspect import Trail

    trail = Trail()
    return [trail, Dump(dump_dir, trail.dump, formats or ("py", "json"))]


def _check(name: str, html: str | None, output: str | None) -> Any:
    from graphopt.errors import UsageError

    if html is not None or output is not None:
        raise UsageError("--bisect saves nothing", hint="leave out --html and --output")
    return load_named(name)


def _recorder() -> Any:
    from graphopt.inspect import Recorder

    return Recorder()


def _write_html(path: str, recorder: Any, result: Any) -> None:
    from graphopt import inspect
    from graphopt.files import write_text

    page = inspect.compare_html(recorder.programs[0], result, recorded=recorder)
    write_text(path, page)


def _save(path: str, result: Any) -> None:
    from graphopt.files import write_with

    write_with(path, result.save)
