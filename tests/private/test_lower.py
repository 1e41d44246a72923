"""Circuits compute what the models compute, and say by name what they can't."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.errors import UnsupportedError, UsageError
from graphopt.private import lower
from graphopt.private.circuit import OPS, Circuit
from graphopt.private.plain import evaluate
from tests.private.nets import NETS, build


def computed(circuit: Circuit, *inputs: Tensor) -> Tensor:
    return evaluate(circuit, inputs)[circuit.outputs[0]]


class Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


@pytest.mark.parametrize("name", NETS)
def test_a_circuit_computes_what_the_model_computes(name: str) -> None:
    model, x = build(name, 3)
    circuit = lower(model, (x,))
    assert {step.op for step in circuit.steps} <= OPS
    tolerance = 2e-3 if name == "attention" else 1e-5  # GELU by tanh
    torch.testing.assert_close(
        computed(circuit, x), model(x).detach().double(), atol=tolerance, rtol=tolerance
    )


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6, "hardtanh": F.hardtanh, "abs": torch.abs, "sign": torch.sign,
    "clamp_min": lambda x: x.clamp(min=-0.3), "clamp_max": lambda x: x.clamp(max=0.4),
    "leaky": F.leaky_relu, "silu": F.silu, "sigmoid": torch.sigmoid, "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid, "cubic": lambda x: x**3 - 2 * x + 1, "fourth": lambda x: x**4,
    "where": lambda x: torch.where(x > 0, x, 0.1 * x), "inverse": lambda x: 1 / (x + 3 * x.sign()),
    "compare": lambda x: (x >= 0).float() - (x < 0.5).float() + (x <= -1) * 2.0,
    "softmax": lambda x: x.softmax(-1), "amax": lambda x: x.amax((1, 2), keepdim=True),
    "prelu": lambda x: F.prelu(x, torch.tensor([0.2, 0.3, 0.4, 0.1])), "tanh": torch.tanh,
    "group_norm": lambda x: F.group_norm(x, 2), "tril": lambda x: x.tril(1),
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "nearest": lambda x: F.interpolate(x[None], scale_factor=2.0)[0],
    "bilinear": lambda x: F.interpolate(x[None], scale_factor=2.0, mode="bilinear")[0],
    "corners": lambda x: F.interpolate(x[None], (7, 5), mode="bilinear", align_corners=True)[0],
    "roll": lambda x: x.roll(2, -1).flip(0), "split": lambda x: torch.cat(x.split(2, -1)[::-1], -1),
    "masked": lambda x: x.masked_fill(torch.ones(4, 6).tril() == 0, 2.5),
    "masked_out": lambda x: (x + torch.full((4, 6), float("-inf")).triu(1)).softmax(-1),
    "maximum": lambda x: torch.maximum(x, x.flip(-1)) - torch.minimum(x, x.roll(1, -1)),
    "scatter_add": lambda x: torch.zeros(3, 4, 9).index_add(2, torch.tensor([8, 0, 2, 5, 1, 3]), x),
    "index_put": lambda x: x.index_put((torch.tensor([2, 0]), torch.tensor([1, 3])), 2 * x[0, :2]),
}  # fmt: skip


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_ops_compute_what_torch_computes(name: str) -> None:
    x = torch.randn(3, 4, 6)
    model = Function(ELEMENTWISE[name])
    torch.testing.assert_close(
        computed(lower(model, (x,)), x), model(x).double(), atol=1e-5, rtol=1e-5
    )


@given(
    kernel=st.integers(1, 3), stride=st.integers(1, 3), padding=st.integers(0, 1),
    dilation=st.integers(1, 2), groups=st.sampled_from([1, 2, 4]), size=st.integers(6, 9),
)  # fmt: skip
@settings(max_examples=6, deadline=None)
def test_convolutions_and_pooling_of_any_geometry(
    kernel: int, stride: int, padding: int, dilation: int, groups: int, size: int
) -> None:
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups)
    pool = nn.MaxPool2d(kernel, stride, padding if 2 * padding <= kernel else 0)
    x = torch.randn(2, 4, size, size)
    for model in (conv, pool):
        torch.testing.assert_close(
            computed(lower(model, (x,)), x), model(x).detach().double(), atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("ceil", [False, True])
@pytest.mark.parametrize("sizes", [(3, 2, 1), (2, 3, 0), (3, 3, 1), (2, 1, 1)])
def test_pooling_at_the_edges(sizes: tuple[int, int, int], ceil: bool) -> None:
    """Padding that doesn't count, windows that reach out, and sequences."""
    image, sequence = torch.randn(2, 3, 7, 8), torch.randn(2, 3, 8)
    pools = [
        (image, nn.AvgPool2d(*sizes, ceil, False)), (image, nn.AvgPool2d(*sizes, ceil, True)),
        (image, nn.AvgPool2d(*sizes, ceil, True, divisor_override=5)),
        (image, nn.MaxPool2d(*sizes, ceil_mode=ceil)),
        (sequence, nn.AvgPool1d(*sizes, ceil, False)),
        (sequence, nn.MaxPool1d(*sizes, ceil_mode=ceil)),
    ]  # fmt: skip
    for x, pool in pools:
        circuit = lower(pool, (x,))
        torch.testing.assert_close(computed(circuit, x), pool(x).double(), atol=1e-5, rtol=1e-5)


