"""Run a module for measuring and leave it as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt.ir.untouched import restored


@contextlib.contextmanager
def preserved(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Prepare a module and its inputs for steps, and restore the module afterwards.

    Inside, every parameter and input that requires a gradient has one of zeros allocated.  The
    inputs are detached twins over the same storage, so that nothing reaches a graph of the
    caller's, and hooks on parameters are off: an optimizer that steps in one must not.  Afterwards
    gradients, hooks, buffers, inputs, attributes, the module's mode, grad mode and all random
    states are as before, also when an exception passes through.

    Yields:
        The positional and keyword inputs to call the module with.
    """
    buffers = [(b, b.detach().clone()) for b in module.buffers()]
    leaves = pytree.tree_leaves((tuple(args), dict(kwargs or {})))
    given = [(t, t._version, t.detach().clone()) for t in leaves if _is_writable(t)]
    parameters = list(module.parameters())
    grad_mode = torch.is_grad_enabled()
    try:
        with restored(module), _without_hooks(parameters):
            for parameter in parameters:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            yield pytree.tree_map(_twin, (tuple(args), dict(kwargs or {})))
    finally:
        # Always copied back: BatchNorm writes running statistics without a new `_version`.
        with torch.no_grad():
            for buffer, copy in buffers:
                buffer.copy_(copy)
            for tensor, version, copy in given:
                if tensor._version != version:
                    tensor.copy_(copy)
        torch.set_grad_enabled(grad_mode)


def _is_writable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.is_inference()


@contextlib.contextmanager
def _without_hooks(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Switch off the hooks that run when a tensor gets its gradient."""
    names = ("_backward_hooks", "_post_accumulate_grad_hooks")
    tables = [table for t in tensors for name in names if (table := getattr(t, name, None))]
    before = [table.copy() for table in tables]
    try:
        for table in tables:  # autograd holds the table itself, so it is emptied in place
            table.clear()
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            table.clear()
            table.update(hooks)


def _twin(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    twin = value.detach()
    if value.requires_grad:
        twin.requires_grad_()
        twin.grad = torch.zeros_like(twin)
    return twin
