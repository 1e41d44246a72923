"""The benchmark of faithfulness: its bars, and that what it saves changes no figure."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.passes.relevance.judging import (
    PerturbationCurves,
    Removal,
    leave_one_out,
    perturbation_curves,
    randomisation_check,
    spearman,
)
from tests.benchmarks import faithfulness
from tests.benchmarks.attributions import METHODS
from tests.benchmarks.faithful_bars import against_peers, missed
from tests.benchmarks.faithful_rows import Row
from tests.benchmarks.faithful_tasks import Task
from tests.benchmarks.faithfulness import measure
from tests.benchmarks.remembered import _KNOWN, Remembered


def _row(areas: list[float], hits: list[float] | None = None) -> Row:
    lerf = torch.tensor(areas, dtype=torch.float64)[:, None].expand(-1, 2)
    curves = PerturbationCurves((0.0, 1.0), torch.zeros_like(lerf), lerf, "logit")
    return Row(curves, 0.0, hits=None if hits is None else torch.tensor(hits, dtype=torch.float64))


def test_the_best_of_ours_is_compared_with_the_best_peer_sample_by_sample() -> None:
    rows = {
        "ours: a": _row([1, 2, 3]), "ours: b": _row([2, 3, 4]), "random": _row([9, 9, 9]),
        "LXT: attnlrp": _row([1.5, 2.5, 3.5]), "captum: epsilon": _row([0, 0, 0]),
    }  # fmt: skip
    found = against_peers(rows)
    assert list(found) == ["ABPC"]
    assert (found["ABPC"].ours, found["ABPC"].peer) == ("ours: b", "LXT: attnlrp")
    assert (found["ABPC"].more.mean, found["ABPC"].more.standard_error) == (0.5, 0.0)
    del rows["LXT: attnlrp"], rows["captum: epsilon"]
    assert against_peers(rows) == {}


def test_hits_are_compared_with_the_peer_that_finds_most() -> None:
    rows = {
        "ours: a": _row([2, 3], [0.5, 0.5]), "ours: b": _row([1, 2], [1, 1]),
        "LXT: attnlrp": _row([1.5, 2.5], [0, 0.5]), "captum: epsilon": _row([0, 0], [0.25, 0.75]),
    }  # fmt: skip
    found = against_peers(rows)
    assert (found["ABPC"].ours, found["ABPC"].peer) == ("ours: a", "LXT: attnlrp")
    assert (found["hits"].ours, found["hits"].peer) == ("ours: a", "captum: epsilon")
    assert (found["hits"].more.mean, found["hits"].more.standard_error) == (0.0, 0.25)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ({"ours: a": _row([2, 3]), "captum: gamma": _row([1, 2]), "random": _row([-1, 1.5])}, []),
        ({"ours: a": _row([2, 1]), "captum: gamma": _row([2, 1])}, []),
        ({"ours: a": _row([1, 2]), "captum: gamma": _row([2, 3.5])}, ["ABPC of ours: a"]),
        ({"random": _row([1, 1.2])}, ["ABPC of an order by chance"]),
        ({"random": _row([-1, -1.2])}, ["ABPC of an order by chance"]),
        (
            {"ours: a": _row([2, 3], [0.5, 0.6]), "captum: gamma": _row([1, 2], [0.9, 0.9])},
            ["hits of ours: a against captum: gamma"],
        ),
        ({"ours: a": _row([2, 3], [0.5, 1]), "captum: gamma": _row([1, 2], [0.9, 0.9])}, []),
    ],
)
def test_bars_name_what_is_missed(rows: dict[str, Row], expected: list[str]) -> None:
    found = missed(rows)
    assert len(found) == len(expected)
    assert all(text.startswith(start) for text, start in zip(found, expected, strict=True))


_RUN: list[int] = []  # rows of each call; not in the module, which judging leaves as it was


class _Counting(nn.Module):
    """A linear layer that counts its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        _RUN.append(len(x))
        return self.layer(x).relu().cumsum(1)


@pytest.fixture
def task() -> Task:
    torch.manual_seed(0)
    model, x = _Counting().eval(), torch.randn(5, 6)
    targets = model(x).argmax(1)
    _RUN.clear()
    truth = torch.zeros(5, 6, dtype=torch.bool)
    truth[:, :2] = True
    removal = Removal(units="elements", batch_size=7)
    return Task("tiny", model, (x,), targets, removal, truth=truth, embedding="none", chunk=2)


