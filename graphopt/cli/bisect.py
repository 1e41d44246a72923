"""The option ``--bisect`` of `graphopt optimize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from graphopt.cli.console import message, show_json
from graphopt.errors import EXIT_OK, EXIT_VERIFICATION


def bisected(
    run: Callable[..., Any],
    check: Callable[[Any], Any],
    training: bool,
    instruments: Sequence[Any],
    told: Any,
) -> Any:
    """Run a pipeline and find what breaks a check.

    Args:
        run: `graphopt.optimize` with all but ``verify`` and ``instruments``.
        check: The user's.
        training: Mode of the modules that it gets.
        instruments: Others that watch the run.
        told: Progress.

    Returns:
        A `graphopt.inspect.Finding`, or None.
    """
    from graphopt.inspect import Bisect

    bisect = Bisect(check, training=training)
    raised: Exception | None = None
    try:
        run(verify=False, instruments=[bisect, *instruments])
    except Exception as error:  # a third party's pass may raise anything
        if not bisect.programs:
            raise
        raised = error
    told("asking the check")
    found = bisect.finding(raised)
    if found is None and raised is not None:
        raise raised  # it was no pass that raised
    return found


def show_finding(found: Any, as_json: bool) -> int:
    """Print what was found, on stdout; gives the exit code."""
    if as_json:
        show_json({"schema_version": 1, "pass": None} if found is None else found.to_dict())
    elif found is None:
        message("no pass breaks the check")
    else:
        print(found)
    return EXIT_OK if found is None else EXIT_VERIFICATION
