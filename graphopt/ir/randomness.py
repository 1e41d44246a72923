"""The random states of Python, NumPy, the CPU and every CUDA device: keep them, seed them."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore all random states on the way out.

    Every CUDA device counts, for seeding reaches all of them; none where CUDA isn't initialised,
    which asking for their states would do.
    """
    python, cpu = random.getstate(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy = sys.modules.get("numpy")
    numbers = numpy.random.get_state() if numpy is not None else None
    try:
        yield
    finally:
        random.setstate(python)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if numpy is not None:
            numpy.random.set_state(numbers)


def python_draws() -> Callable[[], bool]:
    """Starts watching Python's and NumPy's generators; the result says whether one was used."""
    numpy = sys.modules.get("numpy")

    def states() -> tuple[Any, ...]:
        numbers = numpy.random.get_state() if numpy is not None else ("", b"", 0)
        return random.getstate(), numbers[0], bytes(numbers[1]), numbers[2:]

    before = states()
    return lambda: states() != before


def seed_torch(seed: int) -> None:
    """Seed the CPU and, where CUDA is initialised, every device.

    `torch.manual_seed` would queue the seed for a CUDA that is initialised later, long after
    `kept_random_state` has restored what was there before.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
