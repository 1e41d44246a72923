"""`graphopt.inspect.diff`: empty for the same program, exactly the changed nodes after a pass."""

from __future__ import annotations

import functools
import json
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt import inspect, registry
from graphopt.errors import FileFormatError, UnsupportedError
from graphopt.inspect import diff
from graphopt.ir.capture import capture
from graphopt.ir.graphs import bind_graph
from graphopt.pipeline import PassContext
from tests.zoo import ZOO

SAME = ["mlp", "cond", "no_grad_region", "autocast", "bert", "training_branch", "odd_names"]


@functools.cache
def transformed(name: str, passes: str, first: str = "") -> tuple[Any, Any, Any]:
    """A zoo model's program before and after a pipeline (``first`` runs before both)."""
    model, args, kwargs = ZOO[name]()
    program = capture(model, args, kwargs)
    context = PassContext(args, kwargs, model, time_limit=5)
    if first:
        program = registry.parse(first).run(program, context)
    return program, registry.parse(passes).run(program, context), (args, kwargs)


def calls(module: fx.GraphModule) -> dict[str, fx.Node]:
    return {n.name: n for n in module.graph.nodes if n.op == "call_function"}


def arguments(node: fx.Node) -> str:
    """Arguments with nodes by name, as FX prints them."""
    return f"{node.args} {node.kwargs}"


