"""Run a module for measuring and leave it as it was found."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree


@contextlib.contextmanager
def preserved(
    module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] | None
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Prepare a module and its inputs for steps, and restore the module afterwards.

    Inside, every parameter and input that requires a gradient has one of zeros allocated.  The
    inputs are detached twins over the same storage, so that nothing reaches a graph of the
    caller's.  Afterwards gradients, buffers, the module's mode, grad mode and all random states are
    as before, also when an exception passes through.

    Yields:
        The positional and keyword inputs to call the module with.
    """
    gradients = [(p, p.grad) for p in module.parameters()]
    modes = [(m, m.training) for m in module.modules()]
    buffers = _Buffers(module)
    grad_mode = torch.is_grad_enabled()
    devices = sorted({p.device.index for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices), _python_random():
            for parameter, _ in gradients:
                if parameter.requires_grad:
                    parameter.grad = torch.zeros_like(parameter)
            twins = pytree.tree_map(_twin, (tuple(args), dict(kwargs or {})))
            yield twins
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training
        buffers.restore()
        torch.set_grad_enabled(grad_mode)


@contextlib.contextmanager
def autocast_off() -> Iterator[None]:
    """Switch autocast off for every device type for which it is on."""
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


class _Buffers:
    """Buffers of a module: which tensors they are and what they hold."""

    def __init__(self, module: nn.Module) -> None:
        self.owners = [(part, dict(part._buffers)) for part in module.modules()]
        unique = {id(t): t for _, held in self.owners for t in held.values() if t is not None}
        # Always copied back: BatchNorm writes running statistics without a new `_version`.
        self.copies = [(t, t.detach().clone()) for t in unique.values()]

    def restore(self) -> None:
        for part, held in self.owners:
            part._buffers.clear()
            part._buffers.update(held)
        with torch.no_grad():
            for tensor, copy in self.copies:
                tensor.copy_(copy)


def _twin(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    twin = value.detach()
    if value.requires_grad:
        twin.requires_grad_()
        twin.grad = torch.zeros_like(twin)
    return twin


@contextlib.contextmanager
def _python_random() -> Iterator[None]:
    state = random.getstate()
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
