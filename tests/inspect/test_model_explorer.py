"""The exports for Model Explorer: its documented format always, itself where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from graphopt import inspect, registry
from graphopt.errors import UnsupportedError
from graphopt.ir.capture import capture
from graphopt.pipeline import PassContext
from tests.zoo import ZOO

MISSING = [n for n in ("model_explorer", "dacite", "flask") if importlib.util.find_spec(n) is None]
installed = pytest.mark.skipif(
    bool(MISSING), reason=f"needs ai-edge-model-explorer; missing: {', '.join(MISSING)}"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")

# Of graph_builder.py and node_data_builder.py, version 0.1.34: field -> type, "?" if optional.
TEXT, NUMBER, BOOL = "text", "number", "bool"
PAIR = {"key": TEXT, "value": TEXT}
META = {"id": TEXT, "attrs?": [PAIR]}
EDGE = {"sourceNodeId": TEXT, "sourceNodeOutputId?": TEXT, "targetNodeInputId?": TEXT}
NODE = {
    "id": TEXT,
    "label": TEXT,
    "namespace": TEXT,
    "subgraphIds?": [TEXT],
    "attrs?": [PAIR],
    "incomingEdges?": [EDGE],
    "outputsMetadata?": [META],
    "inputsMetadata?": [META],
}
GRAPH = {"id": TEXT, "nodes": [NODE], "groupNodeAttributes?": {"*": {"*": TEXT}}}
COLLECTION = {"label": TEXT, "graphs": [GRAPH]}
STOP = {"stop": NUMBER, "bgColor?": TEXT, "textColor?": TEXT}
VALUE = {"value": (NUMBER, TEXT), "bgColor?": TEXT, "textColor?": TEXT}
DATA = {
    "results": {"*": VALUE},
    "name?": TEXT,
    "gradient?": [STOP],
    "showExpandedSummaryOnGroupNode?": BOOL,
}
TYPES = {TEXT: str, NUMBER: (int, float), BOOL: bool}


def conforms(value: Any, schema: Any, where: str = "") -> None:
    if isinstance(schema, tuple):
        assert isinstance(value, (str, int, float)), where
    elif isinstance(schema, str):
        assert isinstance(value, TYPES[schema]), f"{where}: {value!r} is no {schema}"
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            conforms(item, schema[0], f"{where}[{index}]")
    elif "*" in schema:
        for key, item in value.items():
            conforms(item, schema["*"], f"{where}.{key}")
    else:
        known = {name.removesuffix("?"): kind for name, kind in schema.items()}
        needed = {name for name in schema if not name.endswith("?")}
        assert needed <= value.keys() <= known.keys(), f"{where}: {sorted(value)}"
        for key, item in value.items():
            conforms(item, known[key], f"{where}.{key}")


class Slashed(nn.Module):
    """Scopes and a class that hold what separates levels, quotes and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a/b;c <i>'", nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return next(iter(self.children()))(x)


class Nothing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@functools.cache
def program(name: str) -> Any:
    if name == "slashed":
        return capture(Slashed(), (torch.rand(2, 4),))
    if name == "nothing":
        return capture(Nothing(), (torch.rand(2, 4),))
    model, args, kwargs = ZOO[name.removesuffix("+share")]()
    found = capture(model, args, kwargs)
    if name.endswith("+share"):
        context = PassContext(args, kwargs, model, time_limit=2)
        found = registry.parse("canonicalize,share").run(found, context)
    return found


CASES = [
    ("mlp", "program"),
    ("resnet", "joint"),
    ("cond", "program"),
    ("mlp+share", "plan"),
    ("slashed", "joint"),
    ("nothing", "program"),
]


def graph(name: str, view: str) -> Any:
    return json.loads(inspect.dump(program(name), "model-explorer", view=view))


def data(name: str, view: str, overlay: str) -> Any:
    text = inspect.dump(program(name), "model-explorer-data", view=view, overlay=overlay)
    return json.loads(text)


@pytest.mark.parametrize(("name", "view"), CASES)
def test_graphs_are_of_the_documented_form(name: str, view: str) -> None:
    found = graph(name, view)
    conforms(found, COLLECTION)
    (shown,) = found["graphs"]
    identities = [node["id"] for node in shown["nodes"]]
    assert len(set(identities)) == len(identities)
    for node in shown["nodes"]:
        assert {edge["sourceNodeId"] for edge in node["incomingEdges"]} <= set(identities)
        parts = re.split(r"(?<!\\)/", node["namespace"])
        assert all(parts)
        assert ";" not in node["namespace"]  # it would start a second namespace
    views = inspect.node_views(inspect.document(program(name), view))
    assert identities == [node.name for node in views]
    labels = {node["id"]: node["label"] for node in shown["nodes"]}
    assert all(labels[node.name] == node.target for node in views if node.op == "call")
    read = {node.name: list(node.inputs) for node in views}
    for node in shown["nodes"]:
        assert [edge["sourceNodeId"] for edge in node["incomingEdges"]] == read[node["id"]]


