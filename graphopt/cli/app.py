"""The command group, and the options that commands share."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import click

COMMANDS = {
    "optimize": "graphopt.cli.optimize",
    "explain": "graphopt.cli.explain",
    "bench": "graphopt.cli.bench",
    "inspect": "graphopt.cli.views",
    "dump": "graphopt.cli.views",
    "diff": "graphopt.cli.diff",
    "passes": "graphopt.cli.passes",
    "solve": "graphopt.cli.solve",
    "private-cost": "graphopt.cli.private",
    "sweep": "graphopt.cli.sweep",
}


class LazyGroup(click.Group):
    """Imports a command's module when it is asked for, so that ``--help`` starts at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order in which the help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command called ``cmd_name``, or None."""
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        return getattr(importlib.import_module(module), cmd_name.replace("-", "_"))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        """As in click, but with the closest command for a misspelt one."""
        from graphopt.errors import suggest

        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = suggest(args[0], COMMANDS) or f"one of {', '.join(COMMANDS)}"
            ctx.fail(f"No such command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="graphopt", message="%(prog)s %(version)s")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def app(debug: bool) -> None:
    """Graph transformations for PyTorch models under a budget.

    MODEL is package.module:factory or path/to/file.py:factory, or a file that `optimize -o` wrote.
    The factory returns the model, or (model, args), or (model, args, kwargs).

    \b
    Exit codes: 0 done, 1 user error, 2 usage, 3 capture failed, 4 budget infeasible,
    5 verification failed, 6 different (`diff --exit-code`), 130 interrupted.
    """  # noqa: D301 - click reads the backslash


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command: ``--quiet`` and ``--debug``."""

    @click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")
    @click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks of errors.")
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Argument and options of every command that captures a model."""

    @click.argument("model")
    @click.option(
        "--dynamic",
        default="batch",
        show_default=True,
        metavar="AXES",
        help="Sizes that stay free: batch, batch,sequence, or none.",
    )
    @click.option("--eval", "evaluation", is_flag=True, help="Put the model in eval mode.")
    @click.option("--trust", is_flag=True, help="Load a model file even if it could run code.")
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped


network_option = click.option(
    "--network",
    default="lan",
    show_default=True,
    metavar="NAME",
    help="lan, wan, or bandwidth,rtt in bit/s and seconds.",
)


def planning_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of every command that plans."""

    @click.option(
        "--time-limit",
        type=click.FloatRange(min=0, min_open=True),
        default=60.0,
        show_default=True,
        metavar="SECONDS",
        help="Time that planning may take.",
    )
    @click.option("--seed", type=int, default=0, show_default=True, help="Seed of all draws.")
    @click.option(
        "--cost-model",
        type=click.Choice(["flops", "analytic", "profiled"]),
        default="flops",
        show_default=True,
        help="Where the seconds of an op come from.",
    )
    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return command(*args, **kwargs)

    return wrapped
