"""Errors: exit codes, what they name, and that they survive pickling."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from graphopt import errors


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.GraphoptError, 1),
        (errors.UsageError, 2),
        (errors.BudgetError, 2),
        (errors.PipelineError, 2),
        (errors.CaptureError, 3),
        (errors.BudgetInfeasible, 4),
        (errors.VerificationError, 5),
        (errors.UnsupportedError, 1),
        (errors.RunError, 1),
        (errors.InputMismatch, 1),
        (errors.NonFiniteError, 1),
        (errors.NothingToTrainError, 1),
        (errors.ModelError, 1),
        (errors.FileFormatError, 1),
        (errors.UnsafeFileError, 1),
        (errors.OutputError, 1),
    ],
)
def test_exit_codes(error: type[errors.GraphoptError], code: int) -> None:
    assert error("x").exit_code == code
    assert issubclass(error, errors.GraphoptError)


class Traced(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x)


def test_a_node_gives_its_op_and_the_users_line() -> None:
    program = torch.export.export(Traced(), (torch.randn(2),))
    node = next(n for n in program.graph.nodes if "relu" in n.name)
    error = errors.UnsupportedError("no rule", node=node, hint="write one")
    assert error.node == "relu"
    assert error.op == "aten.relu.default"
    assert error.user_line is not None
    assert "test_errors.py" in error.user_line
    assert "torch.relu(x)" in error.user_line
    for part in ("no rule", "node: relu", "hint: write one"):
        assert part in str(error)


def test_infeasible_says_what_would_do_and_what_is_in_the_way() -> None:
    error = errors.BudgetInfeasible(
        "no plan keeps 10 bytes", requested=10, smallest=1234567, obstacle="conv1", proven=True
    )
    for part in ("memory=1234567", "conv1", "proven"):
        assert part in str(error)
    assert error.to_dict()["smallest"] == 1234567


def test_errors_pickle_with_all_they_carry() -> None:
    error = errors.BudgetInfeasible("no", requested=1, smallest=2.5, hint="more")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is type(error)
    assert copy.__dict__ == error.__dict__
    assert str(copy) == str(error)


def test_suggestions_come_only_for_close_words() -> None:
    assert errors.suggest("memroy", ["memory", "flops"]) == "did you mean 'memory'?"
    assert errors.suggest("xyz", ["memory", "flops"]) is None


def test_the_users_frame_is_the_innermost_outside_torch() -> None:
    trace = (
        'File "/home/a/model.py", line 3, in forward\n    y = self.f(x)\n'
        'File "/lib/site-packages/torch/nn/functional.py", line 9, in relu\n    return x\n'
    )
    assert errors.innermost_user_frame(trace) == "/home/a/model.py:3: y = self.f(x)"
