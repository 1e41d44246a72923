from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn

import graphopt
from graphopt import inspect
from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture
from graphopt.measure import measure_step
from tests.zoo import ZOO

SIMPLE = ["mlp", "inplace_chain", "buffer_update", "alias_outputs", "integer_outputs", "odd_names"]
REGIONS = ["autocast", "no_grad_region", "cond"]
OTHERS = ["tied_weights", "fft", "dtype_mix", "noise", "nested_outputs", "none_outputs", "frozen"]


@functools.cache
def captured(name):
    """The program of a zoo model; `ZOO[name]()` gives an equal model to run."""
    model, args, kwargs = ZOO[name]()
    return capture(model, args, kwargs)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


def copied_state(model):
    return {
        name: t.detach().clone().requires_grad_(t.requires_grad)
        for name, t in model.state_dict(keep_vars=True).items()
    }


def run_dump(text, function, *args):
    scope = {"__name__": "dumped"}
    exec(compile(text, "dump.py", "exec"), scope)
    torch.manual_seed(7)
    return scope[function](*args)


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.allclose(first, second, rtol=1e-5, atol=1e-6, equal_nan=True)
    return first == second


@pytest.mark.parametrize("name", [*SIMPLE, *REGIONS, *OTHERS])
def test_python_of_a_program_computes_what_the_model_computes(name):
    model, args, kwargs = ZOO[name]()
    program = captured(name)
    state, flat = copied_state(model), program.signature.flatten_inputs(args, kwargs)
    found = run_dump(inspect.dump(program, training=modes(model)), "forward", state, *flat)
    torch.manual_seed(7)
    expected = program.signature.flatten_outputs(model(*args, **kwargs))
    assert len(found) == len(expected)
    assert all(map(same, found, expected))
    # Buffers are updated as the model updates them.
    assert all(same(state[n], t) for n, t in model.named_buffers() if n in state)


@pytest.mark.parametrize("name", ["mlp", "double_dropout"])
def test_python_of_a_program_in_eval_mode(name):
    model, args, kwargs = ZOO[name]()
    program = captured(name)
    flat = program.signature.flatten_inputs(args, kwargs)
    text = inspect.dump(program, training=False)
    (found,) = run_dump(text, "forward", copied_state(model), *flat)
    torch.manual_seed(7)  # one of its dropouts is always on
    assert same(found, model.eval()(*args, **kwargs))


@pytest.mark.parametrize("name", ["mlp", "buffer_update", "tied_weights", "cond", "frozen"])
def test_python_of_a_joint_graph_computes_the_gradients(name):
    model, args, kwargs = ZOO[name]()
    program = captured(name)
    shown = inspect.document(program, "joint", training=modes(model))
    state, flat = copied_state(model), program.signature.flatten_inputs(args, kwargs)
    torch.manual_seed(7)
    outputs = program.signature.flatten_outputs(model(*args, **kwargs))
    wanted = [outputs[int(slot.name.removeprefix("tangent_"))] for slot in shown.tangents]
    tangents = [torch.rand_like(value) for value in wanted]
    torch.autograd.backward(wanted, tangents)
    with torch.no_grad():
        text = inspect.dump(program, view="joint", training=modes(model))
        found, gradients = run_dump(text, "joint", state, *flat, *tangents)
    assert all(map(same, found, outputs))
    expected = {n: p.grad for n, p in model.named_parameters(remove_duplicate=False)}
    given = {name: grad for name, grad in gradients.items() if name in expected}
    assert given
    assert all(expected[n] is None if g is None else same(g, expected[n]) for n, g in given.items())
    assert all(same(state[n], t) for n, t in model.named_buffers() if n in state)


@pytest.fixture(scope="module")
def planned():
    model, args, kwargs = ZOO["mlp"]()
    # 100 %: a plan that needs not recompute anything, so that it is found at once.
    return graphopt.optimize(
        model, "memory=100%", args, example_kwargs=kwargs, time_limit=2, verify=False
    ), args


