"""Outputs that are views: same memory, strides and gradients as the model's, at every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Views(nn.Module):
    """Views of intermediates, of another output, of an input, a parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 24)
        self.register_buffer("table", torch.ones(4, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.inner(x))
        first, second, _ = self.outer(torch.relu(hidden)).chunk(3, -1)
        again = self.inner(hidden)
        return {
            "first": first,
            "second": second.transpose(0, 1),
            "again": again,
            "permuted": again.permute(2, 0, 1),
            "reshaped": again.reshape(x.shape[0], -1),
            "input": x[:, :2],
            "weight": self.inner.weight.t(),
            "buffer": self.table[0],
            "copied": second.reshape(x.shape[0], -1),
        }


PAIRS = [("first", "second"), ("again", "permuted"), ("again", "reshaped")]


def loss(outputs: dict[str, Tensor]) -> Tensor:
    return torch.stack([(value * value).sum() for value in outputs.values()]).sum()


@pytest.fixture(scope="module")
def both() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    source = Views()
    x = torch.randn(8, 10, 16)
    return source, graphopt.optimize(source, "memory=1GB", (x,), loss=loss, time_limit=1)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


@pytest.mark.parametrize("batch", [8, 5])
def test_values_gradients_and_strides(both: tuple[nn.Module, nn.Module], batch: int) -> None:
    x = torch.randn(batch, 10, 16)
    found = []
    for module in both:
        module.zero_grad()
        outputs = module(x)
        loss(outputs).backward()
        found.append((outputs, [p.grad for p in module.parameters()]))
    (want, want_gradients), (got, gradients) = found
    for name, value in want.items():
        torch.testing.assert_close(got[name], value)
        assert got[name].stride() == value.stride()
        assert got[name].requires_grad == value.requires_grad
    torch.testing.assert_close(gradients, want_gradients)


def test_memory_is_shared_as_in_the_model(both: tuple[nn.Module, nn.Module]) -> None:
    x = torch.randn(3, 10, 16)
    for module in both:
        outputs = module(x)
        assert all(same_memory(outputs[a], outputs[b]) for a, b in PAIRS)
        assert not same_memory(outputs["copied"], outputs["first"])
        assert same_memory(outputs["input"], x)
        assert same_memory(outputs["weight"], module.inner.weight)
        assert same_memory(outputs["buffer"], module.table)


def test_a_write_to_one_is_seen_in_the_other(both: tuple[nn.Module, nn.Module]) -> None:
    for module in both:
        with torch.no_grad():
            outputs = module(torch.randn(3, 10, 16))
        outputs["permuted"].zero_()
        assert not outputs["again"].any()
