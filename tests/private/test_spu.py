"""SPU in its own environment: outputs and bytes against plaintext and prediction."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from graphopt.errors import UnsupportedError, UsageError
from graphopt.private import private_cost, protocol
from graphopt.private.engines import spu
from tests.private.nets import build
from tests.private.runs import compared_bytes, run_together, totals

needs_spu = pytest.mark.skipif(
    not spu.is_set_up(),
    reason="SPU has no environment: graphopt private-cost --engine spu",
)
NAMES = ["plain", "gathered", "polynomial", "pooled", "residual"]


@needs_spu
@pytest.mark.slow
@pytest.mark.parametrize("name", spu.PROTOCOLS)
def test_outputs_and_bytes_are_as_predicted(name: str) -> None:
    engine = functools.partial(spu.run, protocol=name, timeout=1500.0)
    runs = run_together(NAMES, engine, protocol(name))
    for done in runs.values():
        assert done.error < 5e-3  # 18 fraction bits
        measured, predicted = totals(done.measured).bytes, totals(done.predicted).bytes
        assert measured == pytest.approx(predicted, rel=0.05)
        for step in done.circuit.steps:
            if step.op in ("relu", "negative"):
                compared = done.measured[step.name].bytes, done.predicted[step.name].bytes
                assert compared[0] == pytest.approx(compared[1], rel=0.05)
    # Cheetah sends a message's overhead with every call, which shows at 14 elements
    share = 0.11 if name != "cheetah" else 0.13
    assert compared_bytes(runs["gathered"]) <= share * compared_bytes(runs["plain"])


def test_without_its_environment_spu_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GRAPHOPT_SPU_ENV", str(tmp_path / "nothing"))
    model, x = build("plain")
    with pytest.raises(UnsupportedError, match="private-cost --engine spu"):
        private_cost(model, (x,), engine="spu")


def test_engines_run_their_own_protocols() -> None:
    model, x = build("plain")
    with pytest.raises(UsageError, match="aby3"):
        private_cost(model, (x,), engine="spu", protocol_name="crypten")
    with pytest.raises(UsageError):
        private_cost(model, (x,), engine="mpc")


def test_an_environment_that_cannot_be_made_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "environment"
    monkeypatch.setenv("GRAPHOPT_SPU_ENV", str(folder))
    monkeypatch.setattr(spu, "REQUIREMENTS", ("./no-such-package-here",))
    with pytest.raises(UnsupportedError, match="no-such-package-here"):
        spu.set_up()
    assert not folder.exists()
    assert not spu.is_set_up()