@pytest.mark.parametrize(("name", "view"), CASES)
@pytest.mark.parametrize("overlay", ["bytes", "saved", "phase", "notes"])
def test_overlays_are_of_the_documented_form_and_fit_the_graph(
    name: str, view: str, overlay: str
) -> None:
    found = data(name, view, overlay)
    (shown,) = graph(name, view)["graphs"]
    assert list(found) == [shown["id"]]
    (values,) = found.values()
    conforms(values, DATA)
    assert values["results"].keys() <= {node["id"] for node in shown["nodes"]}
    stops = [stop["stop"] for stop in values.get("gradient", [])]
    assert stops in ([], [0, 1])


def test_overlays_hold_the_figures() -> None:
    (values,) = data("resnet", "joint", "bytes").values()
    expected = {
        view.name: view.bytes
        for view in inspect.node_views(inspect.document(program("resnet"), "joint"))
        if view.op == "call" and view.bytes is not None
    }
    assert {name: entry["value"] for name, entry in values["results"].items()} == expected
    (phases,) = data("resnet", "joint", "phase").values()
    colours = {(entry["value"], entry["bgColor"]) for entry in phases["results"].values()}
    assert {value for value, _ in colours} == {"forward", "backward"}
    assert len(colours) == 2
    (notes,) = data("mlp+share", "plan", "notes").values()
    sites = program("mlp+share").history[-1].report.get("share", {}).get("sites", [])
    assert notes["results"].keys() <= {site["node"] for site in sites}


def test_an_unknown_overlay_suggests() -> None:
    with pytest.raises(UnsupportedError, match="did you mean 'bytes'"):
        data("mlp", "program", "byts")


@installed
@pytest.mark.parametrize(("name", "view"), CASES)
def test_its_own_classes_read_what_is_exported(name: str, view: str) -> None:
    import dacite
    from model_explorer import graph_builder, node_data_builder

    strict = dacite.Config(strict=True)
    names = {key: kind for key, kind in vars(graph_builder).items() if not key.startswith("__")}
    config = dacite.Config(strict=True, forward_references=names)
    read = dacite.from_dict(graph_builder.GraphCollection, graph(name, view), config)
    assert len(read.graphs[0].nodes) == len(graph(name, view)["graphs"][0]["nodes"])
    for overlay in ("bytes", "saved"):
        (values,) = data(name, view, overlay).values()
        dacite.from_dict(node_data_builder.GraphNodeData, values, strict)


def _home() -> Path:
    found = importlib.util.find_spec("model_explorer")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Any]:
    """Starts Model Explorer on a graph and overlays; gives the address to open."""
    running = []

    def serve(name: str, view: str, overlays: list[str]) -> str:
        (tmp_path / "graph.json").write_text(json.dumps(graph(name, view)))
        paths = [tmp_path / f"{overlay}.json" for overlay in overlays]
        for path, overlay in zip(paths, overlays, strict=True):
            path.write_text(json.dumps(data(name, view, overlay)))
        port = free_port()
        command = [sys.executable, "-c", "from model_explorer.cmdline import main; main()"]
        command += [str(tmp_path / "graph.json"), "--port", str(port), "--no_open_in_browser"]
        command += ["--skip_health_check", "--node_data_paths", ",".join(map(str, paths))]
        log = tmp_path / "log.txt"
        with log.open("w") as out:
            started = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                cwd=tmp_path,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        running.append(started)
        return _address(log, port)

    yield serve
    for process in running:
        process.terminate()
        process.wait(20)


def _address(log: Path, port: int) -> str:
    for _ in range(120):
        found = re.search(r"http://\S+", log.read_text())
        if found is not None:
            try:
                urllib.request.urlopen(f"http://localhost:{port}/", timeout=5)
            except OSError:
                pass
            else:
                return found[0]
        time.sleep(0.5)
    raise AssertionError(log.read_text())


@installed
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
@pytest.mark.parametrize(("name", "view"), CASES)
def test_it_opens_without_a_warning(name: str, view: str, served: Any) -> None:
    sync_api = pytest.importorskip("playwright.sync_api")
    overlays = ["bytes", "phase"]
    address = served(name, view, overlays)
    told: list[str] = []

    fonts = sorted(_home().glob("web_app/static_files/*.woff2"))

    def local(route: Any) -> None:  # its fonts come from the web: it gets one that it has itself
        inside = "://localhost" in route.request.url
        route.continue_() if inside else route.fulfill(path=fonts[0])

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"],
        )
        page = browser.new_page(viewport={"width": 1440, "height": 900})
        page.route("**/*", local)
        page.on("console", lambda m: told.append(f"{m.type}: {m.text}"))
        page.on("pageerror", lambda error: told.append(f"error: {error}"))
        page.goto(address)
        nodes = graph(name, view)["graphs"][0]["nodes"]
        page.get_by_text(f"{len(nodes)} nodes").first.wait_for(timeout=60_000)
        page.get_by_text("unfold_more_double").first.click()  # every scope opens
        page.wait_for_timeout(5_000)
        shown = page.inner_text("body")
        folder = os.environ.get("MODEL_EXPLORER_PICTURES")
        if folder:
            page.screenshot(path=f"{folder}/{name}-{view}.png")
        browser.close()
    assert [line for line in told if line.startswith(("error", "warning"))] == []
    assert "Failed" not in shown
    assert "Unsupported" not in shown
    if name != "nothing":
        assert all(overlay in shown for overlay in overlays)
