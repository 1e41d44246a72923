"""The command line: exit codes, what goes where, no tracebacks, no partial files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from graphopt.cli import main
from graphopt.cli.app import COMMANDS

ROOT = Path(__file__).parents[2]

MODELS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=1.0):
        return torch.relu_(self.linear(x)) * scale


class Branches(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def build():
    torch.manual_seed(0)
    return Net(), (torch.randn(4, 8),)


def alone():
    return nn.Identity()


def with_kwargs():
    return Net(), (torch.randn(4, 8),), {"scale": 2.0}


def wide():
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(64, 64), nn.ReLU()) for _ in range(4)]
    return nn.Sequential(*layers), (torch.randn(256, 64),)


def data_dependent():
    return Branches(), (torch.randn(4, 8),)


def number():
    return 3


def wrong_shape():
    return Net(), (torch.randn(4, 7),)


def frozen():
    return Net().requires_grad_(False), (torch.randn(4, 8),)


def not_a_number():
    return Net(), (torch.full((4, 8), float("nan")),)


def fails():
    raise ValueError("no weights here")


constant = 4
"""

CHAIN = {
    "nodes": [{"id": i, "duration": 10, "bytes": 100} for i in range(8)],
    "edges": [[i, i + 1] for i in range(7)] + [[i, 7 - i] for i in range(3)],
    "order": list(range(8)),
}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``models.py``, which is also the working folder."""
    (tmp_path / "models.py").write_text(MODELS)
    (tmp_path / "chain.json").write_text(json.dumps(CHAIN))
    (tmp_path / "syntax.py").write_text("def build(:\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


class Run:
    """Runs the command line in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        code = main([*arguments])
        out, err = self.capsys.readouterr()
        return code, out, err


