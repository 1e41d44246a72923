"""What tests and benchmarks of the inspector need: Chromium, pages, and documents made by hand."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import graphopt
from graphopt import inspect
from graphopt.inspect import SCHEMA_VERSION
from graphopt.inspect.page import inspection_html
from graphopt.inspect.schema import FORMAT

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


def chromium() -> str | None:
    """Path of a Chromium, or None."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        made = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        try:
            yield made
        finally:
            made.close()


@dataclass
class Opened:
    """A page, and what went wrong on it or left it."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def graph(self) -> Any:
        """Goes to the graph and waits for it."""
        self.page.keyboard.press("g")
        self.page.wait_for_selector("#after .box", timeout=20_000)
        self.page.wait_for_selector("html[data-ready=graph]", state="attached")
        return self.page

    def clean(self) -> None:
        """Nothing was asked of any network, nothing complained."""
        assert self.complaints == []
        assert [url for url in self.requests if not url.startswith(("file:", "blob:"))] == []


def open_page(
    chrome: Any, file: Path, *, address: str = "", script: str | None = None, **options: Any
) -> Opened:
    """Opens a file in a window of its own.

    Args:
        chrome: The browser.
        file: The page.
        address: What follows ``#``.
        script: JavaScript that runs before any of the page's.
        options: Of the window, such as ``color_scheme``.
    """
    context = chrome.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(10_000)
    opened = Opened(context.new_page())
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("console", lambda message: opened.complaints.append(message.text))
    if script:
        opened.page.add_init_script(script)
    opened.page.goto(file.as_uri() + (f"#{address}" if address else ""))
    return opened


def written(folder: Path, data: Mapping[str, Any], name: str = "page.html") -> Path:
    """Writes the inspector of a document."""
    file = folder / name
    file.write_text(inspection_html(data), encoding="utf-8")
    return file


def node(name: str, *inputs: str, **fields: Any) -> dict[str, Any]:
    """A node of a document."""
    made = {"op": "call", "target": "aten.relu", "phase": "forward", "type": "f32[4]", "bytes": 16}
    return {"name": name, "inputs": list(inputs), "state": [], **made, **fields}


def document(
    nodes: list[dict[str, Any]],
    *,
    overlays: list[dict[str, Any]] | None = None,
    snapshots: list[dict[str, Any]] | None = None,
    timelines: list[dict[str, Any]] | None = None,
    **fields: Any,
) -> dict[str, Any]:
    """A document of these nodes; each step makes 16 bytes that live for two steps."""
    count = len(nodes)
    line = {
        "title": "capture",
        "categories": ["saved", "forward", "recomputed", "backward", "workspace"],
        "steps": list(range(count)),
        "boundary": next((i for i, n in enumerate(nodes) if n["phase"] == "backward"), None),
        "spans": [[i, i, min(i + 1, count - 1), 16, 1] for i in range(count)],
        "workspace": [0] * count,
        "peak": 32,
        "peak_step": 1 if count > 1 else None,
        "budget": None,
    }
    first = {"label": "capture", "recorded": True, "timeline": 0, "removed": [], "changed": {}}
    phase = {"name": "phase", "title": "phase", "kind": "categorical", "field": "phase"}
    size = {"name": "bytes", "title": "bytes", "kind": "sequential", "unit": "bytes"}
    return {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "title": "Made",
        "view": "joint",
        "training": True,
        "passes": [],
        "inputs": {},
        "tangents": {},
        "state": {},
        "sources": [],
        "modules": {},
        "nodes": nodes,
        "snapshots": snapshots or [{**first, "added": list(range(count))}],
        "overlays": [phase, {**size, "field": "bytes"}, *(overlays or [])],
        "timelines": timelines or [line],
        "summary": {"budget": {}, "figures": [], "bounds": [], "warnings": [], "passes": []},
        **fields,
    }


def layers(count: int, depth: int = 10) -> dict[str, Any]:
    """A document of ``count`` nodes: layers of blocks of ``depth`` forward and backward nodes."""
    blocks = count // (2 * depth)
    forward, backward = [], []
    for block in range(blocks):
        scope = f"model.stage{block // 20}.block{block}"
        for i in range(depth):
            number = block * depth + i
            before = [f"f{number - 1}"] if number else []
            forward.append(node(f"f{number}", *before, scope=f"{scope}.part{i // 5}"))
    total = len(forward)
    for number in reversed(range(total)):
        reads = [f"f{number}"] + ([f"b{number + 1}"] if number + 1 < total else [])
        scope = forward[number]["scope"]
        backward.append(node(f"b{number}", *reads, scope=scope, phase="backward"))
    return document([*forward, *backward])


class Block(nn.Module):
    """Two layers beside an identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


class Net(nn.Module):
    """Four blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(16) for _ in range(4))
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@functools.cache
def planned_net() -> tuple[Any, dict[str, Any]]:
    """A network after `memory=70%`, and its inspection with every pass recorded."""
    torch.manual_seed(0)
    recorder, x = inspect.Recorder(), torch.rand(64, 16)
    module = graphopt.optimize(
        Net(), "memory=70%", (x,), time_limit=3, instruments=[recorder], verify=False
    )
    return module, inspect.inspection(recorder.programs[0], module, recorded=recorder)
