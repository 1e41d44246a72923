"""`graphopt private-cost`: what it prints, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import graphopt
from graphopt.cli import main
from graphopt.private import predict
from tests.private.nets import build

NETS = str(Path(__file__).parents[1] / "private" / "nets.py")


def test_a_prediction_needs_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--engine", "none", "--protocol", "cheetah", "--network", "wan", "--json"]
    assert main(["private-cost", f"{NETS}:gathered", *arguments]) == 0
    shown = json.loads(capsys.readouterr().out)
    model, x = build("gathered")
    expected = predict(model, "cheetah", "wan", (x,))
    assert shown["predicted"]["bytes"] == expected.bytes
    assert shown["predicted"]["seconds"] == pytest.approx(expected.seconds)
    assert [row["node"] for row in shown["sites"]] == [s.node for s in expected.sites]
    assert shown["bytes"] is None


def test_a_table_names_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["private-cost", f"{NETS}:gathered", "--engine", "none", "-q"]) == 0
    captured = capsys.readouterr()
    assert "relu_1" in captured.out
    assert "not counted" in captured.err


def test_a_saved_module_is_priced_as_it_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, x = build("gathered")
    path = tmp_path / "net.gopt"
    graphopt.capture(model, (x,)).emit().save(path)
    assert main(["private-cost", str(path), "--engine", "none", "--json", "-q"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["predicted"]["bytes"] == predict(model, "crypten", "lan", (x,)).bytes


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (["--engine", "none", "--protocol", "ckks"], 1, "relu"),
        (["--engine", "none", "--protocol", "nothing"], 2, "crypten"),
        (["--engine", "crypten", "--protocol", "aby3"], 2, "crypten"),
        (["--engine", "none", "--network", "quick"], 2, "wan"),
    ],
)
def test_what_cannot_be_is_said_with_an_exit_code(
    arguments: list[str], code: int, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["private-cost", f"{NETS}:gathered", *arguments, "-q"]) == code
    captured = capsys.readouterr()
    assert word in captured.err
    assert not captured.out