def test_the_users_model_stays_as_it_is() -> None:
    model, x = build("residual")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lower(model, (x,))
    assert model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_weights_are_secret_and_indices_are_not() -> None:
    model, x = build("gathered")
    circuit = lower(model, (x,))
    for constant in circuit.constants.values():
        assert constant.secret == constant.tensor.is_floating_point()
    assert not any(c.secret for c in lower(model, (x,), weights="public").constants.values())
    some = lower(model, (x,), public=("first.*",))
    assert sum(c.secret for c in some.constants.values()) == 4  # of six weights and biases
    with pytest.raises(UsageError):
        lower(model, (x,), weights="hidden")


def test_a_batch_norm_in_eval_mode_is_one_product() -> None:
    model = nn.BatchNorm2d(3).eval()
    circuit = lower(model, (torch.randn(2, 3, 4, 4),))
    assert [step.op for step in circuit.steps] == ["multiply", "add"]


def test_emitted_modules_lower_as_their_sources_do() -> None:
    model, x = build("residual")
    emitted = graphopt.capture(model, (x,)).emit().eval()
    torch.testing.assert_close(computed(lower(emitted, (x,)), x), model(x).detach().double())


def test_all_ops_that_cannot_run_are_named_with_their_lines() -> None:
    model = Function(lambda x: torch.lgamma(x).sum() + torch.erfinv(x).relu())
    with pytest.raises(UnsupportedError) as caught:
        lower(model, (torch.rand(2, 3),))
    for word in ("lgamma", "erfinv", "test_lower.py"):
        assert word in str(caught.value)


def test_tokens_are_looked_up_one_hot_and_nothing_else_is_done_with_them() -> None:
    table, tokens = nn.Embedding(10, 4), torch.tensor([[1, 2, 9], [0, 4, 4]])
    circuit = lower(table, (tokens,))
    assert [circuit.shape(name) for name in circuit.inputs] == [(2, 3, 10)]
    out = computed(circuit, *circuit.encode([tokens]))
    torch.testing.assert_close(out, table(tokens).detach().double())
    parity = Function(lambda t: (t % 2).float())
    with pytest.raises(UnsupportedError, match="public"):
        lower(parity, (tokens,))


def test_a_public_input_is_built_in() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x.masked_fill(mask == 0, 0.0).relu()

    x, mask = torch.randn(2, 5), torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 1, 1]])
    circuit = lower(Masked(), (x, mask), public=("mask",))
    assert list(circuit.inputs) == ["x"]
    inputs = circuit.encode([x, mask])
    torch.testing.assert_close(computed(circuit, *inputs), Masked()(x, mask).double())


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions(groups: int) -> None:
    conv = nn.ConvTranspose2d(4, 6, 3, 2, 1, 1, groups=groups)
    x = torch.randn(2, 4, 5, 4)
    torch.testing.assert_close(
        computed(lower(conv, (x,)), x), conv(x).detach().double(), atol=1e-5, rtol=1e-5
    )


def test_training_mode_batch_statistics_are_refused() -> None:
    model = nn.BatchNorm2d(3, track_running_stats=False)
    with pytest.raises(UnsupportedError, match="batch_norm"):
        lower(model, (torch.randn(2, 3, 4, 4),))


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x * 2


class Slices(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1, 2)[:, 0].sub_(1.0)
        return y.sigmoid()


@pytest.mark.parametrize(("model", "op"), [(Counter(), "add_"), (Slices(), "sub_")])
def test_writes_that_others_see_are_refused_and_change_nothing(model: nn.Module, op: str) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(UnsupportedError, match=op):
        lower(model, (torch.randn(2, 4),))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_sums_that_cannot_be_negative_are_inverted_without_a_comparison() -> None:
    x = torch.randn(3, 5)

    def steps(function: Callable[[Tensor], Tensor]) -> list[str]:
        class Ratio(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x / function(x)

        circuit = lower(Ratio(), (x,))
        want = evaluate(circuit, [x])[circuit.outputs[0]]
        assert torch.allclose(want, Ratio()(x.double()))
        return [step.op for step in circuit.steps]

    for safe in (
        lambda x: x.square().sum(-1, keepdim=True) + 1e-3,
        lambda x: (x * x + x.exp() * 2).mean() + torch.relu(x) + 0.5,
    ):
        assert "negative" not in steps(safe)
    for unsafe in (
        lambda x: x.sum() + 7.0, lambda x: x.square() - 9.0, lambda x: -2 * x.exp(),
        lambda x: x.exp() * x,
    ):  # fmt: skip
        assert "negative" in steps(unsafe)