def test_a_row_is_computed_once_and_forgotten_with_its_model(task: Task) -> None:
    model: Any = task.model
    (x,) = task.inputs
    seen = Remembered(model)
    twice = x[[0, 1, 0, 2]]
    torch.testing.assert_close(seen(twice), model.layer(twice).relu().cumsum(1))
    assert sum(_RUN) == 3
    torch.testing.assert_close(Remembered(model)(x), model.layer(x).relu().cumsum(1))
    assert sum(_RUN) == 5
    assert not torch.equal(seen(x + 1), seen(x))
    assert sum(_RUN) == 10
    other = _Counting()
    Remembered(other)(x)
    known = len(_KNOWN)
    del other
    gc.collect()
    assert len(_KNOWN) == known - 1


def test_figures_are_those_of_the_functions_one_by_one(task: Task) -> None:
    """What is shared among the methods changes nothing, and saves runs."""
    model = task.model
    names = ["random", "leave-one-out"]
    found = measure(task, names, ["untrained"])
    runs = sum(_RUN)
    _RUN.clear()
    given = {"targets": task.targets, "removal": task.removal}
    erased = leave_one_out(model, task.inputs, **given)
    for name in names:
        relevance = METHODS[name](task)
        curves = perturbation_curves(model, task.inputs, relevance, **given)
        row = found[name]
        torch.testing.assert_close(row.curves.areas, curves.areas)
        assert row.left_out is not None
        torch.testing.assert_close(row.left_out, spearman(relevance, erased))
    assert runs < sum(_RUN)


def test_random_parameters_are_those_of_the_check(task: Task) -> None:
    linear = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval()
    removal = Removal(units="elements")
    task = Task("tiny", linear, task.inputs, task.targets, removal)
    method = METHODS["leave-one-out"]

    def again(model: nn.Module, inputs: tuple[Any, ...], targets: Tensor) -> Tensor:
        return method(Task("tiny", model, inputs, targets, removal))

    before = {name: value.clone() for name, value in linear.state_dict().items()}
    expected = randomisation_check(linear, task.inputs, again, targets=task.targets, layers=[""])
    found = measure(task, ["leave-one-out"])["leave-one-out"].untrained
    assert found is not None
    torch.testing.assert_close(found, expected.similarity[-1])
    assert float(found.abs().max()) < 0.999
    assert all(torch.equal(linear.state_dict()[name], value) for name, value in before.items())


def test_the_command_says_which_bars_are_missed(
    task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faithfulness, "TASKS", {"tiny": lambda: task})
    monkeypatch.setitem(METHODS, "ours: a", lambda task: task.inputs[0])
    monkeypatch.setitem(METHODS, "captum: gamma", METHODS["leave-one-out"])
    monkeypatch.setitem(METHODS, "random", METHODS["leave-one-out"])
    out = tmp_path / "figures.json"
    options = ["--without", "untrained", "-o", str(out), "--sections", "tiny", "--methods"]
    assert faithfulness.main([*options, "ours: a", "captum: gamma", "random"]) == 1
    shown = capsys.readouterr().out
    assert "ABPC of ours: a against captum: gamma: -" in shown
    assert "missed: tiny: ABPC of ours: a against captum: gamma" in shown
    assert "missed: tiny: ABPC of an order by chance" in shown
    figures = json.loads(out.read_text())["tiny"]["methods"]
    assert set(figures) == {"ours: a", "captum: gamma", "random"}
    assert figures["random"]["untrained"] is None
    assert len(figures["ours: a"]["samples"]["morf"]) == 5
    _RUN.clear()
    joined = tmp_path / "joined.json"
    again = [*options, "ours: a", "random", "--with", str(out), "-o", str(joined)]
    assert faithfulness.main(again) == 1
    assert capsys.readouterr().out == shown  # the peer's row comes from the file as well
    assert not _RUN
    assert joined.read_text() == out.read_text()
    with pytest.raises(ValueError, match="other samples"):
        faithfulness.main([*options, "random", "--with", str(out), "--samples", "4"])
    assert faithfulness.main([*options, "captum: gamma"]) == 0
    assert "all bars are met" in capsys.readouterr().out
