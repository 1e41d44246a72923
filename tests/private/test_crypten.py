"""CrypTen between two processes: outputs, rounds and bytes against plaintext and prediction."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.private import lower, predict, private_cost, protocol
from graphopt.private.engines import crypten
from graphopt.private.engines.processes import EngineError, run_parties
from tests.private.nets import NETS, build
from tests.private.runs import Done, compared_bytes, run_together, totals

needs_crypten = pytest.mark.skipif(crypten.missing() is not None, reason=str(crypten.missing()))


@pytest.fixture(scope="module")
def runs() -> dict[str, Done]:
    return run_together(list(NETS), crypten.run, protocol("crypten"))


@needs_crypten
@pytest.mark.parametrize("name", NETS)
def test_outputs_are_the_models_up_to_fixed_point(runs: dict[str, Done], name: str) -> None:
    # 16 fraction bits; layer norm, softmax and GELU go through CrypTen's approximations
    assert runs[name].error < (0.05 if name == "attention" else 2e-3)


@needs_crypten
@pytest.mark.parametrize("name", NETS)
def test_every_step_takes_the_rounds_and_bytes_predicted(runs: dict[str, Done], name: str) -> None:
    assert runs[name].measured == runs[name].predicted
    assert totals(runs[name].measured).rounds > 0


@needs_crypten
def test_a_gathered_tenth_pays_a_tenth_and_a_mask_pays_for_all(runs: dict[str, Done]) -> None:
    full = compared_bytes(runs["plain"])
    assert compared_bytes(runs["gathered"]) <= 0.11 * full
    assert compared_bytes(runs["blended"]) == full
    assert totals(runs["polynomial"].measured).rounds < totals(runs["gathered"].measured).rounds


@needs_crypten
def test_what_linearize_emits_pays_for_what_it_keeps(runs: dict[str, Done]) -> None:
    total = 3 * 4 * 12 * 12
    kept = compared_bytes(runs["emitted"]) / compared_bytes(runs["residual"])
    assert total * kept == pytest.approx(0.25 * total, abs=1)
    assert runs["emitted"].measured == runs["emitted"].predicted


@needs_crypten
def test_the_report_of_a_model_is_what_the_engine_counted() -> None:
    model, x = build("plain", 2)
    report = private_cost(model, (x,), network_name=(1e8, 0.01))
    predicted = predict(model, "crypten", (1e8, 0.01), (x,))
    assert (report.bytes, report.rounds) == (predicted.bytes, predicted.rounds)
    assert report.network_seconds == pytest.approx(predicted.seconds)
    assert sum(row.bytes or 0 for row in report.sites) == report.bytes
    assert report.max_error is not None
    assert report.max_error < 2e-3
    shown = report.to_dict()
    assert shown["bytes"] == report.bytes
    assert "outputs" not in shown


@needs_crypten
def test_public_weights_leave_only_comparisons_to_talk_about() -> None:
    model, x = build("residual")
    report = private_cost(model, (x,), weights="public")
    assert {row.node.split("_")[0] for row in report.sites} == {"relu", "reveal"}
    assert report.rounds == 3 * 9 + 1
    assert report.max_error is not None
    assert report.max_error < 2e-3


class Known(nn.Module):
    """An output that depends on no input, beside one that does, in half precision."""

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        x = batch["x"]
        return {"known": torch.ones(3, dtype=x.dtype), "sum": x.relu().sum()}


@needs_crypten
def test_outputs_that_are_known_already_cost_nothing() -> None:
    batch = {"x": torch.tensor([1.5, -2.0, 0.25]).half()}
    report = private_cost(Known(), (batch,))
    assert (report.rounds, report.bytes) == (9 + 1, 3 * 464 + 16)
    assert (report.predicted.rounds, report.predicted.bytes) == (report.rounds, report.bytes)
    assert report.max_error is not None
    assert report.max_error < 1e-3


def test_an_absent_engine_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypten, "_NEEDS", ("no_such_package",))
    model, x = build("plain")
    with pytest.raises(UnsupportedError, match="no_such_package"):
        private_cost(model, (x,))


def alive(marker: Path) -> bool:
    pid = int(marker.read_text())
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


WAITING = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_when_one_party_fails_the_other_ends(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    failing = (
        f"import os, time\nwhile not os.path.exists({str(marker)!r}): time.sleep(.01)\n"
        "time.sleep(.1); raise ValueError('a word of its own')"
    )
    commands = [[sys.executable, "-c", WAITING, str(marker)], [sys.executable, "-c", failing]]
    with pytest.raises(EngineError, match="a word of its own"):
        run_parties(commands, environment={}, timeout=60, progress=lambda *_: None)
    assert not alive(marker)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_party_that_does_not_finish_is_ended(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    start = time.monotonic()
    with pytest.raises(EngineError, match=r"1\.5 seconds"):
        run_parties(
            [[sys.executable, "-c", WAITING, str(marker)]],
            environment={}, timeout=1.5, progress=lambda *_: None,
        )  # fmt: skip
    assert time.monotonic() - start < 30
    assert not marker.exists() or not alive(marker)


@needs_crypten
def test_engines_run_in_processes_of_their_own(runs: dict[str, Done]) -> None:
    assert "crypten" not in sys.modules


def test_an_empty_kept_set_costs_nothing() -> None:
    class Empty(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            none = torch.zeros(0, dtype=torch.long)
            return x.index_copy(1, none, torch.relu(x.index_select(1, none)))

    circuit = lower(Empty(), (torch.randn(2, 4),))
    assert totals(protocol("crypten").steps(circuit)).bytes == 0
