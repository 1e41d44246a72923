"""Calls and forwards timed in turns."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor, nn

from graphopt.cost import seconds
from graphopt.cost.calls import Call, TensorSpec
from graphopt.measure import forward_seconds

aten = torch.ops.aten


def product(size: int) -> Call:
    spec = TensorSpec(0, (size, size), (size, 1), torch.float32, torch.device("cpu"))
    return Call(aten.mm.default, (spec, spec), ())


def test_each_distinct_call_is_timed_once_and_more_work_takes_longer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(seconds, "_KNOWN", {})
    told: list[tuple[int, int]] = []
    calls = [product(8), product(256), product(8)]
    small, large, again = seconds.call_seconds(
        calls, limit=60, progress=lambda done, total: told.append((done, total))
    )
    assert told[-1] == (6, 6)
    assert small == again
    assert small is not None
    assert large is not None
    assert large > 3 * small
    told.clear()
    assert seconds.call_seconds(calls, limit=60)[0] == small
    assert not told


def test_what_fails_or_comes_too_late_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "_KNOWN", {})
    wrong = Call(aten.mm.default, (1, 2), ())
    assert seconds.call_seconds([wrong], limit=60) == [None]
    assert seconds.call_seconds([product(9)], limit=0.0) == [None]
    assert seconds.call_seconds([product(9)], limit=60) != [None]


class Sleeper(nn.Module):
    """Takes a while, and longer in train mode."""

    def __init__(self, duration: float) -> None:
        super().__init__()
        self.duration = duration

    def forward(self, x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        time.sleep(self.duration * (10 if self.training else 1))
        return x


def test_forwards_in_turns_and_in_eval_mode() -> None:
    slow, fast = Sleeper(0.012).train(), Sleeper(0.004).train()
    found = forward_seconds(slow, fast, (torch.ones(1),), limit=0.1)
    assert found.seconds / found.reference == pytest.approx(3.0, rel=0.3)
    assert found.pairs >= 8
    assert slow.training
    assert fast.training
