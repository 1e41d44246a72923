"""Starting the processes of an engine, listening to them, and ending them whatever happens."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from graphopt.errors import GraphoptError

Told = Callable[..., None]
_TAIL = 30


class EngineError(GraphoptError):
    """A party of a secure computation failed or didn't answer in time."""


def run_parties(
    commands: Sequence[Sequence[str]],
    *,
    environment: Mapping[str, str],
    timeout: float,
    progress: Told,
) -> None:
    """Run one process for each party until all are done.

    Lines of the form ``@done/total`` on a party's stdout are progress; whatever it writes to stderr
    is kept for the error message.

    Raises:
        EngineError: A party failed, or the time is up.  The others are ended.
    """
    with tempfile.TemporaryDirectory(prefix="graphopt-parties-") as folder:
        logs = [Path(folder) / f"{rank}.log" for rank in range(len(commands))]
        running: list[subprocess.Popen[str]] = []
        try:
            for command, log in zip(commands, logs, strict=True):
                running.append(_start(command, environment, log))
            listener = threading.Thread(target=_listen, args=(running[0].stdout, progress))
            listener.daemon = True
            listener.start()
            _wait(running, logs, time.monotonic() + timeout, timeout)
        finally:
            _end(running)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a process that imports what this one can import."""
    inherited = dict(os.environ)
    inherited["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    return {**inherited, **extra}


def _start(command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[str]:
    with log.open("w") as errors:
        return subprocess.Popen(
            list(command), env=dict(env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=errors, text=True,
        )  # fmt: skip


def _listen(stream: IO[str] | None, progress: Told) -> None:
    for line in stream or ():
        done, _, total = line.strip().removeprefix("@").partition("/")
        if line.startswith("@") and done.isdigit() and total.isdigit():
            progress(f"running under the protocol, step {done} of {total}", int(done) / int(total))


def _wait(
    running: Sequence[subprocess.Popen[str]], logs: Sequence[Path], end: float, timeout: float
) -> None:
    while True:
        states = [process.poll() for process in running]
        for rank, state in enumerate(states):
            if state not in (None, 0):
                raise EngineError(f"party {rank} failed:\n{_tail(logs[rank])}")
        if all(state == 0 for state in states):
            return
        if time.monotonic() > end:
            raise EngineError(
                f"the parties didn't finish within {timeout:g} seconds",
                hint="a smaller input, or a longer --timeout",
            )
        time.sleep(0.05)


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(lines[-_TAIL:]) or "it said nothing"


def _end(running: Sequence[subprocess.Popen[str]]) -> None:
    for process in running:
        if process.poll() is None:
            process.terminate()
    for process in running:
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def silent(*_: Any) -> None:
    """No progress."""
