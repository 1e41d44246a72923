"""Capture: what comes in, what stays untouched, what is refused and how."""

from __future__ import annotations

import dataclasses
import random
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import CaptureError, InputMismatch, UsageError
from graphopt.ir.capture import capture


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.fc = nn.Linear(8, 4)
        self.calls = 0
        self.log: list[int] = []

    def forward(self, x: Tensor, scale: float = 1.0, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        self.log.append(self.calls)
        y = self.drop(self.bn(self.conv(x)).relu()).mean((2, 3))
        y = self.fc(y) * scale
        return y if bias is None else y + bias


def image(batch: int = 4) -> Tensor:
    return torch.randn(batch, 3, 8, 8)


def test_capture_leaves_everything_as_it_was() -> None:
    model = Net()
    model.bn.eval()
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    model.conv.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    versions = [b._version for b in model.buffers()]
    grad = model.fc.weight.grad
    x = image()
    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        graphopt.capture(model, x)
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert model.training
    assert not model.bn.training
    assert (model.calls, model.log) == (0, [])
    assert model.fc.weight.grad is grad
    assert not model.conv.weight.requires_grad
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [b._version for b in model.buffers()] == versions


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append("call")
        y = self.fc(x)
        torch.set_grad_enabled(False)
        torch.set_default_dtype(torch.float64)
        if y.sum() > 0:  # the line that the error names
            return y
        return -y


def test_a_failing_capture_restores_too_and_names_the_line() -> None:
    model = Fails().eval()
    with pytest.raises(CaptureError, match="Fails can't be captured") as caught:
        capture(model, torch.randn(2, 4))
    assert torch.is_grad_enabled()
    assert torch.get_default_dtype() == torch.float32
    assert not model.training
    assert model.seen == []
    assert "the line that the error names" in (caught.value.user_line or "")
    assert "torch.cond" in (caught.value.hint or "")
    assert caught.value.exit_code == 3


def test_it_is_no_module() -> None:
    with pytest.raises(graphopt.GraphoptError, match=r"torch\.nn\.Module"):
        graphopt.capture(lambda x: x, torch.ones(2))  # type: ignore[arg-type]


def test_wrong_example_inputs_are_named() -> None:
    with pytest.raises(InputMismatch, match=r"Net\.forward"):
        graphopt.capture(Net(), (), {"nonsense": image()})
    with pytest.raises(UsageError, match="height"):
        graphopt.capture(Net(), image(), dynamic="height")


class TwoBatches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.embed(ids).flatten(0, 1)[:, :10], labels.flatten() % 6)


def test_one_tensor_in_two_places() -> None:
    """``labels=ids``: export would wire both uses to one placeholder."""
    model, ids = TwoBatches(), torch.randint(0, 6, (3, 5))
    emitted = graphopt.capture(model, (ids, ids)).emit()
    labels = torch.randint(0, 6, (3, 5))
    torch.testing.assert_close(emitted(ids, labels), model(ids, labels))


Point = namedtuple("Point", "x y")


@dataclasses.dataclass
class Result:
    value: Tensor
    extra: Any = None
    parts: tuple[Tensor, ...] = ()


class Trees(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, batch: dict[str, Any], *more: Tensor, flag: bool = False, **rest: Any) -> Any:
        y = self.fc(batch["a"]) + batch["b"][0]
        for tensor in more:
            y = y + tensor
        p = rest["point"]
        return OrderedDict(
            result=Result(y, extra={"none": None, "n": 3}, parts=(p.x, y * 2)),
            flag=flag,
            list=[p.y],
        )


def test_nested_inputs_and_outputs() -> None:
    model = Trees()
    a, b, c, d, e = (torch.randn(2, 4) for _ in range(5))
    emitted = graphopt.capture(
        model, ({"a": a, "b": (b,)}, c), {"point": Point(d, e), "flag": True}
    ).emit()
    a, b, c, d, e = (torch.randn(3, 4) for _ in range(5))
    want = model({"a": a, "b": (b,)}, c, point=Point(d, e), flag=True)
    got = emitted({"b": (b,), "a": a}, c, flag=True, point=Point(d, e))
    assert type(got) is OrderedDict
    assert list(got) == list(want)
    assert type(got["result"]) is Result
    assert got["result"].extra == {"none": None, "n": 3}
    assert got["flag"] is True
    torch.testing.assert_close(got["result"].value, want["result"].value)
    torch.testing.assert_close(got["result"].parts, want["result"].parts)
    torch.testing.assert_close(got["list"], want["list"])


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((torch.ones(4, 3, 8, 8), 2.0), {}, ["scale", "1.0", "2.0"]),
        ((torch.ones(4, 3, 8, 8),), {"bias": torch.ones(4)}, ["bias", "None", "tensor"]),
        ((torch.ones(4, 3, 8, 9),), {}, ["'x'", "dimension 3", "8", "9"]),
        ((torch.ones(3, 8, 8),), {}, ["'x'", "4 dimensions", "3"]),
        (({"x": 1},), {}, ["'x'", "tensor", "dict"]),
        ((), {}, ["missing", "x"]),
        ((torch.ones(4, 3, 8, 8),), {"y": 1}, ["y"]),
    ],
)
def test_a_call_that_does_not_fit_is_named(args: Any, kwargs: Any, words: list[str]) -> None:
    emitted = _net()
    with pytest.raises(InputMismatch) as caught:
        emitted(*args, **kwargs)
    assert all(word in str(caught.value) for word in words), caught.value


