from __future__ import annotations

import json
import os

import pytest
import torch

from graphopt.cost import COST_MODELS, CostModel, analytic, cost_model, models, profiled, roofline
from graphopt.cost.roofline import Roofline, calibrated
from tests.cost.joint_graphs import cnn, joint_graph

CPU = torch.device("cpu")
MACHINE = Roofline(matmul=1e9, conv=5e8, low_precision=2.0, bandwidth=1e8, overhead=1e-6)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "_MEMORY", {})
    return tmp_path / "cache"


@pytest.fixture
def calibrations(monkeypatch):
    calls = []
    monkeypatch.setattr(roofline, "_calibrate", lambda device: calls.append(device) or MACHINE)
    return calls


def test_roofline_by_hand():
    class Product(torch.nn.Module):
        def forward(self, a, b):
            return (a @ b).relu().t()

    args = (torch.rand(64, 64), torch.rand(64, 64))
    graph = torch.export.export(Product(), args).module(check_guards=False).graph
    product, relu, view = (n for n in graph.nodes if n.op == "call_function")
    model = models.AnalyticCost(MACHINE)
    # 2 * 64^3 FLOPs and three matrices moved; relu moves two.
    assert model.seconds(product) == pytest.approx(1e-6 + 2 * 64**3 / 1e9 + 3 * 64 * 64 * 4 / 1e8)
    assert model.seconds(relu) == pytest.approx(1e-6 + 2 * 64 * 64 * 4 / 1e8)
    assert model.seconds(view) == 0
    counted = cost_model("flops")
    assert counted.seconds(product) == pytest.approx((2 * 64**3 + 3 * 64 * 64) * 1e-12)
    assert counted.seconds(view) == 0


@pytest.mark.parametrize("name", COST_MODELS)
def test_models_by_name(name, calibrations):
    assert cost_model(name).name == name


def test_a_real_calibration_is_plausible():
    found = roofline._calibrate(CPU)
    assert found.matmul > 1e8
    assert found.conv > 1e8
    assert found.bandwidth > 1e8
    assert 1e-8 < found.overhead < 1e-2


def test_calibrated_once_and_cached(own_cache, calibrations, monkeypatch):
    assert calibrated(CPU) == calibrated(CPU) == MACHINE
    assert len(calibrations) == 1
    (file,) = own_cache.iterdir()
    assert json.loads(file.read_text())["bandwidth"] == 1e8
    monkeypatch.setattr(roofline, "_MEMORY", {})  # another process
    assert calibrated(CPU) == MACHINE
    assert len(calibrations) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"matmul": 1}', '{"matmul": "x"}', "null"])
def test_a_corrupt_cache_is_measured_again(text, own_cache, calibrations, monkeypatch):
    calibrated(CPU)
    (file,) = own_cache.iterdir()
    file.write_text(text)
    monkeypatch.setattr(roofline, "_MEMORY", {})
    assert calibrated(CPU) == MACHINE
    assert len(calibrations) == 2


def test_an_unwritable_cache_folder_does_no_harm(tmp_path, calibrations, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("GRAPHOPT_CACHE", str(blocked / "inside"))
    assert calibrated(CPU) == MACHINE
    assert blocked.read_text() == "not a folder"


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.delenv("GRAPHOPT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", os.sep + "elsewhere")
    assert str(roofline.cache_folder()) == os.path.join(os.sep, "elsewhere", "graphopt")


def test_both_models_answer_for_every_node_of_a_joint_graph(calibrations):
    graph = joint_graph(*cnn()).graph
    for model in (analytic(), profiled()):
        assert isinstance(model, CostModel)
        seen = []
        model.prepare(graph.nodes, progress=lambda done, total, seen=seen: seen.append(done))
        seconds = {node: model.seconds(node) for node in graph.nodes}
        assert all(s >= 0 for s in seconds.values())
        dear = max(seconds, key=seconds.__getitem__)
        assert "conv" in str(dear.target) or model.name == "profiled"
        assert seconds[next(iter(graph.find_nodes(op="placeholder")))] == 0
        assert model.name == ("profiled" if seen else "analytic")


def test_profiled_seconds_grow_with_the_work(calibrations):
    class Product(torch.nn.Module):
        def forward(self, a, b):
            return a @ a, b @ b

    args = (torch.rand(8, 8), torch.rand(384, 384))
    graph = torch.export.export(Product(), args).module(check_guards=False).graph
    small, large = (n for n in graph.nodes if n.op == "call_function")
    model = profiled()
    assert model.seconds(large) > 5 * model.seconds(small) > 0