def test_python_of_a_plan_gives_the_same_bits_as_the_planned_module(planned):
    module, args = planned
    shown = inspect.document(module.program, "plan")
    state = copied_state(module)
    module.zero_grad()
    torch.manual_seed(7)
    output = module(*args)
    tangent = torch.rand_like(output)
    with torch.random.fork_rng():
        output.backward(tangent)
    assert [slot.name for slot in shown.tangents] == ["tangent_0"]
    with torch.no_grad():
        text = inspect.dump(module.program, view="plan")
        found, gradients = run_dump(text, "step", state, *args, tangent)
    assert torch.equal(found[0], output)
    expected = {n: p.grad for n, p in module.named_parameters()}
    assert set(gradients) == set(expected)
    assert all(torch.equal(gradients[n], g) for n, g in expected.items())
    assert "=== backward, stage 1" in text


def test_live_bytes_of_a_plan_are_those_of_its_step(planned):
    module, args = planned
    live = inspect.live_bytes(inspect.document(module.program, "plan"))
    measured = measure_step(module, args)
    assert live.peak == pytest.approx(measured.peak, rel=0.02, abs=256)
    assert max(size for _, size in live.timeline) == live.peak


def test_a_plan_is_shown_by_default_where_there_is_one(planned):
    program = planned[0].program
    assert inspect.dump(program) == inspect.dump(program, view="plan")
    assert "def step(" in inspect.dump(program)
    assert "def forward(" in inspect.dump(program, view="program")
    # It was planned for training; in eval mode the forward graph is what runs.
    assert "def forward(" in inspect.dump(program, training=False)


def test_plan_of_a_program_without_one():
    with pytest.raises(UnsupportedError, match="no plan"):
        inspect.dump(captured("mlp"), view="plan")


@pytest.mark.parametrize("view", ["program", "joint", "plan"])
def test_dumped_file_runs_as_a_script(view, tmp_path, planned):
    module, _ = planned
    file, saved = tmp_path / "dump.py", tmp_path / "state.pt"
    file.write_text(inspect.dump(module.program, view=view))
    torch.save(module.state_dict(), saved)
    done = subprocess.run(
        [sys.executable, str(file), str(saved)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "(4, 5)"


def test_readable_python_of_a_small_model():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x):
            return torch.tanh(self.layer(x))

    text = inspect.dump(capture(Small(), (torch.rand(2, 8),)))
    body = text[text.index("def forward") : text.index("def example")]
    body = re.sub(r"s\d+", "s0", body)
    assert body.rstrip() == (
        "def forward(state, x):\n"
        '    """Flat outputs; buffers in `state` are updated as the model updates them."""\n'
        "    # layer: Linear\n"
        "    linear = torch.ops.aten.linear.default(x, state['layer.weight'], "
        "state['layer.bias'])  # f32[s0, 4], 32 B <- layer.weight f32[4, 8], layer.bias f32[4]\n"
        "    # root: Small\n"
        "    tanh = torch.ops.aten.tanh.default(linear)  # f32[s0, 4], 32 B, saved 32 B for tanh\n"
        "    return (tanh,)"
    )


def test_constants_are_carried_along():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(40), persistent=False)
            self.register_buffer("empty", torch.zeros(0), persistent=False)
            self.mask = torch.tensor([True, False] * 20)
            self.scale = nn.Parameter(torch.ones(40))

        def forward(self, x):
            extra = torch.tensor([1.5, float("inf")], dtype=torch.bfloat16)
            y = torch.where(self.mask, x * self.table * self.scale, x)
            return y + self.empty.sum() + (extra.float() > 2).sum()

    model, x = Table(), torch.rand(3, 40)
    program = capture(model, (x,))
    (found,) = run_dump(inspect.dump(program), "forward", copied_state(model), x)
    assert same(found, model(x))


