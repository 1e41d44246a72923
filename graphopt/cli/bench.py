"""`graphopt bench`: what a model gains and pays under several memory budgets."""

from __future__ import annotations

from typing import Any

import click

from graphopt.cli.app import common, model_options, planning_options
from graphopt.cli.console import message, progress, show, show_json
from graphopt.cli.models import Loaded, dynamic_axes, load_model
from graphopt.errors import BudgetInfeasible


@click.command()
@model_options
@click.option(
    "--budgets",
    default="80%,60%,50%,40%",
    show_default=True,
    metavar="LIST",
    help="Memory budgets to try.",
)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@planning_options
@common
def bench(
    model: str,
    dynamic: str,
    evaluation: bool,
    trust: bool,
    budgets: str,
    repeats: int,
    as_json: bool,
    time_limit: float,
    seed: int,
    cost_model: str,
    quiet: bool,
) -> None:
    """Measure MODEL as it is and optimised: peak, saved bytes, FLOPs, time of a step.

    Times are ratios to the model as it is, measured in turns; a budget that can't be met is listed
    with the smallest that could.
    """
    from graphopt.budget import read_field

    wanted = [read_field("memory", part.strip()) for part in budgets.split(",")]
    loaded = load_model(model, trust=trust, evaluation=evaluation)
    options = {"time_limit": time_limit, "seed": seed, "cost_model": cost_model}
    rows = []
    with progress(quiet) as told:
        told("measuring the model")
        rows.append(_measured("eager", loaded, loaded.model, repeats))
        for index, budget in enumerate(wanted):
            told(f"memory={budget}", index / len(wanted))
            rows.append(_row(str(budget), loaded, options, dynamic_axes(dynamic), repeats))
    if as_json:
        show_json({"schema_version": 1, "model": model, "rows": rows})
        return
    show(_table(rows))
    message("a step is forward, loss and backward; ratios are to the model as it is")


def _row(
    budget: str, loaded: Loaded, options: dict[str, Any], dynamic: str | None, repeats: int
) -> dict[str, Any]:
    from graphopt import api

    try:
        module = api.optimize(
            loaded.model,
            f"memory={budget}",
            loaded.args,
            example_kwargs=loaded.kwargs,
            dynamic=dynamic,
            **options,
        )
    except BudgetInfeasible as error:
        return {"budget": budget, "infeasible": error.message, "smallest": error.smallest}
    row = _measured(budget, loaded, module, repeats)
    return {**row, **{f"plan_{k}": v for k, v in module.report.sections.get("plan", {}).items()}}


def _measured(budget: str, loaded: Loaded, module: Any, repeats: int) -> dict[str, Any]:
    from graphopt.measure import measure_step, step_flops, step_seconds

    forward_only = not module.training
    args, kwargs = loaded.args, loaded.kwargs
    step = measure_step(module, args, kwargs, forward_only=forward_only)
    reference = None if module is loaded.model else loaded.model
    seconds = step_seconds(
        module, args, kwargs, reference=reference, repeats=repeats, forward_only=forward_only
    )
    return {
        "budget": budget,
        "peak_bytes": step.peak,
        "saved_bytes": step.saved,
        "flops": step_flops(module, args, kwargs, forward_only=forward_only),
        "time_ratio": 1.0 if reference is None else seconds.ratio,
    }


def _table(rows: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    from graphopt.plain import human_bytes, human_count

    table = Table("budget", "peak", "of eager", "saved", "FLOPs", "time", "plan seconds")
    eager = rows[0]["peak_bytes"]
    for row in rows:
        if "infeasible" in row:
            smallest = row["smallest"]
            known = "" if smallest is None else f"smallest {human_bytes(smallest)}"
            table.add_row(row["budget"], "infeasible", known)
            continue
        table.add_row(
            row["budget"],
            human_bytes(row["peak_bytes"]),
            f"{100 * row['peak_bytes'] / eager:.1f} %" if eager else "-",
            human_bytes(row["saved_bytes"]),
            human_count(row["flops"]),
            f"{row['time_ratio']:.2f}x",
            f"{row['plan_seconds']:.1f}" if "plan_seconds" in row else "",
        )
    return table
