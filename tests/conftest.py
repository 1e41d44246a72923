"""What all tests share: quiet libraries, few threads, a clean global state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

# One thread a process: tests run two at a time on two cores, and small ops gain nothing from more.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

torch.set_num_threads(1)
# Nothing here may reach for the network, and progress bars spoil captured output.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
warnings.filterwarnings("ignore", message=".*not supported between instances.*")


@pytest.fixture(autouse=True)
def global_state() -> Iterator[None]:
    """Fail a test that leaves grad mode, the default dtype, or the thread count changed."""
    torch.manual_seed(0)
    before = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    yield
    after = (torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads())
    torch.set_grad_enabled(before[0])
    torch.set_default_dtype(before[1])
    torch.set_num_threads(before[2])
    assert after == before, f"global torch state changed: {before} -> {after}"
