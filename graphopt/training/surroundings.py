"""What training leaves as it was: modes, gradients, random states; and a clean end by Ctrl-C."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from graphopt.ir.randomness import kept_random_state
from graphopt.ir.untouched import buffers_kept, outside_inference_mode


@contextlib.contextmanager
def surroundings(
    module: nn.Module, teacher: nn.Module | None, trained: Iterable[nn.Parameter]
) -> Iterator[None]:
    """Modes, gradients, the random state, global modes, the teacher's buffers stay as they were."""
    owners = [*module.modules(), *(teacher.modules() if teacher is not None else ())]
    modes = [(owner, owner.training) for owner in owners]
    held = [(p, p.grad, p.requires_grad) for p in {id(p): p for p in trained}.values()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(outside_inference_mode())
        stack.enter_context(torch.enable_grad())
        if teacher is not None:
            stack.enter_context(buffers_kept(teacher))
        try:
            for parameter, *_ in held:
                parameter.requires_grad_()
            if teacher is not None:
                teacher.eval()
            yield
        finally:
            for parameter, gradient, requires_grad in held:
                parameter.grad = gradient
                parameter.requires_grad_(requires_grad)
            for owner, mode in modes:
                owner.training = mode


@contextlib.contextmanager
def ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that no step is torn apart; a second one interrupts at once."""
    stopped = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield stopped  # KeyboardInterrupt comes, or whatever the host made of it
        return

    def stop(number: int, frame: Any) -> None:
        if stopped.is_set():
            signal.default_int_handler(number, frame)
        stopped.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)
