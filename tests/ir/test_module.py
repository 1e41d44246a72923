"""`OptimizedModule` as a drop-in: what a user of the source model would touch."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture


class Config:
    """Stands for a HF config."""

    width = 6

    def __init__(self) -> None:
        self.hidden = 6


class Tower(nn.Module):
    kind = "tower"

    def __init__(self) -> None:
        super().__init__()
        self.config = Config()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Linear(6, 6), "relu": nn.ReLU()})
        self.layers[2].weight = self.layers[0].weight
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("offset", torch.arange(6.0), persistent=False)
        self.shared = self.layers[1]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def helper(self) -> int:
        return 1

    def forward(self, x: Tensor, /, add: Tensor | None = None, *, factor: float = 2.0) -> Tensor:
        for layer in self.layers:
            x = self.named["relu"](self.named["a"](layer(x)))
        x = self.shared(x) * self.scale + self.offset
        return x * factor


@pytest.fixture
def pair() -> tuple[Tower, Any]:
    model = Tower()
    return model, capture(model, torch.randn(4, 6)).emit()


def test_names_and_structure(pair: Any) -> None:
    model, emitted = pair
    assert list(emitted.state_dict()) == list(model.state_dict())
    assert [n for n, _ in emitted.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert [n for n, _ in emitted.named_modules()] == [n for n, _ in model.named_modules()]
    assert [n for n, _ in emitted.named_buffers()] == [n for n, _ in model.named_buffers()]
    assert emitted.layers[0].weight is emitted.layers[2].weight
    assert emitted.layers[1] is emitted.shared
    assert len(emitted.layers) == 3
    assert [type(layer) for layer in emitted.layers] == [type(emitted.layers[0])] * 3
    assert str(emitted).splitlines()[1:] == str(model).splitlines()[1:]
    assert "Linear(in_features=6, out_features=6, bias=True)" in str(emitted)
    assert inspect.signature(emitted.forward) == inspect.signature(capture_signature(model))


def capture_signature(model: nn.Module) -> Callable[..., Any]:
    """The source's forward without annotations."""
    signature = inspect.signature(model.forward)
    empty = inspect.Parameter.empty

    def plain() -> None: ...

    plain.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(annotation=empty) for p in signature.parameters.values()],
        return_annotation=empty,
    )
    return plain


def test_attributes_come_from_the_source(pair: Any) -> None:
    model, emitted = pair
    assert emitted.config.hidden == 6
    assert emitted.config is not model.config
    assert emitted.kind == "tower"
    assert (emitted.device, emitted.dtype) == (torch.device("cpu"), torch.float32)
    assert copy.deepcopy(emitted).double().dtype == torch.float64
    with pytest.raises(AttributeError, match="nothing"):
        _ = emitted.nothing
    with pytest.raises(UnsupportedError, match="helper"):
        emitted.helper()
    assert not hasattr(emitted, "absent")


def test_no_weights_hide_in_the_attributes(pair: Any) -> None:
    _, emitted = pair
    held = emitted.program.skeleton.attributes
    assert not any(isinstance(value, Tensor | nn.Module) for value in held.values())


def test_inner_modules_refuse_hooks_and_calls(pair: Any) -> None:
    _, emitted = pair
    for name in (
        "register_forward_hook",
        "register_forward_pre_hook",
        "register_full_backward_hook",
    ):
        with pytest.raises(UnsupportedError, match=r"layers\.1"):
            getattr(emitted.layers[1], name)(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"layers\.0.*Linear"):
        emitted.layers[0](torch.ones(1, 6))


def test_hooks_on_the_whole_module_run(pair: Any) -> None:
    _, emitted = pair
    seen: list[str] = []
    emitted.register_forward_pre_hook(lambda *_: seen.append("before"))
    emitted.register_forward_hook(lambda *_: seen.append("after"))
    emitted.register_full_backward_hook(lambda *_: seen.append("backward"))
    emitted.layers[0].weight.register_hook(lambda g: seen.append("gradient"))
    emitted(torch.randn(3, 6, requires_grad=True)).sum().backward()
    assert seen[:2] == ["before", "after"]
    assert set(seen[2:]) == {"backward", "gradient"}


def test_functional_call_and_transforms(pair: Any) -> None:
    model, emitted = pair
    x = torch.randn(3, 6)
    other = {k: torch.randn_like(v) for k, v in model.named_parameters()}
    torch.testing.assert_close(functional_call(emitted, other, x), functional_call(model, other, x))

    def loss(parameters: dict[str, Tensor], module: nn.Module) -> Tensor:
        return functional_call(module, parameters, x).square().sum()

    torch.testing.assert_close(grad(loss)(other, emitted), grad(loss)(other, model))


def test_copies_are_independent(pair: Any) -> None:
    _, emitted = pair
    emitted.eval()
    emitted.note = "mine"
    x = torch.randn(3, 6)
    want = emitted(x)
    for twin in (copy.deepcopy(emitted), pickle.loads(pickle.dumps(emitted))):
        assert twin.layers[0].weight is twin.layers[2].weight
        assert twin.layers[0].weight is not emitted.layers[0].weight
        assert twin.code == emitted.code
        assert twin.note == "mine"
        assert not twin.training
        with torch.no_grad():
            twin.scale.zero_()
        assert torch.equal(emitted(x), want)
        assert not torch.equal(twin(x), want)
        assert twin.program.module.scale is twin.scale


