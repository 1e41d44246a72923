"""`graphopt private-cost`: a model under secure computation."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli.app import common, network_option
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import load_model


@click.command("private-cost")
@click.argument("model")
@click.option(
    "--engine",
    type=click.Choice(["crypten", "spu", "none"]),
    default="crypten",
    show_default=True,
    help="What runs it; none: a prediction alone.",
)
@click.option(
    "--protocol",
    metavar="NAME",
    help="crypten; cheetah, semi2k, aby3 (spu); gc, ckks (none).  Default: the engine's first.",
)
@network_option
@click.option(
    "--weights",
    type=click.Choice(["secret", "public"]),
    default="secret",
    show_default=True,
    help="Whether the parameters are shared, as the input is, or known to both parties.",
)
@click.option(
    "--public", multiple=True, metavar="NAME", help="An input or parameter known to all, with *."
)
@click.option(
    "--folded",
    is_flag=True,
    help="Run the folded view: batch norms, scales and shifts in the linear operators, one square "
    "for a polynomial of degree two.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help="Time that the engine may take.",
)
@click.option("--trust", is_flag=True, help="Load a model file even if it could run code.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@common
def private_cost(
    model: str,
    engine: str,
    protocol: str | None,
    network: str,
    weights: str,
    public: tuple[str, ...],
    folded: bool,
    timeout: float,
    trust: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Run MODEL under secure computation: rounds, bytes and time by node, beside the prediction.

    The model runs in eval mode on its example inputs, between two local processes (crypten), or
    in an environment of its own, which is set up when it is first asked for (spu).
    """
    from graphopt.private import private_cost as run
    from graphopt.private.engines import spu

    loaded = load_model(model, trust=trust, evaluation=True)
    with progress(quiet) as told:
        if engine == "spu" and not spu.is_set_up():
            spu.set_up(told)
        report = run(
            loaded.model,
            loaded.args,
            loaded.kwargs,
            engine=engine,
            protocol_name=protocol,
            network_name=network,
            weights=weights,
            public=public,
            folded=folded,
            timeout=timeout,
            progress=told,
        )
    if as_json:
        show_json(report.to_dict())
        return
    show(_table(report))
    message(report.summary())


def _table(report: Any) -> Any:
    from rich.table import Table

    from graphopt.plain import human_bytes

    table = Table("node", "op", "predicted", "rounds", f"s on {report.network}")
    measured = report.bytes is not None
    for name in ("measured", "rounds", "s here") if measured else ():
        table.add_column(name)
    for row in report.sites:
        cells = [
            row.node,
            row.op.removeprefix("aten."),
            human_bytes(row.predicted_bytes),
            str(row.predicted_rounds),
            f"{row.network_seconds:.3g}",
        ]
        if measured:
            cells += [human_bytes(row.bytes), str(row.rounds), f"{row.seconds:.3g}"]
        table.add_row(*cells)
    return table
