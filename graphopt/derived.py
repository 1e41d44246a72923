"""What modules can be asked for and a higher floor makes: the doors say who does.

`graphopt.ir` knows nothing of the packages above it.  The package's front door, which knows all,
registers them here when it is first imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_MAKERS: dict[str, Callable[..., Any]] = {}


def register(name: str, maker: Callable[..., Any]) -> None:
    """Say who makes a derived view."""
    _MAKERS[name] = maker


def derived(name: str, *args: Any, **kwargs: Any) -> Any:
    """Make a derived view."""
    return _MAKERS[name](*args, **kwargs)
