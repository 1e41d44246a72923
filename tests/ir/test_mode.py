"""Train and eval mode of emissions, against the source in the same modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture
from graphopt.ir.mode import ModeSwitch


class Mixed(nn.Module):
    """Every kind of mode-bearing op, and Monte-Carlo dropout, which has no mode."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.alpha = nn.AlphaDropout(0.3)
        self.channel = nn.Dropout1d(0.4)
        self.lstm = nn.LSTM(8, 8, num_layers=2, dropout=0.4, batch_first=True)
        self.rrelu = nn.RReLU()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        y = self.channel(self.rrelu(self.bn(self.conv(x))))
        y, _ = self.lstm(self.drop(y.transpose(1, 2)))
        y = F.dropout(y, 0.2, training=True)
        return self.alpha(self.block(y))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.p = 0.25

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        rate = self.p if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, dropout_p=rate).squeeze(1) + F.dropout(
            x, self.p, self.training
        )


def step(model: nn.Module, x: Tensor) -> tuple[Any, ...]:
    torch.manual_seed(11)
    model.zero_grad()
    out = model(x)
    out.square().mean().backward()
    grads = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return out.detach(), grads, {k: b.clone() for k, b in model.named_buffers()}


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Mixed()
    return model, capture(model, torch.randn(3, 4, 6))


def test_switching_equals_the_source_in_both_directions(mixed: Any) -> None:
    model, program = mixed
    emitted, source = copy.deepcopy(program.emit()), copy.deepcopy(model)
    assert program.eval_module is None
    x = torch.randn(4, 4, 6)
    for training in (False, True, False, True):
        emitted.train(training)
        source.train(training)
        torch.testing.assert_close(step(emitted, x), step(source, x), rtol=0, atol=0)


@pytest.mark.parametrize("frozen", [["bn"], ["drop"], ["lstm", "alpha"], ["block"], ["rrelu"]])
def test_each_module_has_a_mode_of_its_own(mixed: Any, frozen: list[str]) -> None:
    model, program = mixed
    emitted, source = copy.deepcopy(program.emit()).train(), copy.deepcopy(model).train()
    for name in frozen:
        emitted.get_submodule(name).eval()
        source.get_submodule(name).eval()
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(step(emitted, x), step(source, x), rtol=0, atol=0)


def test_modes_at_capture_are_kept() -> None:
    model = Mixed().train()
    model.bn.eval()
    emitted = capture(model, torch.randn(3, 4, 6)).emit()
    assert emitted.training
    assert not emitted.bn.training
    assert {n: m.training for n, m in emitted.named_modules()} == {
        n: m.training for n, m in model.named_modules()
    }


def test_what_does_not_depend_on_the_mode_is_fixed(mixed: Any) -> None:
    _, program = mixed
    marked = {
        str(node.target): node.meta["mode"]
        for node in program.module.graph.nodes
        if "mode" in node.meta
    }
    assert isinstance(marked["aten.batch_norm.default"], ModeSwitch)
    assert marked["aten.batch_norm.default"].owner == "bn"
    assert marked["aten.lstm.input"].owner == "lstm"
    assert marked["aten.scaled_dot_product_attention.default"].values["args.4"] == (0.25, 0.0)
    dropouts = [n for n in program.module.graph.nodes if n.target is torch.ops.aten.dropout.default]
    assert [n.args[1] for n in dropouts if "mode" not in n.meta] == [0.2]


@pytest.mark.parametrize("training", [True, False])
def test_a_specialized_graph_is_fixed(mixed: Any, training: bool) -> None:
    model, program = mixed
    graph = program.specialize(training)
    assert not any("mode" in node.meta for node in graph.graph.nodes)
    assert dict(graph.named_parameters())["conv.weight"] is model.conv.weight
    source = copy.deepcopy(model).train(training)
    before = copy.deepcopy(dict(model.named_buffers()))
    x = torch.randn(3, 4, 6)
    torch.manual_seed(1)
    (got,) = graph(x)
    torch.manual_seed(1)
    torch.testing.assert_close(got, source(x), rtol=0, atol=0)
    assert int(model.bn.num_batches_tracked) == int(before["bn.num_batches_tracked"]) + training
    model.load_state_dict(before, strict=False)


def test_specializing_single_modules(mixed: Any) -> None:
    _, program = mixed
    graph = program.specialize({"bn": False})
    (norm,) = [n for n in graph.graph.nodes if n.target is torch.ops.aten.batch_norm.default]
    assert norm.args[5] is False
    assert not [n for n in graph.graph.nodes if n.target is torch.ops.aten.add_.Tensor]


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.aux = nn.Linear(4, 2)
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.bn(self.fc(x)))
        if self.training:
            return {"y": y, "aux": self.aux(y)}
        return {"y": y.softmax(-1)}


def test_a_branch_on_training_keeps_two_graphs() -> None:
    model = Branch()
    program = capture(model, torch.randn(3, 4))
    assert program.eval_module is not None
    source, emitted = copy.deepcopy(model), program.emit()
    x = torch.randn(5, 4)
    for training in (True, False, True):
        source.train(training)
        emitted.train(training)
        torch.manual_seed(3)
        want = source(x)
        torch.manual_seed(3)
        got = emitted(x)
        assert list(got) == list(want)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    emitted.bn.eval()  # outside of the branch: both have their own mode
    source.bn.eval()
    torch.manual_seed(3)
    want = source(x)
    torch.manual_seed(3)
    torch.testing.assert_close(emitted(x), want, rtol=0, atol=0)
    emitted.train()
    emitted.training = False
    emitted.aux.train()
    with pytest.raises(UnsupportedError, match=r"self\.training"):
        emitted(x)


class KeepsNormFrozen(nn.Module):
    """Overrides ``train``, as fine-tuning code does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)

    def train(self, mode: bool = True) -> KeepsNormFrozen:
        super().train(mode)
        self.bn.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.fc(x))


def test_an_overridden_train_is_followed() -> None:
    model = KeepsNormFrozen().train()
    emitted = capture(model, torch.randn(3, 4)).emit().eval().train()
    assert emitted.training
    assert not emitted.bn.training
    x = torch.randn(4, 4)
    torch.testing.assert_close(emitted(x), model(x))
    assert int(emitted.bn.num_batches_tracked) == 0


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.drop(self.fc(x))
        with torch.autocast("cpu", torch.bfloat16):
            z = self.drop(self.fc(x))
        return torch.cond(x.sum() > 0, lambda a: self.fc(a), lambda a: a * 2, (y + z.float(),))


@pytest.mark.parametrize("sign", [1, -1])
def test_regions_and_branches_in_both_modes(sign: int) -> None:
    model = Regions()
    emitted = copy.deepcopy(capture(model, torch.randn(3, 4)).emit())
    x = sign * torch.rand(5, 4)
    for training in (True, False, True):
        got, want = (step(m.train(training), x) for m in (emitted, model))
        torch.testing.assert_close(got, want)
