"""Leave a model and the global state as they were, whatever happens inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graphopt.ir.randomness import kept_random_state

_TABLES = (dict, list, set)


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model's modes, attributes and gradients, the random state and all global modes.

    Inside, gradients are enabled, and ambient autocast and inference modes are off.
    """
    with restored(model), _global_modes():
        yield


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore a model's modes, attributes and gradients, and the random state.

    What buffers and parameters hold is not saved.
    """
    before = _snapshot(model)
    try:
        with kept_random_state():
            yield
    finally:
        _restore(before)


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore what buffers hold, whether `forward` counts calls or averages in eval mode too."""
    held = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        # By value: BatchNorm writes running statistics without a new `_version`.
        with torch.no_grad():
            for buffer, copy in held:
                if not torch.equal(buffer, copy):
                    buffer.copy_(copy)


@contextlib.contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode``, where there is one: tensors made in it can't be trained."""
    if not torch.is_inference_mode_enabled():
        yield  # entering inference_mode(False) would switch gradients on
        return
    with torch.inference_mode(False):
        yield


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off for every device type for which it is on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


def ordinary(value: Any) -> Any:
    """A tensor that was made in inference mode as one that autograd takes; all else as it is."""
    if not isinstance(value, torch.Tensor) or not value.is_inference():
        return value
    with torch.inference_mode(False):
        return value.detach().clone().requires_grad_(value.requires_grad)


def _snapshot(model: nn.Module) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    saved: list[tuple[Any, dict[str, Any], dict[str, Any]]] = []
    for module in model.modules():
        tables = {k: v.copy() for k, v in vars(module).items() if isinstance(v, _TABLES)}
        saved.append((module, dict(vars(module)), tables))
    saved += [
        (tensor, {"requires_grad": tensor.requires_grad, "grad": tensor.grad}, {})
        for tensor in (*model.parameters(), *model.buffers())
    ]
    return saved


def _restore(saved: list[tuple[Any, dict[str, Any], dict[str, Any]]]) -> None:
    for item, values, tables in saved:
        if isinstance(item, torch.Tensor):
            if item.is_leaf and item.requires_grad != values["requires_grad"]:
                item.requires_grad_(values["requires_grad"])
            if item.is_leaf and item.grad is not values["grad"]:
                item.grad = values["grad"]
            continue
        for name, table in tables.items():
            _refill(values[name], table)
        vars(item).clear()
        vars(item).update(values)


def _refill(table: Any, content: Any) -> None:
    """Put a container back to what it held, if it changed."""
    if isinstance(table, list):
        if len(table) != len(content) or any(
            a is not b for a, b in zip(table, content, strict=True)
        ):
            table[:] = content
    elif isinstance(table, dict):
        if list(table) != list(content) or any(table[k] is not content[k] for k in content):
            table.clear()
            table.update(content)
    elif table != content:
        table.clear()
        table.update(content)


@contextlib.contextmanager
def _global_modes() -> Iterator[None]:
    """Tracing runs with gradients, without ambient autocast; a failing export leaves nothing."""
    grad = torch.is_grad_enabled()
    dtype = torch.get_default_dtype()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(autocast_off())
        try:
            torch.set_grad_enabled(True)
            yield
        finally:
            torch.set_default_dtype(dtype)
    torch.set_grad_enabled(grad)
