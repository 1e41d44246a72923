"""`graphopt sweep`: the points on stdout, in a file and in a picture; exit codes."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from graphopt.cli import main

NETS = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3)).eval(), (torch.randn(1, 1, 4, 4),)


def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(1, 4),)


def batches():
    torch.manual_seed(1)
    return [torch.randn(8, 1, 4, 4)]


def quarter(module):
    return 0.25
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    return str(path)


def test_a_file_a_picture_and_a_table(
    nets: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, picture = tmp_path / "frontier.csv", tmp_path / "frontier.png"
    code = main(
        ["sweep", f"{nets}:build", "--relus", "50%,25%", "--relus", "10%", "--data",
         f"{nets}:batches", "--protocol", "crypten", "--network", "wan",
         "-o", str(table), "--plot", str(picture)]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    with open(table, newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["budget"] for row in rows] == ["", *["50%", "25%", "10%"] * 2]
    assert [int(row["relus"]) for row in rows] == [64, *[32, 16, 6] * 2]
    assert {row["network"] for row in rows} == {"wan"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(source)" in captured.out
    assert "replacement=poly2" in captured.out
    assert "capturing" in captured.err
    assert f"wrote {table}" in captured.err


def test_json_with_a_function_and_options(nets: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(
        ["sweep", f"{nets}:build", "-b", "relu_sites=0", "--option", "replacement=affine",
         "--protocol", "gc", "--protocol", "aby3", "--evaluate", f"{nets}:quarter", "--json", "-q"]
    )  # fmt: skip
    captured = capsys.readouterr()
    assert code == 0
    assert not captured.err
    found = json.loads(captured.out)
    assert found["measure"] == "evaluated"
    assert {p["accuracy"] for p in found["points"]} == {0.25}
    assert [(p["protocol"], p["relus"]) for p in found["points"]] == [
        ("gc", 64), ("aby3", 64), ("gc", 0), ("aby3", 0)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "arguments", "code", "word"),
    [
        ("build", ["--relus", "many"], 2, "many"),
        ("build", ["--protocol", "nothing"], 2, "crypten"),
        ("build", ["--network", "quick"], 2, "wan"),
        ("build", ["--data", "nowhere.py:batches"], 1, "nowhere.py"),
        ("build", ["-o", "/nowhere/frontier.csv"], 1, "nowhere"),
        ("plain", [], 1, "BatchNorm"),
    ],
)
def test_what_cannot_be_is_said_with_an_exit_code(
    nets: str,
    model: str,
    arguments: list[str],
    code: int,
    word: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["sweep", f"{nets}:{model}", *arguments, "-q"]) == code
    captured = capsys.readouterr()
    assert word in captured.err
    assert not captured.out