class Recorder(fx.Interpreter):
    """Runs a graph on tensors and notes what every node gave and read."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.sizes: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        read = [tuple(self.env[s].shape) for s in n.all_input_nodes if s.op == "get_attr"]
        value = super().run_node(n)
        self.sizes[n.name] = (getattr(value, "shape", None), read)
        return value


def sizes(program: Any, inputs: Any) -> dict[str, Any]:
    args, kwargs = inputs
    recorder = Recorder(program.module)
    with torch.no_grad():
        recorder.run(*program.signature.flatten_inputs(args, kwargs))
    return recorder.sizes


@pytest.mark.parametrize("name", SAME)
def test_a_program_with_itself_and_with_a_second_capture_is_empty(name: str) -> None:
    program = capture(*ZOO[name]())
    again = capture(*ZOO[name]())
    for other in (program, again, program.emit()):
        found = diff(program, other)
        assert not found
        assert found.text() == ""
        assert found.to_dict()["changes"] == []
        assert found.to_dict()["unchanged"] == len(found.before.entries) > 2
    assert not diff(program, again, training=False)


@pytest.mark.parametrize("view", ["joint", "plan"])
def test_joint_graphs_and_plans_of_the_same_program_are_the_same(view: str) -> None:
    before, after, _ = transformed("mlp", "share")
    assert not diff(before, capture(*ZOO["mlp"]()), view=view)
    assert not diff(after, after, view=view)


def test_canonicalize_changes_exactly_the_in_place_ops() -> None:
    before, after, _ = transformed("inplace_chain", "canonicalize")
    old, new = calls(before.module), calls(after.module)
    # By hand: what InplaceChain.forward writes in place without anybody else seeing it.
    expected = {"add_", "relu_", "mul_", "add__1", "sigmoid_"}
    found = diff(before, after)
    assert {c.before.name for c in found.changes if c.before} == expected
    assert found.names() == new.keys() - old.keys()
    assert all(set(c.fields) == {"op"} for c in found.changes)
    assert not found.state


@pytest.mark.parametrize("name", ["resnet", "vit", "unet"])
def test_canonicalize_changes_the_ops_that_the_counts_say(name: str) -> None:
    before, after, _ = transformed(name, "canonicalize")
    counts = [
        Counter(str(n.target) for n in calls(program.module).values())
        for program in (before, after)
    ]
    assert counts[0] != counts[1]
    found = [
        c
        for c in diff(before, after).changes
        if "op" in c.fields or c.before is None or c.after is None
    ]
    gone = Counter(f"{c.before.target}" for c in found if c.before)
    come = Counter(f"{c.after.target}" for c in found if c.after)
    assert gone - come == counts[0] - counts[1]
    assert come - gone == counts[1] - counts[0]


@pytest.mark.parametrize("name", ["resnet", "cnn"])
def test_prune_changes_exactly_the_nodes_whose_sizes_change(name: str) -> None:
    before, after, inputs = transformed(name, "prune{flops=60%}", "canonicalize")
    old, new = calls(before.module), calls(after.module)
    assert old.keys() == new.keys()
    old_sizes, new_sizes = sizes(before, inputs), sizes(after, inputs)
    expected = {
        n for n in old if old_sizes[n] != new_sizes[n] or arguments(old[n]) != arguments(new[n])
    }
    assert 0 < len(expected) < len(old)
    found = diff(before, after)
    assert found.names() == found.names("changed") == expected
    shapes = [dict(p.emit().state_dict()) for p in (before, after)]
    assert {c.path for c in found.state if c.kind == "type"} == {
        path for path, value in shapes[0].items() if value.shape != shapes[1][path].shape
    }


def test_linearize_changes_exactly_the_replaced_sites_and_their_readers() -> None:
    before, after, _ = transformed("resnet", "linearize{relus=50%}", "canonicalize")
    sites = after.history[-1].report["linearize"]["sites"]
    replaced = {site["node"] for site in sites if site["choice"] != "keep"}
    old, new = calls(before.module), calls(after.module)
    assert replaced
    assert replaced == old.keys() - new.keys()
    found = diff(before, after)
    gone = {c.before.name for c in found.changes if c.before} - found.names("rewired")
    assert gone == replaced
    assert found.names("added", "changed") == new.keys() - old.keys()
    readers = {n for n in old.keys() & new.keys() if arguments(old[n]) != arguments(new[n])}
    assert found.names("rewired") == readers
    tensors = [
        {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        for module in (before.emit(), after.emit())
    ]
    assert {c.path for c in found.state if c.kind == "added"} == tensors[1] - tensors[0]


def test_share_leaves_the_forward_graph_and_recomputes_in_the_plan() -> None:
    before, after, _ = transformed("cnn", "share")
    assert after.planner is not None
    old, new = calls(before.module), calls(after.module)
    assert {n: arguments(v) for n, v in old.items()} == {n: arguments(v) for n, v in new.items()}
    assert not diff(before, after)
    found = diff(before, after, view="plan")
    stages = inspect.document(after, "plan").segments
    again = {
        node.name
        for stage in stages
        if stage.phase == "backward"
        for node in stage.module.graph.nodes
        if node.op == "call_function" and node.meta.get("partitioner_tag") == "is_forward"
    }
    told = {c.after.node.name for c in found.changes if c.after and c.after.phase == "recomputed"}
    assert told == again
    assert len(again) > 2


class Stack(nn.Module):
    def __init__(self, gate: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        if self.gate:
            x = torch.sigmoid(x)
        for layer in self.layers:
            x = torch.relu(layer(x)) + 1
        return x


def test_an_inserted_node_leaves_those_behind_it_alone() -> None:
    torch.manual_seed(0)
    plain, gated = Stack(False), Stack(True)
    gated.load_state_dict(plain.state_dict())
    x = torch.randn(2, 4)
    found = diff(capture(plain, (x,)), capture(gated, (x,)))
    assert found.names("added") == {"sigmoid"}
    assert found.names("rewired") == {"linear"}
    assert len(found.changes) == 2
    assert not found.state


def edited(program: Any, edit: Any) -> Any:
    graph = fx.Graph()
    graph.output(graph.graph_copy(program.module.graph, {}))
    edit({node.name: node for node in graph.nodes}, graph)
    return program.replace(module=bind_graph(fx.GraphModule(program.module, graph), program.module))


def swap(nodes: dict[str, fx.Node], graph: fx.Graph) -> None:
    nodes["sub"].args = tuple(reversed(nodes["sub"].args))


def literal(nodes: dict[str, fx.Node], graph: fx.Graph) -> None:
    nodes["mul"].args = (nodes["mul"].args[0], 3)


def remove(nodes: dict[str, fx.Node], graph: fx.Graph) -> None:
    nodes["relu"].replace_all_uses_with(nodes["relu"].args[0])
    graph.erase_node(nodes["relu"])


def rename(nodes: dict[str, fx.Node], graph: fx.Graph) -> None:
    nodes["relu"].name, nodes["mul"].name = "mul_7", "relu"


def other_op(nodes: dict[str, fx.Node], graph: fx.Graph) -> None:
    nodes["relu"].target = torch.ops.aten.tanh.default


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.fc(x))
        return x - y * 2


EDITS = {
    "swapped operands": (swap, {("rewired", "sub", "sub")}),
    "another number": (literal, {("changed", "mul", "mul")}),
    "one node less": (remove, {("removed", "relu", None), ("rewired", "mul", "mul")}),
    "only names": (rename, set()),
    "another op": (other_op, {("changed", "relu", "relu")}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_single_edits(edit: str) -> None:
    program = capture(Small(), (torch.randn(2, 4),))
    change, expected = EDITS[edit]
    found = diff(program, edited(program, change))
    shown = {(c.kind, c.before and c.before.name, c.after and c.after.name) for c in found.changes}
    assert shown == expected
    assert bool(found) == bool(expected)


def test_other_weights_are_a_change_of_the_tensor() -> None:
    model, x = Small(), torch.randn(2, 4)
    before = capture(model, (x,))
    other = Small()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.fc.bias[1] = 7.0
    found = diff(before, capture(other, (x,)))
    assert [(c.path, c.kind) for c in found.state] == [("fc.bias", "values")]
    assert not found.changes


def test_the_text_and_its_colours() -> None:
    program = capture(Small(), (torch.randn(2, 4),))
    found = diff(program, edited(program, other_op))
    assert found.text(context=0) == (
        "     ... 2 unchanged\n"
        "@@ root: Small\n"
        "-    relu = aten.relu.default(linear)  # f32[s0, 4], 32 B\n"
        "+    relu = aten.tanh.default(linear)  # f32[s0, 4], 32 B\n"
        "     ... 3 unchanged\n"
    )
    styles = {
        found.coloured().plain[s.start : s.start + 1]: s.style for s in found.coloured().spans
    }
    assert (styles["-"], styles["+"]) == ("red", "green")


def test_dumps_compare_like_programs() -> None:
    before, after, _ = transformed("inplace_chain", "canonicalize")
    old, new = (json.loads(inspect.dump(p, "json", view="program")) for p in (before, after))
    assert not diff(old, old)
    assert not diff(before, old)
    assert diff(old, new).names() == diff(old, after).names() == diff(before, after).names()


@pytest.mark.parametrize("data", [{}, {"nodes": [1], "state": {}}, {"nodes": [{}], "state": []}])
def test_what_is_no_dump_is_refused(data: Any) -> None:
    with pytest.raises(FileFormatError, match="dump"):
        diff(data, data)


def test_what_has_no_graph_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="Small"):
        diff(Small(), Small())
    program = capture(Small(), (torch.randn(2, 4),))
    with pytest.raises(UnsupportedError, match="view"):
        diff(program, program, view="jiont")


def test_optimized_modules_compare() -> None:
    model, args, kwargs = ZOO["mlp"]()
    module = graphopt.optimize(model, None, args, example_kwargs=kwargs, passes="canonicalize")
    assert not diff(module, module)
    assert not diff(capture(model, args, kwargs), module).changes
