"""The commands that show graphs: `dump`, `diff`, `optimize --dump-dir` and `--bisect`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import fx

from graphopt import registry
from graphopt.cli import main
from graphopt.inspect import FORMATS
from graphopt.ir.graphs import bind_graph
from graphopt.pipeline import Pass, PassContext, PassResult, Position

MODELS = """
import torch
from torch import nn


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu_(layer(x))
        return x


def build():
    torch.manual_seed(0)
    return Tower(), (torch.randn(3, 6),)


def other():
    model, args = build()
    return nn.Sequential(model, nn.Tanh()), args


def right(module):
    model, (x,) = build()
    return torch.allclose(module(x), model(x))


def asserting(module):
    assert right(module), "not what the model gives"


def wrong(module):
    raise RuntimeError("always")
"""


@dataclass(frozen=True)
class Breaks(Pass):
    """A third party's pass: every ReLU becomes ELU(alpha=0), but the third ELU(alpha=1)."""

    name: ClassVar[str] = "elu"
    position: ClassVar[int] = Position.FORWARD

    def run(self, program: Any, context: PassContext) -> PassResult:
        graph = fx.Graph()
        graph.output(graph.graph_copy(program.module.graph, {}))
        sites = graph.find_nodes(op="call_function", target=torch.ops.aten.relu.default)
        for index, node in enumerate(sites):
            node.target = torch.ops.aten.elu.default
            node.args = (node.args[0], float(index == 2))
        module = bind_graph(fx.GraphModule(program.module, graph), program.module)
        return PassResult(
            program.replace(module=module),
            True,
            {"elu": {"sites": [{"node": node.name, "choice": "elu"} for node in sites]}},
        )


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A folder with ``models.py``, the working folder; the broken pass is installed."""
    (tmp_path / "models.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    entry = EntryPoint("elu", f"{__name__}:Breaks", registry.GROUP)
    monkeypatch.setattr(EntryPoint, "load", lambda self: Breaks)
    monkeypatch.setattr(registry, "entry_points", lambda group: [entry])
    registry.refresh()
    yield tmp_path
    monkeypatch.undo()
    registry.refresh()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the command line in this process: exit code, stdout, stderr."""

    def runs(*arguments: str) -> tuple[int, str, str]:
        code = main(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return runs


def test_diff_of_a_model_with_itself_is_empty_and_says_so(run: Any) -> None:
    code, out, err = run("diff", "models.py:build", "models.py:build", "--exit-code")
    assert (code, out) == (0, "")
    assert "no difference" in err
    code, out, _ = run("diff", "models.py:build", "models.py:build", "--json", "-q")
    assert code == 0
    assert json.loads(out)["equal"] is True


def test_diff_names_what_a_pipeline_changes(run: Any) -> None:
    arguments = ("diff", "models.py:build", "--passes", "canonicalize", "-q")
    code, out, _ = run(*arguments, "--exit-code")
    assert code == 6
    signs = [line[0] for line in out.splitlines() if line[0] in "+-~"]
    assert (signs.count("-"), signs.count("+"), signs.count("~")) == (4, 4, 0)
    assert "\x1b" not in out
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    data = json.loads(out)
    assert [c["fields"]["op"] for c in data["changes"]] == [
        ["aten.relu_.default", "aten.relu.default"]
    ] * 4
    assert data["unchanged"] == 6


def test_diff_in_colours_and_into_a_file(run: Any, models: Path) -> None:
    arguments = ("diff", "models.py:build", "models.py:other", "-q")
    _, plain, _ = run(*arguments, "--color", "never")
    _, coloured, _ = run(*arguments, "--color", "always")
    assert "\x1b[32m+    tanh" in coloured
    assert "+    tanh = aten.tanh.default(relu__3)" in plain
    code, out, _ = run(*arguments, "-o", "changes.diff")
    assert (code, out) == (0, "")
    assert (models / "changes.diff").read_text() == plain


def test_dumps_of_a_run_are_numbered_and_compare(run: Any, models: Path) -> None:
    code, _, err = run(
        *("optimize", "models.py:build", "-p", "canonicalize,elu", "--no-verify", "-q"),
        *("--dump-dir", "d", "--dump-format", "py", "--dump-format", "json"),
        *("--dump-format", "dot", "--dump-format", "model-explorer"),
    )
    assert code == 0, err
    names = sorted(path.name for path in (models / "d").iterdir())
    assert names == [
        f"{stem}.{ending}"
        for stem in ("000_capture", "001_canonicalize", "002_elu")
        for ending in ("dot", "json", "model-explorer.json", "py")
    ]
    text = (models / "d" / "002_elu.py").read_text()
    lines = [line for line in text.splitlines() if "aten.elu" in line]
    assert len(lines) == 4
    # What each pass did is noted where it did it.
    assert all("canonicalize: was aten.relu_.default" in line for line in lines)
    assert all("elu: was aten.relu.default" in line for line in lines)
    assert all("elu: elu" in line for line in lines)
    compile(text, "dump.py", "exec")
    code, out, _ = run("diff", "d/001_canonicalize.json", "d/002_elu.json", "--json", "-q")
    assert code == 0
    changes = json.loads(out)["changes"]
    assert [c["after"]["target"] for c in changes] == ["aten.elu"] * 4
    code, out, _ = run("diff", "d/002_elu.json", "d/002_elu.json", "--exit-code", "-q")
    assert (code, out) == (0, "")
    # A model beside a dump of it.
    code, out, _ = run("diff", "models.py:build", "d/000_capture.json", "--exit-code", "-q")
    assert (code, out) == (0, "")


@pytest.mark.parametrize("form", [f for f in FORMATS if f != "svg"])
def test_dump_prints_every_format(run: Any, form: str) -> None:
    code, out, err = run("dump", "models.py:build", "-f", form, "-q")
    assert code == 0, err
    if form == "py":
        compile(out, "dump.py", "exec")
    elif form == "dot":
        assert out.startswith("digraph")
    elif form == "html":
        assert out.lstrip().lower().startswith("<!doctype html>")
    else:
        json.loads(out)


def test_dump_after_a_pipeline_has_notes(run: Any) -> None:
    code, out, _ = run("dump", "models.py:build", "-p", "canonicalize", "-q")
    assert code == 0
    assert out.count("canonicalize: was aten.relu_.default") == 4
    code, out, _ = run(
        *("dump", "models.py:build", "-p", "canonicalize", "-q"),
        *("-f", "model-explorer-data", "--overlay", "notes"),
    )
    (data,) = json.loads(out).values()
    assert {v["value"] for v in data["results"].values()} == {
        "canonicalize: was aten.relu_.default"
    }


@pytest.mark.parametrize("check", ["right", "asserting"])
def test_bisect_finds_the_pass_and_the_rewrite(run: Any, check: str) -> None:
    arguments = ("optimize", "models.py:build", "-p", "canonicalize,elu,canonicalize", "-q")
    code, out, err = run(*arguments, "--bisect", f"models.py:{check}")
    assert code == 5, err
    assert "pass 2, elu, breaks the check" in out
    assert "rewrite 3 of 4: relu_2" in out
    assert "models.py" in out
    assert ("not what the model gives" in out) == (check == "asserting")
    code, out, _ = run(*arguments, "--bisect", f"models.py:{check}", "--json")
    data = json.loads(out)
    assert (code, data["pass"], data["index"], data["number"], data["of"]) == (5, "elu", 1, 3, 4)
    (change,) = data["rewrite"]["changes"]
    assert change["before"]["name"] == "relu_2"


def test_bisect_of_a_pipeline_that_is_right(run: Any) -> None:
    code, out, err = run(
        *("optimize", "models.py:build", "-p", "canonicalize", "--bisect", "models.py:right")
    )
    assert (code, out) == (0, "")
    assert "no pass breaks the check" in err


BAD = {
    "a check that never holds": (2, "captured model already", ["--bisect", "models.py:wrong"]),
    "no such check": (1, "has no", ["--bisect", "models.py:rigth"]),
    "a module to save": (2, "saves nothing", ["--bisect", "models.py:right", "-o", "out"]),
    "a format and no folder": (2, "--dump-dir", ["--dump-format", "py"]),
    "no such format": (2, "yp", ["--dump-dir", "d", "--dump-format", "yp"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_of_optimize(run: Any, case: str) -> None:
    expected, words, arguments = BAD[case]
    code, _, err = run("optimize", "models.py:build", "-p", "canonicalize", *arguments)
    assert code == expected
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        ("no dump", ["nothing.json"]),
        ("no JSON", ["broken.json"]),
        ("not a JSON dump", ["other.json"]),
        ("no dump of a graph", ["list.json"]),
        ("of version 99", ["later.json"]),
    ],
)
def test_bad_dumps(run: Any, models: Path, words: str, arguments: list[str]) -> None:
    (models / "broken.json").write_text("{")
    (models / "other.json").write_text('{"nodes": 3}')
    (models / "list.json").write_text("[]")
    (models / "later.json").write_text('{"format": "graphopt.inspection", "schema_version": 99}')
    code, _, err = run("diff", "models.py:build", *arguments)
    assert code == 1
    assert words in err
    assert "Traceback" not in err