_cache: list[Any] = []


def _net() -> Any:
    if not _cache:
        _cache.append(graphopt.capture(Net(), image()).emit())
    return _cache[0]


class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if x.shape[0] % 2:
            raise ValueError("an even batch, please")
        a, b = x.view(2, -1, 4).unbind(0)
        return self.fc(a * b) + mask[: a.shape[0]]


def test_guards_on_sizes_are_clear_errors() -> None:
    model = Halves()
    emitted = graphopt.capture(model, (torch.randn(4, 4), torch.randn(4, 1))).emit()
    x = torch.randn(6, 4), torch.randn(6, 1)
    torch.testing.assert_close(emitted(*x), model(*x))
    with pytest.raises(InputMismatch, match=r"x\.shape\[0\]"):
        emitted(torch.randn(5, 4), torch.randn(5, 1))


class Multiply(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fc(x).unsqueeze(1) * y.unsqueeze(0)


def test_torchs_own_dynamic_shapes() -> None:
    batch = torch.export.Dim("batch")
    model = Multiply()
    program = graphopt.capture(
        model, (torch.randn(4, 4), torch.randn(3, 4)), dynamic={"x": {0: batch}, "y": None}
    )
    emitted = program.emit()
    x, y = torch.randn(7, 4), torch.randn(3, 4)
    torch.testing.assert_close(emitted(x, y), model(x, y))
    with pytest.raises(InputMismatch, match="'y'"):
        emitted(x, torch.randn(5, 4))
    assert set(program.signature.dynamic["x"]) == {0}
    assert program.signature.dynamic["y"] == {}


def test_no_dynamic_sizes() -> None:
    emitted = graphopt.capture(Net(), image(), dynamic=None).emit()
    assert emitted(image()).shape == (4, 4)
    with pytest.raises(InputMismatch, match="dimension 0"):
        emitted(image(5))


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 0


class UsesSquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(self.fc(x))  # type: ignore[no-any-return]


def test_a_custom_backward_is_refused_by_name() -> None:
    """Export inlines the function and silently drops its backward."""
    with pytest.raises(CaptureError, match="Square") as caught:
        graphopt.capture(UsesSquare(), torch.randn(2, 3))
    assert "Square.apply" in (caught.value.user_line or "")
    assert Square.apply(torch.ones(2)).sum() == 2  # and is as it was


class Average(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return x - self.mean


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.average = Average()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.average(x))


def test_assignment_to_a_buffer_of_an_inner_module() -> None:
    """Export keeps assignments on the root only and silently drops the others."""
    model, x = Inner(), torch.randn(5, 3)
    emitted = graphopt.capture(model, x).emit()
    twin = Inner()
    twin.load_state_dict(model.state_dict())
    for _ in range(3):
        torch.testing.assert_close(emitted(x), twin(x))
        assert torch.equal(emitted.average.mean, twin.average.mean)
    exported = torch.export.export(emitted, (x,)).module()
    torch.testing.assert_close(exported(x), twin(x))


def test_the_placeholders_are_flat_and_named() -> None:
    program = graphopt.capture(Trees(), ({"a": torch.ones(2, 4), "b": (torch.ones(2, 4),)},), {
        "point": Point(torch.ones(2, 4), torch.ones(2, 4))
    })  # fmt: skip
    names = [n.name for n in program.module.graph.find_nodes(op="placeholder")]
    assert names == ["batch_a", "batch_b_0", "rest_point_0", "rest_point_1"]
    assert tuple(names) == program.signature.names
    output = program.module.graph.output_node().args[0]
    assert isinstance(output, tuple)
    assert all(isinstance(leaf, torch.fx.Node) for leaf in output)
    fakes = program.fake_inputs()
    assert all(isinstance(fake.shape[0], torch.SymInt) for fake in fakes)
    assert len({id(fake.fake_mode) for fake in fakes}) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript_is_refused():
    with pytest.raises(graphopt.CaptureError, match="compiled by TorchScript"):
        graphopt.capture(torch.jit.script(nn.Linear(4, 3)), (torch.randn(2, 4),))
