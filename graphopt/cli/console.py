"""What commands write: progress and messages to stderr, products to stdout or a file."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from graphopt.plain import to_plain

_PLAIN_SECONDS = 2.0


def message(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


def show(renderable: Any) -> None:
    """A table or text on stdout."""
    width = None if sys.stdout.isatty() else 120
    Console(file=sys.stdout, width=width).print(renderable)


def show_json(data: Any) -> None:
    """JSON on stdout."""
    print(json.dumps(to_plain(data), indent=2, allow_nan=False))


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """Yields a progress callback ``(message, fraction)`` that draws on stderr."""
    if quiet:
        yield lambda text, fraction=None: None
    elif sys.stderr.isatty():
        with _bar() as bar:
            task = bar.add_task("starting", total=None)
            yield lambda text, fraction=None: bar.update(
                task,
                description=text,
                total=None if fraction is None else 1.0,
                completed=0.0 if fraction is None else fraction,
            )
    else:
        yield _Lines()


def _bar() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


class _Lines:
    """Progress where no terminal draws: a line now and then."""

    def __init__(self) -> None:
        self.last = ("", 0.0)

    def __call__(self, text: str, fraction: float | None = None) -> None:
        said, when = self.last
        now = time.monotonic()
        if text == said or now - when < _PLAIN_SECONDS:
            return
        share = "" if fraction is None else f" ({100 * fraction:.0f} %)"
        message(f"{text}{share}")
        self.last = (text, now)
