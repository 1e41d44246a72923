"""Models that were once answered wrongly, or not at all."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt


class Drawing(nn.Module):
    """Stochastic depth with Python's generator."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) if random.random() < 0.5 else x


class Counting(nn.Module):
    """Writes to an input."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, count: Tensor) -> Tensor:
        count.add_(1)
        return self.layer(x)


@dataclass
class Result:
    loss: Tensor
    logits: Tensor


class Classed(nn.Module):
    """Returns an object of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Result:
        logits = self.layer(x)
        return Result(logits.square().mean(), logits)


def test_numbers_drawn_by_python_are_refused() -> None:
    with pytest.raises(graphopt.CaptureError, match="Python's or NumPy's"):
        graphopt.capture(Drawing(), (torch.randn(4, 8),))


def test_example_inputs_are_left_as_they_were() -> None:
    count = torch.zeros(3)
    graphopt.optimize(Counting(), "memory=1GB", (torch.randn(4, 8), count), time_limit=1)
    assert not count.any()


def test_outputs_of_a_class_of_the_users() -> None:
    model, x = Classed(), torch.randn(4, 8)
    module = graphopt.optimize(model, "memory=1GB", (x,), time_limit=1)
    result = module(x)
    assert isinstance(result, Result)
    torch.testing.assert_close(result.logits, model(x).logits)


class Attending(nn.Module):
    """Returns the weights of its attention, which no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor, padding: Tensor) -> tuple[Tensor, Tensor]:
        h, weights = self.attention(x, x, x, key_padding_mask=padding)
        return self.mlp(x + h), weights


class Recurrent(nn.Module):
    """Returns all hidden states, which no loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 12, batch_first=True, bidirectional=True)
        self.lstm = nn.LSTM(24, 8, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        y, last = self.gru(x)
        y, (h, c) = self.lstm(y)
        return self.head(y), last, (h, c)


class Sized(nn.Module):
    """Returns a free size as a number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"logits": self.layer(x), "n": x.shape[0]}


class Codebook(nn.Module):
    """Holds a tensor under a name that graph modules need."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("code", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.code


def gradients(
    module: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[[Any], Tensor]
) -> list[Tensor]:
    module.zero_grad()
    torch.manual_seed(3)
    loss(module(*inputs)).backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


def first_squared(outputs: Any) -> Tensor:
    return outputs[0].square().mean()


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Attending(), (torch.randn(6, 20, 32), torch.arange(20).expand(6, 20) > 15)),
        (Recurrent(), (torch.randn(6, 4, 8),)),
    ],
)
def test_outputs_that_no_loss_reads_keep_the_batch_free(
    model: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    module = graphopt.optimize(model, "memory=100%", inputs, loss=first_squared, time_limit=1)
    for batch in (6, 3):
        part = tuple(t[:batch] for t in inputs)
        got, want = (gradients(m, part, first_squared) for m in (module, model))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_a_free_size_may_be_returned() -> None:
    model, x = Sized(), torch.randn(6, 8)
    module = graphopt.optimize(model, "memory=1GB", (x,), time_limit=1)
    assert module(x[:4])["n"] == 4
    torch.testing.assert_close(module(x)["logits"], model(x)["logits"])


def test_a_name_that_is_taken_is_refused() -> None:
    model, x = Codebook(), torch.randn(4, 8)
    with pytest.raises(graphopt.CaptureError, match=r"Codebook.code has a name"):
        graphopt.capture(model, (x,))
    wrapped = graphopt.capture(nn.Sequential(model), (x,)).emit()
    torch.testing.assert_close(wrapped(x), model(x))


def residual_mlp() -> nn.Module:
    def block() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Dropout(0.1), nn.Linear(64, 16))

    return nn.Sequential(block(), block())


def test_dropout_in_bfloat16_is_that_of_eager() -> None:
    """Its scale is a number of bfloat16 too, forward and backward."""
    torch.manual_seed(0)
    model, x = residual_mlp().bfloat16(), torch.randn(32, 16, dtype=torch.bfloat16)
    module = graphopt.optimize(model, "memory=80%", (x,), time_limit=1)
    for got, want in zip(
        gradients(module, (x,), torch.sum), gradients(model, (x,), torch.sum), strict=True
    ):
        assert torch.equal(got, want)


def test_under_autocast() -> None:
    """Planned outside or inside of it, a step under autocast has the gradients of eager."""
    torch.manual_seed(0)
    model, x = residual_mlp(), torch.randn(32, 16)
    outside = graphopt.optimize(copy.deepcopy(model), "memory=80%", (x,), time_limit=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = graphopt.optimize(copy.deepcopy(model), "memory=100%", (x,), time_limit=1)
        want = gradients(model, (x,), torch.sum)
        for module in (outside, inside):
            got = gradients(module, (x,), torch.sum)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


class Judging(nn.Module):
    """Returns a mask besides what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.layer(x)
        return y, y > 0


def test_a_mask_may_be_returned() -> None:
    model, x = Judging(), torch.randn(6, 8)
    module = graphopt.optimize(model, "memory=1GB", (x,), time_limit=1)
    torch.testing.assert_close(module(x), model(x))


def test_ops_with_effects_are_planned() -> None:
    """A linear solve checks its matrix, which tracing takes for an effect to be kept in order."""
    model = nn.Sequential(
        nn.utils.parametrizations.orthogonal(nn.Linear(8, 8), orthogonal_map="cayley"), nn.Tanh()
    )
    x = torch.randn(6, 8)
    module = graphopt.optimize(model, "memory=100%", (x,), time_limit=1)
    got, want = (gradients(m, (x,), torch.sum) for m in (module, model))
    torch.testing.assert_close(got, want)


class Shared(nn.Module):
    """One block under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
        self.alias = self.block

    def forward(self, x: Tensor) -> Tensor:
        return self.alias(self.block(x))


def test_the_mode_of_a_module_with_two_names() -> None:
    model, x = Shared(), torch.randn(6, 8)
    module = graphopt.optimize(model, "memory=100%", (x,), time_limit=1)
    for m in (model, module):
        m.get_submodule("block.1").eval()
    torch.testing.assert_close(module(x), model(x))


class Auxiliary(nn.Module):
    """An output, with parameters of its own, that the loss leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.aux = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.used(x)
        return {"loss": y.square().mean(), "aux": self.aux(y)}


@pytest.mark.parametrize("aux", [False, True])
def test_hooks_of_what_the_loss_leaves_out(aux: bool) -> None:
    model, x = Auxiliary(), torch.randn(6, 8)
    module = graphopt.optimize(model, "memory=100%", (x,), time_limit=1)
    fired: list[list[str]] = [[], []]
    for m, names in zip((module, model), fired, strict=True):
        for name, parameter in m.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name, names=names: names.append(name)
            )
        outputs = m(x)
        (outputs["loss"] + (outputs["aux"].sum() if aux else 0)).backward()
    assert sorted(fired[0]) == sorted(fired[1])
    for got, want in zip(module.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)