# torch.export itself can't trace a module whose name holds a double quote or a line end.
HOSTILE = "x'''; import os # </svg><script>{}"
HOSTILE_CLASS = f'{HOSTILE}"\\"""\nimport os\u2028import os'


class Hostile(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(4, 4))

    def forward(self, state, torch):
        return next(iter(self.children()))(state) + torch


Hostile.__name__ = Hostile.__qualname__ = HOSTILE_CLASS


@pytest.fixture(scope="module")
def hostile():
    model, args = Hostile(), (torch.rand(2, 4), torch.rand(2, 4))
    return model, args, capture(model, args)


def test_hostile_names_in_python(hostile):
    model, args, program = hostile
    for view, function in (("program", "forward"), ("joint", "joint")):
        text = inspect.dump(program, view=view)
        extra = [torch.ones(2, 4)] if view == "joint" else []
        with torch.no_grad():
            found = run_dump(text, function, copied_state(model), *args, *extra)
        assert same((found[0] if view == "joint" else found)[0], model(*args))
        assert not re.search(r"^\s*import os", text, re.M)
        assert "\u2028" not in text


def test_hostile_names_in_json_and_dot(hostile):
    _, _, program = hostile
    data = json.loads(inspect.dump(program, "json"))
    assert HOSTILE + ".weight" in data["state"]
    text = inspect.dump(program, "dot")
    # Outside of quoted strings nothing but plain DOT is left.
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", text)
    assert re.fullmatch(r"[\w\s{}\[\]=,;>.\-]*", bare)


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs Graphviz")
def test_svg_is_well_formed_with_hostile_names(hostile):
    _, _, program = hostile
    for view in ("program", "joint"):
        root = ElementTree.fromstring(inspect.dump(program, "svg", view=view))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_svg_without_graphviz_says_so(hostile, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UnsupportedError, match="Graphviz"):
        inspect.dump(hostile[2], "svg")


def test_unknown_format_suggests():
    with pytest.raises(UnsupportedError, match="did you mean 'json'"):
        inspect.dump(None, "jsn")
    with pytest.raises(UnsupportedError, match="no view"):
        inspect.dump(captured("mlp"), view="jiont")


def test_json_describes_nodes():
    data = json.loads(inspect.dump(captured("mlp"), "json"))
    assert data["schema_version"] == inspect.SCHEMA_VERSION
    assert data["state"]["fc1.weight"]["shape"] == [64, 20]
    assert data["inputs"]["x"] == {
        "shape": [4, 20],
        "dtype": "float32",
        "trainable": False,
        "constant": False,
    }
    nodes = {node["name"]: node for node in data["nodes"]}
    linear = nodes["linear"]
    assert (linear["target"], linear["scope"], linear["module"]) == ("aten.linear", "fc1", "Linear")
    assert linear["flops"] == 2 * 4 * 20 * 64
    assert linear["bytes"] == 4 * 64 * 4
    assert linear["inputs"] == ["x"]
    assert linear["state"] == ["fc1.weight", "fc1.bias"]
    assert nodes["relu"]["saved_for"] == ["relu"]
    assert nodes["output 0"]["inputs"] == ["linear_2"]
    known = set(nodes)
    assert all(set(node["inputs"]) <= known for node in data["nodes"])
    assert data["saved"]["total"] > 0


def test_json_of_regions_lays_them_open():
    data = json.loads(inspect.dump(captured("no_grad_region"), "json"))
    names = {node["name"] for node in data["nodes"]}
    assert any("/" in name for name in names)
    assert all(set(node["inputs"]) <= names for node in data["nodes"])


def test_model_explorer_form():
    data = json.loads(inspect.dump(captured("mlp"), "model-explorer", view="joint"))
    nodes = data["graphs"][0]["nodes"]
    identities = {node["id"] for node in nodes}
    assert len(identities) == len(nodes)
    assert {e["sourceNodeId"] for node in nodes for e in node["incomingEdges"]} <= identities
    assert {"forward/fc1", "backward/fc1"} <= {node["namespace"] for node in nodes}
