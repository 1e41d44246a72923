"""The command line: thin, calls the functions that a user would call."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence

from graphopt.errors import EXIT_INTERRUPTED, EXIT_OK, EXIT_USER, GraphoptError, first_line

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; default: those of the process.

    Returns:
        The exit code: 0 done, 1 user error, 2 usage, 3 capture failed, 4 budget infeasible,
        5 verification failed, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or bool(os.environ.get("GRAPHOPT_DEBUG"))
    if not debug:
        _hush_libraries()
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except GraphoptError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read our output is gone; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_USER
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(
            f"internal error: {type(error).__name__}: {first_line(error)}\n"
            "  hint: --debug shows the traceback; please report it",
            file=sys.stderr,
        )
        return EXIT_USER


def _hush_libraries() -> None:
    """Keep torch's own log and warnings off stderr: errors say what a user has to know."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("torch.fx.experimental.symbolic_shapes", "torch._subclasses.fake_tensor"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


def _run(arguments: list[str]) -> int:
    import click

    from graphopt.cli.app import app

    try:
        result = app.main(arguments, prog_name="graphopt", standalone_mode=False)
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return result if isinstance(result, int) else EXIT_OK
