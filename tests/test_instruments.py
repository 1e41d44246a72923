"""Instruments: what the verifier finds, dumps, times, bisection."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.comparison import differences, observe, relative_error
from graphopt.errors import OutputError, UnsupportedError, VerificationError
from graphopt.instruments import Dump, Time, Verify, bisect
from graphopt.ir.graphs import bind_graph
from graphopt.pipeline import Pass, PassContext, PassResult, Pipeline, Preserves


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.Linear(4, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(torch.relu(self.linear(self.norm(x))))


@dataclass(frozen=True)
class Edit(Pass):
    """Applies a function to a copy of the graph and claims what it is told to claim."""

    name: ClassVar[str] = "edit"

    edit: Callable[[fx.Graph], Any] = field(default=lambda graph: None)

    def run(self, program: graphopt.Program, context: PassContext) -> PassResult:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.module.graph, {}))
        self.edit(graph)
        module = bind_graph(fx.GraphModule(program.module, graph), program.module)
        return PassResult(program.replace(module=module), True)


@dataclass(frozen=True)
class Loose(Edit):
    """As `Edit`, but claims only two digits."""

    preserves: ClassVar[Preserves] = Preserves(outputs=1e-2, gradients=1e-2, buffers=1e-2)


def target(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if name in str(n.target))


def scale_relu(factor: float) -> Callable[[fx.Graph], None]:
    def edit(graph: fx.Graph) -> None:
        relu = target(graph, "relu")
        with graph.inserting_after(relu):
            new = graph.call_function(torch.ops.aten.mul.Tensor, (relu, factor))
        new.meta = dict(relu.meta)
        relu.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    return edit


def run(pass_: Pass, numeric: bool = True) -> graphopt.Program:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(6, 4)
    program = graphopt.capture(model, (x,))
    context = PassContext(args=(x,), source=model)
    return Pipeline((pass_,)).run(program, context, [Verify(numeric=numeric)])


def test_an_honest_pass_passes() -> None:
    assert run(Edit()).history[-1].name == "edit"
    run(Loose(edit=scale_relu(1.001)))


@pytest.mark.parametrize(
    ("edit", "claim"),
    [
        (scale_relu(1.001), "outputs"),
        (lambda g: target(g, "relu").replace_all_uses_with(target(g, "linear.default")), "outputs"),
    ],
)
def test_wrong_numbers_are_found(edit: Any, claim: str) -> None:
    with pytest.raises(VerificationError, match="differs by") as caught:
        run(Edit(edit=edit))
    assert caught.value.claim == claim
    assert caught.value.pass_name == "edit"
    assert caught.value.exit_code == 5


def test_wrong_gradients_alone_are_found() -> None:
    def edit(graph: fx.Graph) -> None:
        weight = target(graph, "linear.weight")
        with graph.inserting_after(weight):
            cut = graph.call_function(torch.ops.aten.detach.default, (weight,))
        cut.meta = dict(weight.meta)
        weight.replace_all_uses_with(cut, delete_user_cb=lambda user: user is not cut)

    with pytest.raises(VerificationError, match=r"gradients within 0.*linear\.weight"):
        run(Edit(edit=edit))


def test_a_lost_buffer_update_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        graph.erase_node(target(graph, "add_"))

    with pytest.raises(VerificationError, match="num_batches_tracked"):
        run(Edit(edit=edit))


def test_a_dangling_name_is_found() -> None:
    def edit(graph: fx.Graph) -> None:
        target(graph, "linear.weight").target = "linear.missing"

    with pytest.raises((VerificationError, AttributeError)):
        run(Edit(edit=edit))


def test_wrong_metadata_is_found_with_the_node_and_the_users_line() -> None:
    def edit(graph: fx.Graph) -> None:
        relu = target(graph, "relu")
        relu.meta["val"] = relu.meta["val"][:, :2]

    with pytest.raises(VerificationError, match="metadata states") as caught:
        run(Edit(edit=edit))
    assert caught.value.node == "relu"
    assert "torch.relu" in (caught.value.user_line or "")


def test_a_wrong_op_for_the_shapes_is_found_without_running_anything() -> None:
    def edit(graph: fx.Graph) -> None:
        relu = target(graph, "relu")
        relu.target = torch.ops.aten.t.default

    with pytest.raises(VerificationError, match="metadata"):
        run(Edit(edit=edit), numeric=False)


def test_verifying_leaves_the_model_and_the_random_state_alone() -> None:
    model, x = Net(), torch.randn(6, 4)
    model.linear.weight.grad = torch.ones(4, 4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    program = graphopt.capture(model, (x,))
    Pipeline((Edit(),)).run(program, PassContext(args=(x,), source=model), [Verify()])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.linear.weight.grad, torch.ones(4, 4))
    assert model.norm.weight.grad is None
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_observing_twice_gives_the_same_with_dropout() -> None:
    model, x = Net(), torch.randn(6, 4)
    first = observe(model, (x,), {}, training=True, seed=3)
    assert not differences(first, observe(model, (x,), {}, training=True, seed=3))
    assert differences(first, observe(model, (x,), {}, training=True, seed=5))


def test_relative_error_is_the_ratio_of_norms() -> None:
    a = torch.tensor([3.0, 4.0])
    assert relative_error(a, a + torch.tensor([0.0, 0.5])) == pytest.approx(0.1)
    assert relative_error(a, a.double()) == float("inf")
    nan = torch.tensor([float("nan"), 1.0])
    assert relative_error(nan, nan.clone()) == 0
    assert relative_error(a, nan) == float("inf")


def test_dumps_are_numbered_and_replace_only_their_own(tmp_path: Path) -> None:
    (tmp_path / "007_old.py").write_text("stale")
    (tmp_path / "notes.txt").write_text("mine")
    x = torch.randn(6, 4)
    program = graphopt.capture(Net(), (x,))

    def render(program: Any, kind: str) -> str:
        return json.dumps([kind, len(program.module.graph.nodes)])

    dump = Dump(tmp_path, render)
    Pipeline((Edit(), Edit())).run(program, PassContext(args=(x,)), [dump])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "000_capture.json",
        "000_capture.py",
        "001_edit.json",
        "001_edit.py",
        "002_edit.json",
        "002_edit.py",
        "notes.txt",
    ]
    assert json.loads((tmp_path / "001_edit.json").read_text())[0] == "json"


def test_an_unwritable_dump_folder_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        Dump(tmp_path / "file", lambda program, kind: "")


def test_times_are_collected_in_order() -> None:
    x = torch.randn(6, 4)
    program = graphopt.capture(Net(), (x,))
    times = Time()
    Pipeline((Edit(), Loose())).run(program, PassContext(args=(x,)), [times])
    assert len(times.seconds) == 2
    assert all(seconds >= 0 for _, seconds in times.seconds)


@pytest.mark.parametrize("guilty", range(5))
def test_bisection_finds_the_first_bad_pass(guilty: int) -> None:
    x = torch.randn(6, 4)
    program = graphopt.capture(Net(), (x,))
    passes = [Edit(edit=scale_relu(1.5 if i == guilty else 1.0)) for i in range(5)]

    def good(candidate: graphopt.Program) -> bool:
        muls = [n for n in candidate.module.graph.nodes if "mul.Tensor" in str(n.target)]
        return all(n.args[1] == 1.0 for n in muls)

    culprit = bisect(Pipeline(tuple(passes)), program, PassContext(args=(x,)), good)
    assert culprit is not None
    assert culprit.index == guilty
    assert good(culprit.before)
    assert not good(culprit.after)


def test_bisection_blames_a_pass_that_raises_and_acquits_the_innocent() -> None:
    def refuse(graph: fx.Graph) -> None:
        raise UnsupportedError("not with me")

    x = torch.randn(6, 4)
    program = graphopt.capture(Net(), (x,))
    context = PassContext(args=(x,))
    culprit = bisect(Pipeline((Edit(), Edit(edit=refuse))), program, context, lambda p: True)
    assert culprit is not None
    assert culprit.index == 1
    assert isinstance(culprit.error, UnsupportedError)
    assert bisect(Pipeline((Edit(),)), program, context, lambda p: True) is None
    with pytest.raises(ValueError, match="before any pass"):
        bisect(Pipeline((Edit(),)), program, context, lambda p: False)
