"""Calls that run a sub-graph in a mode of its own: another grad mode, or autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import fx

Region = tuple[Callable[[], AbstractContextManager[Any]], fx.GraphModule, Iterable[Any]]
"""A sub-graph that runs in a mode of its own: what makes its context, itself, its inputs."""


def region(target: Any, args: tuple[Any, ...]) -> Region | None:
    """What a call runs, if it runs a sub-graph in a grad mode or under autocast.

    Args:
        target: What is called.
        args: Values of its arguments.
    """
    name = getattr(target, "_name", "")
    if name == "wrap_with_set_grad_enabled":
        return partial(torch.set_grad_enabled, args[0]), args[1], args[2:]
    if name == "wrap_with_autocast":
        device, dtype, enabled, cache, inner, *rest = args
        mode = partial(torch.autocast, device, dtype, enabled=enabled, cache_enabled=cache)
        return mode, inner, rest
    return None