@pytest.fixture
def run(models: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


BAD: dict[str, tuple[int, str, list[str]]] = {
    "misspelt field": (
        2,
        "did you mean 'memory'",
        ["optimize", "models.py:build", "-b", "memroy=50%"],
    ),
    "zero": (2, "zero", ["optimize", "models.py:build", "-b", "memory=0"]),
    "above all": (2, "at most 100%", ["optimize", "models.py:build", "-b", "memory=150%"]),
    "no amount": (2, "NAME=AMOUNT", ["optimize", "models.py:build", "-b", "memory"]),
    "nothing to do": (2, "nothing to do", ["optimize", "models.py:build"]),
    "unknown pass": (2, "canonicalize", ["optimize", "models.py:build", "-p", "canonicalise"]),
    "unknown option": (
        2,
        "No such option",
        ["optimize", "models.py:build", "--budgte", "memory=50%"],
    ),
    "unknown command": (2, "did you mean 'optimize'", ["optimise"]),
    "no model": (2, "MODEL", ["optimize"]),
    "no factory": (1, "names no factory", ["optimize", "models.py", "-b", "memory=50%"]),
    "no such factory": (
        1,
        "did you mean 'build'",
        ["optimize", "models.py:buidl", "-b", "memory=50%"],
    ),
    "no such file": (1, "no file", ["optimize", "gone.py:build", "-b", "memory=50%"]),
    "no such module": (1, "no module", ["optimize", "gone.pkg:build", "-b", "memory=50%"]),
    "no model at all": (1, "not a model", ["optimize", "models.py:number", "-b", "memory=50%"]),
    "not callable": (1, "no factory", ["optimize", "models.py:constant", "-b", "memory=50%"]),
    "factory fails": (1, "no weights here", ["optimize", "models.py:fails", "-b", "memory=50%"]),
    "syntax error": (1, "syntax.py:1", ["optimize", "syntax.py:build", "-b", "memory=50%"]),
    "capture": (3, "models.py:17", ["optimize", "models.py:data_dependent", "-p", "canonicalize"]),
    "capture in dump": (3, "torch.cond", ["dump", "models.py:data_dependent"]),
    "wrong shape": (1, "", ["optimize", "models.py:wrong_shape", "-p", "canonicalize"]),
    "no inputs": (1, "", ["optimize", "models.py:alone", "-p", "canonicalize"]),
    "NaN": (1, "NaN", ["optimize", "models.py:not_a_number", "-p", "canonicalize"]),
    "nothing to train": (1, "", ["optimize", "models.py:frozen", "-b", "memory=50%"]),
    "infeasible": (
        4,
        "smallest budget",
        ["optimize", "models.py:wide", "-b", "memory=1KiB", "--time-limit", "2"],
    ),
    "no such folder": (
        1,
        "doesn't exist",
        ["optimize", "models.py:build", "-b", "memory=50%", "-o", "no/such/file"],
    ),
    "folder is a file": (
        1,
        "can't write",
        ["optimize", "models.py:build", "-b", "memory=50%", "--dump-dir", "models.py"],
    ),
    "diff with nothing": (2, "compare", ["diff", "models.py:build"]),
    "explain": (2, "did you mean", ["explain", "models.py:build", "-c", "cp-lpr"]),
    "solve nothing": (1, "no file", ["solve", "gone.json", "--budget", "80%"]),
    "solve a script": (1, "no task graph", ["solve", "models.py", "--budget", "80%"]),
    "solve above all": (2, "at most 100%", ["solve", "chain.json", "--budget", "150%"]),
    "solve zero": (2, "zero", ["solve", "chain.json", "--budget", "0"]),
    "solve no budget": (2, "--budget", ["solve", "chain.json"]),
    "solve infeasible": (
        4,
        "smallest budget",
        ["solve", "chain.json", "--budget", "150", "--time-limit", "2"],
    ),
    "unknown described pass": (2, "unknown pass", ["passes", "nosuch"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_with_its_code_and_no_traceback(case: str, run: Run, models: Path) -> None:
    code, says, arguments = BAD[case]
    before = sorted(p.name for p in models.iterdir())
    got, out, err = run(*arguments)
    assert got == code, err
    assert says in err
    assert "Traceback" not in err
    assert "internal error" not in err
    assert out == ""
    after = sorted(p.name for p in models.iterdir() if p.name != "__pycache__")
    assert after == before, "something was left behind"


def test_a_misspelt_budget_is_refused_before_the_model_is_built(run: Run) -> None:
    code, _, err = run("optimize", "models.py:fails", "--budget", "memory=0")
    assert code == 2
    assert "no weights here" not in err


def test_debug_shows_the_traceback(run: Run) -> None:
    code, _, err = run("--debug", "optimize", "models.py:build", "-b", "memory=0")
    assert code == 2
    assert "Traceback" in err


def test_optimize_reports_json_on_stdout_and_saves(run: Run, models: Path) -> None:
    code, out, err = run(
        *("optimize", "models.py:build", "-p", "canonicalize", "--json", "-o", "small.graphopt")
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["schema_version"] == 1
    assert data["passes"][0]["pass"] == "canonicalize"
    assert "wrote small.graphopt" in err
    assert not list(models.glob(".*tmp"))
    code, out, err = run("diff", "models.py:build", "small.graphopt", "-q")
    assert code == 0, err
    assert "-    relu_ = " in out
    assert "+    relu = " in out


def test_optimize_keeps_a_memory_budget(run: Run) -> None:
    code, out, err = run(
        *("optimize", "models.py:wide", "-b", "memory=70%", "--time-limit", "5", "--json")
    )
    assert code == 0, err
    memory = json.loads(out)["memory"]
    assert memory["measured_peak"] <= memory["budget"] == int(0.7 * memory["eager_peak"])


def test_optimize_prints_a_table_and_progress_apart(run: Run) -> None:
    code, out, err = run("optimize", "models.py:build", "-p", "canonicalize")
    assert code == 0
    assert "canonicalize" in out
    assert "capturing" in err
    code, out, err = run("optimize", "models.py:build", "-p", "canonicalize", "-q")
    assert code == 0
    assert err == ""


def test_a_module_name_and_keyword_inputs_work(run: Run) -> None:
    code, out, err = run("optimize", "models:with_kwargs", "-p", "canonicalize", "--json", "-q")
    assert code == 0, err
    assert json.loads(out)["canonicalize"]["functionalized"] == 1


def test_dumps_are_written(run: Run, models: Path) -> None:
    code, _, err = run("optimize", "models.py:build", "-p", "canonicalize", "--dump-dir", "d", "-q")
    assert code == 0, err
    names = sorted(p.name for p in (models / "d").iterdir())
    assert names == [
        "000_capture.json",
        "000_capture.py",
        "001_canonicalize.json",
        "001_canonicalize.py",
    ]
    json.loads((models / "d" / "001_canonicalize.json").read_text())


def test_inspect_and_dump_print_on_stdout(run: Run) -> None:
    code, out, err = run("inspect", "models.py:build", "--json", "-q")
    assert code == 0, err
    assert json.loads(out)
    code, out, err = run("dump", "models.py:build", "-f", "json", "-q")
    assert code == 0, err
    assert json.loads(out)
    code, out, err = run("dump", "models.py:build", "-q")
    assert code == 0, err
    compile(out, "dump.py", "exec")


def test_dump_writes_a_file_instead(run: Run, models: Path) -> None:
    code, out, _ = run("dump", "models.py:build", "-f", "dot", "-o", "graph.dot")
    assert code == 0
    assert out == ""
    assert "digraph" in (models / "graph.dot").read_text()


def test_passes_lists_what_the_registry_finds(run: Run) -> None:
    from graphopt import registry

    code, out, _ = run("passes", "--json")
    assert code == 0
    data = json.loads(out)
    assert [p["name"] for p in data["passes"]] == list(registry.passes())
    code, out, _ = run("passes", "canonicalize")
    assert code == 0
    assert "rematerialize" not in out


def test_solve_prints_the_promised_keys(run: Run) -> None:
    code, out, err = run("solve", "chain.json", "--budget", "90%", "--time-limit", "3", "--json")
    assert code == 0, err
    data = json.loads(out)
    keys = {"sequence", "duration", "peak", "lower_bound", "gap", "status", "seconds", "order"}
    assert keys <= set(data)
    assert set(data["sequence"]) == set(range(8))
    assert data["duration"] == 10 * len(data["sequence"])
    assert data["lower_bound"] <= data["duration"]
    assert data["order"] == "input"


def test_solve_with_free_order_never_claims_more_than_it_knows(run: Run) -> None:
    code, out, err = run(
        *("solve", "chain.json", "-b", "90%", "--order", "free", "--time-limit", "3", "--json")
    )
    assert code == 0, err
    data = json.loads(out)
    assert data["order"] == "free"
    assert 0 <= data["lower_bound"] <= data["duration"]


def test_solve_gives_json_even_if_nothing_fits(run: Run) -> None:
    code, out, err = run("solve", "chain.json", "-b", "150", "--time-limit", "2", "--json")
    assert code == 4
    assert json.loads(out)["status"] == "infeasible"
    assert "smallest budget" in err


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '{"nodes": 3}', '{"nodes": [{"id": 0}]}'])
def test_a_corrupt_task_graph_is_refused(run: Run, models: Path, text: str) -> None:
    (models / "bad.json").write_text(text)
    code, out, err = run("solve", "bad.json", "--budget", "80%")
    assert (code, out) == (1, "")
    assert "no task graph" in err


def test_a_corrupt_module_file_is_refused(run: Run, models: Path) -> None:
    (models / "small.graphopt").write_bytes(b"PK\x03\x04 no archive")
    code, out, err = run("dump", "small.graphopt")
    assert (code, out) == (1, "")
    assert "error: small.graphopt is corrupt" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "Usage: graphopt" in out


def test_python_dash_m_is_the_same_and_starts_fast(models: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", "-m", "graphopt", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert "optimize" in done.stdout
    assert "| torch" not in done.stderr


def layered(width: int, depth: int) -> dict[str, Any]:
    """A random layered task graph with skips, far from solved to optimality in a minute."""
    draw = random.Random(0)
    count = width * depth
    nodes = [
        {"id": i, "duration": draw.randint(1, 100), "bytes": draw.randint(1, 100)}
        for i in range(count)
    ]
    edges = {
        (draw.randrange(max(0, i - 3 * width), i - i % width), i)
        for i in range(width, count)
        for _ in range(3)
    }
    edges |= {(draw.randrange(0, i - i % width), i) for i in range(width, count, 3)}
    return {"nodes": nodes, "edges": sorted(edges), "order": list(range(count))}


def test_ctrl_c_in_the_solver_keeps_the_best_plan(models: Path) -> None:
    (models / "big.json").write_text(json.dumps(layered(8, 40)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "graphopt", "solve", "big.json", "--budget", "80%", "--json"]
    command += ["--time-limit", "300", "-o", "plan.json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stderr is not None
    line = process.stderr.readline()  # the solver reports progress: it is at work
    assert line
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    if out:  # a plan was found by then
        assert (
            json.loads(out)["sequence"]
            == json.loads((models / "plan.json").read_text())["sequence"]
        )
    assert not list(models.glob(".*tmp"))


def test_ctrl_c_while_optimizing_leaves_no_file(run: Run, models: Path, monkeypatch: Any) -> None:
    from graphopt.passes.canonicalize import Canonicalize

    def interrupted(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Canonicalize, "run", interrupted)
    code, out, err = run(
        "optimize", "models.py:build", "-p", "canonicalize", "-o", "small.graphopt"
    )
    assert code == 130
    assert out == ""
    assert "interrupted" in err
    assert not list(models.glob("*.graphopt*"))
    assert not list(models.glob(".*tmp"))


def test_bench_lists_what_is_infeasible(run: Run) -> None:
    code, out, err = run(
        *("bench", "models.py:wide", "--budgets", "80%,1KiB", "--repeats", "1"),
        *("--time-limit", "2", "--json", "-q"),
    )
    assert code == 0, err
    eager, fits, hopeless = json.loads(out)["rows"]
    assert fits["peak_bytes"] <= 0.8 * eager["peak_bytes"]
    assert hopeless["smallest"] > 1024
