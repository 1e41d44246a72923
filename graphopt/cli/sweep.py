"""`graphopt sweep`: what accuracy costs in private inference, budget by budget."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli.app import common, model_options, network_option
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import dynamic_axes, load_model, load_named
from graphopt.errors import EXIT_INTERRUPTED, EXIT_OK

_SERVED = "relus"


@click.command()
@model_options
@click.option(
    "--relus",
    multiple=True,
    metavar="LIST",
    help="Budgets to try.  [default: 50%,25%,10%,5%]",
)
@click.option(
    "--budget",
    "-b",
    multiple=True,
    metavar="TEXT",
    help="A further budget, such as relu_sites=3 or pi_latency=50%.",
)
@click.option(
    "--option",
    multiple=True,
    metavar="TEXT",
    help="Options of the pass to try.  [default: replacement=affine and replacement=poly2]",
)
@click.option(
    "--protocol", multiple=True, metavar="NAME", help="To price under.  [default: crypten]"
)
@network_option
@click.option(
    "--data",
    metavar="NAME",
    help="file.py:factory of calibration batches; without it the model's BatchNorms must do.",
)
@click.option(
    "--evaluate",
    metavar="NAME",
    help="file.py:function that gives a module's accuracy, instead of agreement with the model.",
)
@click.option("--output", "-o", metavar="FILE", help="Write the points there, as CSV.")
@click.option("--plot", metavar="FILE", help="Draw them there (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that choosing may take, for each point.",
)
@click.option("--seed", type=int, default=0, show_default=True)
@common
def sweep(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    relus: tuple[str, ...],
    budget: tuple[str, ...],
    option: tuple[str, ...],
    protocol: tuple[str, ...],
    network: str,
    data: str | None,
    evaluate: str | None,
    output: str | None,
    plot: str | None,
    as_json: bool,
    time_limit: float,
    seed: int,
    quiet: bool,
) -> int:
    """Linearize MODEL under several budgets: count, bytes, rounds, seconds and accuracy of each.

    Points that no other beats are marked; a budget that can't be kept is listed with the reason.
    """
    from graphopt.files import ensure_writable, write_with

    for path in (output, plot):
        if path is not None:
            ensure_writable(path)
    run = _swept()
    loaded = load_model(model, trust=trust, evaluation=evaluation)
    asked = {"options": option, "protocols": protocol, "budgets": _budgets(relus, budget)}
    with progress(quiet) as told:
        found = run(
            loaded.model,
            loaded.args,
            example_kwargs=loaded.kwargs,
            data=None if data is None else load_named(data)(),
            evaluate=None if evaluate is None else load_named(evaluate),
            network=network,
            dynamic=dynamic_axes(dynamic),
            time_limit=time_limit,
            seed=seed,
            progress=told,
            **{name: value for name, value in asked.items() if value},
        )
        if plot is not None:
            told("drawing")
            kind = plot.rpartition(".")[2].lower() if "." in plot else "png"
            figure = found.plot()
            write_with(plot, lambda temporary: figure.savefig(temporary, format=kind, dpi=130))
    if output is not None:
        found.to_csv(output)
    for path in (output, plot):
        if path is not None:
            message(f"wrote {path}")
    if as_json:
        show_json(found.to_dict())
    else:
        show(_table(found))
        message(f"accuracy is {_MEASURES[found.measure]}; * is on the frontier of seconds")
    if found.interrupted:
        message("interrupted: these are the points so far")
    return EXIT_INTERRUPTED if found.interrupted else EXIT_OK


_MEASURES = {
    "evaluated": "what --evaluate gave",
    "agreement": "the share of samples with the source's largest output",
    "likeness": "1 less the relative error of the outputs",
}


def _budgets(relus: tuple[str, ...], others: tuple[str, ...]) -> list[str]:
    return [part.strip() for text in relus for part in text.split(",")] + list(others)


def _swept() -> Any:
    """The function of the pass that serves such budgets and can be swept over them."""
    from graphopt import registry
    from graphopt.errors import UnsupportedError

    found = [cls for cls in registry.serving(_SERVED) if hasattr(cls, "sweep")]
    if not found:
        raise UnsupportedError(
            f"no installed pass is swept over {_SERVED}=", hint="see `graphopt passes`"
        )
    return found[0].sweep  # type: ignore[attr-defined]


def _table(found: Any) -> Any:
    from rich.table import Table

    from graphopt.plain import human_bytes

    table = Table("option", "budget", "count", "sites", "protocol")
    for name in ("bytes", "rounds", f"s on {found.network}", "accuracy", ""):
        table.add_column(name, justify="right" if name else "left")
    for row in found.rows():
        if row["accuracy"] is None:
            cells = ["", "", row["protocol"], "", "", "", "", row["reason"]]
        else:
            priced = row["seconds"] is not None
            cells = [
                f"{row['relus']:,}",
                str(row["relu_sites"]),
                row["protocol"],
                human_bytes(row["bytes"]) if priced else "",
                str(row["rounds"]) if priced else "",
                f"{row['seconds']:.3g}" if priced else "",
                f"{row['accuracy']:.4f}",
                row["reason"] or ("*" if row["frontier"] else ""),
            ]
        table.add_row(row["option"] or "(source)", row["budget"], *cells)
    return table
