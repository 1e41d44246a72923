"""Traces without free sizes say the same of a model as those that have them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.ir import capture as capturing
from graphopt.ir.capture import capture


class Sized(nn.Module):
    """Uses the size of the batch; in eval mode perhaps a number that is the example's."""

    def __init__(self, in_eval: int | None) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.in_eval = in_eval

    def forward(self, x: Tensor) -> Tensor:
        """Rows, and the sum of as many ones as there are rows."""
        rows = x.shape[0] if self.training or self.in_eval is None else self.in_eval
        ones = torch.ones(rows, 2, dtype=x.dtype, device=x.device)
        return self.linear(x[:])[:, :] + ones.sum() / x.shape[0]


def _traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What was free in the traces that are made from now on."""
    found: list[Any] = []
    original = capturing.trace

    def noted(model: Any, signature: Any, flat: Any, dynamic: Any, **kwargs: Any) -> Any:
        found.append(dynamic)
        return original(model, signature, flat, dynamic, **kwargs)

    monkeypatch.setattr(capturing, "trace", noted)
    return found


@pytest.mark.parametrize("rows", [4, 5, 97])
def test_a_size_written_down_for_eval_mode_is_a_branch(rows: int) -> None:
    """Whichever size stands in for the batch, one in the code isn't taken for it."""
    model = Sized(in_eval=rows)
    program = capture(model, (torch.randn(4, 3),))
    assert program.eval_module is not None
    module = program.emit()
    for training in (True, False):
        x = torch.randn(7, 3)
        assert torch.equal(module.train(training)(x), model.train(training)(x))


class Asks(nn.Module):
    """Scales by a number that depends on the size of the batch, perhaps in eval mode alone."""

    def __init__(self, condition: Callable[[int], bool], in_eval: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.condition, self.in_eval = condition, in_eval

    def forward(self, x: Tensor) -> Tensor:
        asks = not (self.in_eval and self.training)
        return self.linear(x) * (2.0 if asks and self.condition(x.shape[0]) else 1.0)


@pytest.mark.parametrize("in_eval", [False, True])
@pytest.mark.parametrize(
    "condition", [lambda n: n % 2 == 1, lambda n: n > 50, lambda n: n**2 == 97**2]
)
def test_what_the_size_decides_is_no_mode_switch(
    condition: Callable[[int], bool], in_eval: bool
) -> None:
    """For the example the answer is no, for a number that stands in for its size it is yes."""
    model, x = Asks(condition, in_eval), torch.randn(4, 3)
    module = capture(model, (x,)).emit()
    for training in (True, False):
        assert torch.equal(module.train(training)(x), model.train(training)(x))


def test_sizes_that_follow_the_batch_are_no_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arithmetic with sizes and ``[:]`` are the same in a trace that has numbers for them."""
    traces = _traces(monkeypatch)
    model = Sized(in_eval=None)
    program = capture(model, (torch.randn(4, 3),))
    assert program.eval_module is None
    assert traces == ["batch", None]
    module = program.emit().double()
    x = torch.randn(7, 3, dtype=torch.float64)
    assert torch.equal(module(x), model.double()(x))


class Assigned(nn.Module):
    """Assigns a number to a place: recorded otherwise on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Drops out, with one column of ones."""
        ones = torch.zeros(x.shape[0], 3, dtype=x.dtype, device=x.device)
        ones[:, 0] = 1
        return nn.functional.dropout(self.linear(x) + ones, 0.5, self.training)


def test_calls_of_the_meta_device_cost_one_trace_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode, dtype and device are found all the same."""
    traces = _traces(monkeypatch)
    model = Assigned()
    program = capture(model, (torch.randn(4, 3),))
    assert traces == ["batch", None, None]
    assert program.eval_module is None
    assert program.literals == capturing.literals.Literals()
    module = program.emit().eval().double()
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(module(x), model.eval().double()(x))
    assert module.to("meta")(x.to("meta")).device.type == "meta"
