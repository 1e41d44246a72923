"""SPU: Cheetah, Semi2k and ABY3, in an environment of its own that is made when first asked for.

Ma et al., SecretFlow-SPU, USENIX ATC 2023.  The parties are threads of one process; every step runs
twice and the second turn counts, since the first pays for set-up (oblivious transfer, keys).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from graphopt.errors import UnsupportedError
from graphopt.private.circuit import Circuit
from graphopt.private.engines.jobs import read_result, write_job
from graphopt.private.engines.processes import Told, run_parties, silent
from graphopt.private.engines.run import Run

PROTOCOLS = ("cheetah", "semi2k", "aby3")
REQUIREMENTS = ("spu==0.9.5", "numpy<2", "jax[cpu]<=0.4.34")
_WORKER = Path(__file__).with_name("spu_worker.py")


def environment_folder() -> Path:
    """Where SPU's environment is or will be: under the user's cache folder."""
    given = os.environ.get("GRAPHOPT_SPU_ENV")
    if given:
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "graphopt" / "spu-0.9.5"


def python() -> Path:
    """The interpreter of SPU's environment, whether it is there or not."""
    return environment_folder() / "bin" / "python"


def is_set_up() -> bool:
    """Whether the environment is there, complete."""
    return python().is_file() and (environment_folder() / "complete").is_file()


def set_up(progress: Told = silent) -> None:
    """Make the environment; about 200 MB are downloaded.

    Raises:
        UnsupportedError: It can't be made, with pip's own words.
    """
    folder = environment_folder()
    shutil.rmtree(folder, ignore_errors=True)
    progress(f"making an environment for SPU in {folder}")
    commands = [
        [sys.executable, "-m", "venv", str(folder)],
        [str(python()), "-m", "pip", "install", "--disable-pip-version-check", *REQUIREMENTS],
    ]
    try:
        for command in commands:
            progress("installing SPU and its JAX into an environment of their own")
            done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
            if done.returncode:
                said = (done.stderr or done.stdout).strip().splitlines()[-5:]
                raise UnsupportedError(
                    "SPU's environment can't be made:\n  " + "\n  ".join(said),
                    hint=f"it needs {', '.join(REQUIREMENTS)} from a package index, on Linux with "
                    "Python 3.10 or 3.11; GRAPHOPT_SPU_ENV names an environment that has them",
                )
        (folder / "complete").touch()
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def run(
    circuit: Circuit,
    inputs: Sequence[torch.Tensor],
    *,
    protocol: str = "cheetah",
    timeout: float = 600.0,
    progress: Told = silent,
) -> Run:
    """Run a circuit under one of SPU's protocols.

    Args:
        circuit: What to run.
        inputs: One tensor for each input.
        protocol: ``cheetah`` (two parties), ``semi2k`` (two, triples from a trusted first party)
            or ``aby3`` (three).
        timeout: Seconds after which the process is ended.
        progress: Told which step runs.

    Returns:
        Bytes sent by all parties; as rounds, the messages that the busiest party sends.

    Raises:
        UnsupportedError: The environment is not set up.
        EngineError: The process failed, or the time is up.
    """
    if not is_set_up():
        raise UnsupportedError(
            "the engine spu is not there",
            hint="graphopt private-cost --engine spu makes it; "
            "so does graphopt.private.engines.spu.set_up()",
        )
    values = {n: c.tensor for n, c in circuit.constants.items()}
    values.update({n: x.detach().double() for n, x in zip(circuit.inputs, inputs, strict=True)})
    with tempfile.TemporaryDirectory(prefix="graphopt-spu-") as name:
        folder = Path(name)
        write_job(folder, circuit, values, protocol=protocol)
        settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [str(python()), "-I", str(_WORKER), name]  # -I: spu.py beside it is not SPU
        run_parties([command], environment=settings, timeout=timeout, progress=progress)
        return read_result(folder)
