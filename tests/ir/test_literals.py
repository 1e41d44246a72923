"""Dtype and device literals: emissions convert and move as their sources do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture


class Norm(nn.Module):
    """RMSNorm as Llama has it (float32 inside), and as T5 has it (a branch on half precision)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(8))

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        y = x.to(torch.float32)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(dtype)


class T5Norm(Norm):
    def forward(self, x: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        if self.weight.dtype in (torch.float16, torch.bfloat16):
            x = x.to(self.weight.dtype)
        return self.weight * x


class Literals(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.norm = Norm()
        self.t5 = T5Norm()

    def forward(self, x: Tensor) -> Tensor:
        y = x + self.norm(self.fc(x))
        y = y + self.t5(y)
        n = x.shape[-1]
        mask = torch.full((n, n), torch.finfo(y.dtype).min, dtype=y.dtype, device=y.device).triu(1)
        steps = torch.arange(n, device=x.device, dtype=torch.float32).to(self.fc.weight.dtype)
        table = torch.tensor([0.1] * 8, dtype=y.dtype, device=y.device)
        half = torch.zeros(n, dtype=torch.float32).to(y)
        return (y @ (mask.softmax(-1))) * steps + table + half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conversion_equals_the_source(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Literals()
    program = capture(model, torch.randn(4, 8))
    assert (program.literals.dtype, program.literals.device) == (None, None)
    emitted, source = copy.deepcopy(program.emit()).to(dtype), copy.deepcopy(model).to(dtype)
    x = torch.randn(3, 8, dtype=dtype)
    got, want = emitted(x), source(x)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0 if dtype != torch.float64 else 1e-8)
    back = emitted.float()
    assert back(x.float()).dtype == torch.float32


def test_the_program_of_a_converted_module_is_converted() -> None:
    emitted = capture(Literals(), torch.randn(4, 8)).emit().to(torch.bfloat16)
    program = emitted.program
    assert capture(emitted, torch.randn(1)) is program
    assert [fake.dtype for fake in program.fake_inputs()] == [torch.bfloat16]
    output = program.module.graph.output_node().args[0][0]
    assert output.meta["val"].dtype == torch.bfloat16
    (full,) = [n for n in program.module.graph.nodes if "full" in str(n.target)]
    assert full.args[1] == torch.finfo(torch.bfloat16).min


def test_moving_to_another_device() -> None:
    """The meta device stands for any other: no tensor may stay behind."""
    emitted = capture(Literals(), torch.randn(4, 8)).emit().to("meta")
    out = emitted(torch.randn(3, 8, device="meta"))
    assert out.device.type == "meta"


class Undecidable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.dtype == torch.float32:
            y = y.sin().to(torch.float32)
        return y


def test_what_cannot_be_decided_is_refused_before_anything_moves() -> None:
    emitted = capture(Undecidable(), torch.randn(2, 4)).emit()
    for convert in (emitted.half, emitted.bfloat16, lambda: emitted.to(torch.float16)):
        with pytest.raises(UnsupportedError, match="dtype"):
            convert()
    assert {p.dtype for p in emitted.parameters()} == {torch.float32}
    assert emitted.to("cpu") is emitted
    assert emitted(torch.randn(3, 4)).dtype == torch.float32


class PlainTensor(nn.Module):
    """A tensor that is no buffer: ``.to`` leaves it alone, on the source as well."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.scale = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) * self.scale


def test_plain_tensors_stay_what_they_are() -> None:
    model = PlainTensor()
    emitted: Any = copy.deepcopy(capture(model, torch.randn(2, 4)).emit())
    source = copy.deepcopy(model).double()
    emitted.double()
    x = torch.randn(3, 4, dtype=torch.float64)
    assert emitted.scale.dtype == torch.float32
    torch.testing.assert_close(emitted(x), source(x), rtol=0, atol=0)
