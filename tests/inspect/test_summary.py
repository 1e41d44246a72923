from __future__ import annotations

import io
import json

import pytest
import torch
from rich.console import Console
from torch import nn

from graphopt import inspect
from graphopt.ir.capture import capture
from graphopt.measure import measure_step, step_flops
from tests.zoo import ZOO


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = Inner(), Inner()

    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(scope="module")
def outer():
    model, x = Outer(), torch.rand(16, 8)
    return model, x, inspect.summarize(capture(model, (x,)))


def test_figures_by_hand(outer):
    _, _, found = outer
    rows = {row.path: row for row in found.rows}
    assert [row.path for row in found.rows] == [
        "",
        *("first", "first.up", "first.down"),
        *("second", "second.up", "second.down"),
    ]
    up, hidden = rows["first.up"], 16 * 32 * 4
    assert (up.module, up.depth, up.nodes, up.parameters) == ("Linear", 2, 1, 8 * 32 + 32)
    assert (up.flops, up.activation_bytes, up.saved_bytes) == (2 * 16 * 8 * 32, hidden, 0)
    # relu's result is saved by relu and by the next layer: once.
    assert rows["first"].saved_bytes == hidden + 16 * 8 * 4  # and the input of the second module
    assert rows["second"].saved_bytes == hidden
    assert rows["first"].nodes == 3
    assert rows[""].nodes == 6
    assert rows[""].flops == 4 * (2 * 16 * 8 * 32)
    assert found.saved == rows[""].saved_bytes == 2 * hidden + 16 * 8 * 4
    assert rows[""].peak_share == pytest.approx(1)
    top = [row for row in found.rows if row.depth == 1]
    assert sum(row.peak_bytes for row in top) == found.peak == rows[""].peak_bytes


@pytest.mark.parametrize("name", ["mlp", "resnet", "sdpa_dropout"])
def test_figures_agree_with_a_measured_step(name):
    model, args, kwargs = ZOO[name]()
    found = inspect.summarize(capture(model, args, kwargs))
    step = measure_step(model, args, kwargs)
    assert found.saved == pytest.approx(step.saved, abs=64)
    assert found.peak == pytest.approx(step.peak, rel=0.2)
    assert found.rows[0].flops == step_flops(model, args, kwargs, forward_only=True)
    assert found.rows[0].parameters == sum(p.numel() for p in model.parameters())


def test_eval_mode_has_a_forward_peak():
    model, args, kwargs = ZOO["resnet"]()
    found = inspect.summarize(capture(model, args, kwargs), training=False)
    step = measure_step(model.eval(), args, kwargs, forward_only=True)
    assert found.peak_of == "forward and backward" or found.peak == pytest.approx(
        step.peak, rel=0.05
    )


def test_shared_parameters_count_once():
    model, args, kwargs = ZOO["tied_weights"]()
    found = inspect.summarize(capture(model, args, kwargs))
    assert found.rows[0].parameters == sum(p.numel() for p in model.parameters())


def test_a_model_without_a_joint_graph_still_has_a_table():
    model, args, kwargs = ZOO["moe_sparse"]()
    found = inspect.summarize(capture(model, args, kwargs))
    assert found.peak_of == "forward"
    assert found.rows[0].nodes > 0


def test_json_and_table(outer):
    _, _, found = outer
    data = json.loads(json.dumps(found.to_dict()))
    assert data["schema_version"] == inspect.SCHEMA_VERSION
    assert data["rows"][1]["path"] == "first"
    assert set(data["peak_at"]) == {"node", "module"}
    stream = io.StringIO()
    Console(file=stream, width=120).print(found.table(1))
    text = stream.getvalue()
    assert "first Inner" in text
    assert "up Linear" not in text
    assert "100.0 %" in text


def test_markup_in_names_is_shown_as_it_is():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("[red]x\x1b[31m", nn.Linear(4, 4))

        def forward(self, x):
            return next(iter(self.children()))(x)

    stream = io.StringIO()
    found = inspect.table(capture(Odd(), (torch.rand(2, 4),)))
    Console(file=stream, width=120).print(found)
    assert "[red]x" in stream.getvalue()
    assert "\x1b" not in stream.getvalue()
