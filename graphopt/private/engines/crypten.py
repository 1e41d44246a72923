"""CrypTen: two processes on this machine, arithmetic shares over 64-bit integers.

Party 0 owns the model, party 1 the input.  Multiplication triples come from CrypTen's trusted first
party, so their generation is not part of the figures.  Knott et al., CrypTen: Secure Multi-Party
Computation Meets Machine Learning, NeurIPS 2021.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.circuit import Circuit
from graphopt.private.engines.jobs import read_result, write_job
from graphopt.private.engines.processes import Told, environment, run_parties, silent
from graphopt.private.engines.run import Run

_NEEDS = ("crypten", "yaml", "omegaconf")
_INSTALL = 'pip install "graphopt[private]" && pip install --no-deps crypten==0.4.1'


def missing() -> str | None:
    """What has to be installed before this engine runs, as a sentence; None: nothing."""
    absent = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    return f"{', '.join(absent)} not installed: {_INSTALL}" if absent else None


def run(
    circuit: Circuit,
    inputs: Sequence[torch.Tensor],
    *,
    timeout: float = 600.0,
    progress: Told = silent,
) -> Run:
    """Run a circuit between two processes.

    Args:
        circuit: What to run.
        inputs: One tensor for each input; party 1's.
        timeout: Seconds after which the processes are ended.
        progress: Told which step runs.

    Raises:
        UnsupportedError: CrypTen is not installed.
        EngineError: A party failed, or the time is up.
    """
    absent = missing()
    if absent is not None:
        raise UnsupportedError("the engine crypten is not there", hint=absent)
    public = {n: c.tensor for n, c in circuit.constants.items() if not c.secret}
    weights = {n: c.tensor for n, c in circuit.constants.items() if c.secret}
    given = {n: x.detach().double() for n, x in zip(circuit.inputs, inputs, strict=True)}
    with tempfile.TemporaryDirectory(prefix="graphopt-crypten-") as name:
        folder = Path(name)
        for rank, own in enumerate((weights, given)):
            place = folder / str(rank)
            place.mkdir()
            write_job(place, circuit, {**public, **own}, rank=rank)
        settings = environment(
            WORLD_SIZE="2",
            RENDEZVOUS=f"file://{folder / 'rendezvous'}",
            DISTRIBUTED_BACKEND="gloo",
            OMP_NUM_THREADS="1",
        )
        if sys.platform == "linux":
            settings.setdefault("GLOO_SOCKET_IFNAME", "lo")
        module = "graphopt.private.engines.crypten_party"
        commands = [[sys.executable, "-m", module, str(folder / str(r))] for r in range(2)]
        run_parties(commands, environment=settings, timeout=timeout, progress=progress)
        return read_result(folder / "1")