def test_a_pickled_optimizer_keeps_its_parameters(pair: Any) -> None:
    _, emitted = pair
    optimizer = torch.optim.SGD(emitted.parameters(), 0.1)
    module, optimizer = pickle.loads(pickle.dumps((emitted, optimizer)))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}


def test_capture_of_an_emission_gives_its_program(pair: Any) -> None:
    _, emitted = pair
    assert capture(emitted, "no inputs needed") is emitted.program  # type: ignore[arg-type]
    again = emitted.program.emit()
    assert again.scale is emitted.scale


def test_values_die_after_their_last_use(pair: Any) -> None:
    """Nothing but parameters, inputs and the result survives the function's last line."""
    _, emitted = pair
    lines = emitted.code.splitlines()
    made = {line.split(" = ")[0].strip() for line in lines if " = torch.ops" in line}
    deleted = {
        name for line in lines if "; del " in line for name in line.split("; del ")[1].split(", ")
    }
    returned = lines[-1].split("return ")[1].strip("(), ")
    assert made - deleted == {returned}


def test_export_gives_the_forward_graph(pair: Any) -> None:
    model, emitted = pair
    x = torch.randn(4, 6)
    exported = torch.export.export(emitted, (x,))
    ops = [str(n.target) for n in exported.graph.nodes if n.op == "call_function"]
    mine = [str(n.target) for n in emitted.program.module.graph.nodes if n.op == "call_function"]
    assert ops == mine
    torch.testing.assert_close(exported.module()(x), model(x))


def test_compile(pair: Any) -> None:
    model, emitted = pair
    compiled = torch.compile(emitted, backend="eager", fullgraph=True)
    x = torch.randn(4, 6)
    torch.testing.assert_close(compiled(x), model(x))


@dataclass
class Doubling:
    """A planner that runs the plain graph and doubles what comes out."""

    kind = "doubling"
    calls: list[int] = field(default_factory=list)

    def runner(self, module: Any, inputs: list[Tensor]) -> Any:
        if not torch.is_grad_enabled():
            return None
        self.calls.append(len(inputs))
        graph = module.program.module

        def run(flat: list[Tensor]) -> list[Tensor]:
            return [2 * value for value in graph(*flat)]

        return run

    def to_dict(self) -> dict[str, Any]:
        return {}


def test_the_planner_runs_calls_and_nothing_else(pair: Any) -> None:
    model, emitted = pair
    planned = emitted.program.replace(planner=Doubling()).emit()
    x = torch.randn(4, 6)
    want = model(x)
    torch.testing.assert_close(planned(x), 2 * want)
    with torch.no_grad():
        torch.testing.assert_close(planned(x), want)  # the planner said no
    several = torch.stack([x, x + 1])  # a transform sees the graph
    torch.testing.assert_close(torch.vmap(planned)(several), torch.vmap(model)(several))
    torch.testing.assert_close(torch.export.export(planned, (x,)).module()(x), want)
    torch.testing.assert_close(copy.deepcopy(planned)(x), 2 * want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(planned))(x), 2 * want)
    torch.testing.assert_close(capture(planned, x).emit()(x), 2 * want)
    assert capture(planned, x).planner is planned.program.planner


def test_a_planned_call_is_opaque_to_compile(pair: Any) -> None:
    model, emitted = pair
    planned = emitted.program.replace(planner=Doubling()).emit()
    x = torch.randn(4, 6)
    compiled = torch.compile(lambda t: planned(t) + 1, backend="eager")
    torch.testing.assert_close(compiled(x), 2 * model(x) + 1)
    torch._dynamo.reset()  # or the frame stays marked as one to skip
    whole = torch.compile(planned, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="planned graphopt module"):
        whole(x)


class OldStyle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.steps = 7

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": self.steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


class HoldsState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = OldStyle()
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.inner(x))


def test_extra_state_and_old_checkpoints() -> None:
    model = HoldsState()
    emitted = capture(model, torch.randn(3, 4)).emit()
    state = model.state_dict()
    assert list(emitted.state_dict()) == list(state)
    assert emitted.state_dict()["inner._extra_state"] == {"steps": 7}
    assert emitted.state_dict()._metadata == state._metadata
    state["inner._extra_state"] = {"steps": 8}
    emitted.load_state_dict(state)
    assert emitted.state_dict()["inner._extra_state"] == {"steps": 8}


def test_code_leaves_linecache_with_its_module(pair: Any) -> None:
    _, emitted = pair
    file = emitted._graphs[0].code.file
    line = emitted.code.splitlines()[0]
    assert linecache.getline(file, 1).strip() == line
    twin = copy.deepcopy(emitted)
    other = twin._graphs[0].code.file
    assert other in linecache.cache
    del twin
    gc.collect()
    assert other not in linecache.cache
    assert linecache.getline(file, 1).strip() == line


def test_settings_of_the_source_are_fixed_and_say_so() -> None:
    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.alpha = torch.nn.Sequential(torch.nn.Dropout(0.1)), 2.0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.alpha * self.layers(x)

    module = graphopt.capture(Scaled(), (torch.randn(3, 4),)).emit()
    with pytest.warns(UserWarning, match="alpha was fixed"):
        module.alpha = 3.0
    with pytest.warns(UserWarning, match="p was fixed"):
        module.layers[0].p = 0.9
    with pytest.raises(graphopt.UnsupportedError, match="replacing part 0"):
        module.layers[0] = torch.nn.Identity()
    module.note = "mine"  # no setting of the source's
    module.eval().train()
