"""Compiles the searches in the background, so that a time limit also holds the first time.

Numba takes seconds to half a minute for what it has not compiled before, and keeps the result
beside the source files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

_STARTED: list[Compiled] = []


def settle() -> None:
    """Waits until nothing is being compiled.

    For those who are about to replace builtins for everybody, as `torch.export` does with `max`,
    `min` and `math.pow` while it traces: numba would compile the replacement.
    """
    for compiled in _STARTED:
        while not compiled.ready(0.02):  # short waits, so that Ctrl-C is noticed
            pass


class Compiled:
    """A function to call once before something compiled may be used."""

    def __init__(self, warm_up: Callable[[], None]) -> None:
        """Notes the function; nothing is compiled yet."""
        self._warm_up = warm_up
        self._ready = threading.Event()
        self._lock = threading.Lock()
        self._started = False
        self._error: BaseException | None = None

    def start(self) -> None:
        """Begins to compile in the background, if that has not happened yet."""
        with self._lock:
            if not self._started:
                self._started = True
                _STARTED.append(self)
                threading.Thread(target=self._run, daemon=True).start()

    def ready(self, seconds: float) -> bool:
        """Whether compiling has ended, or does within so many seconds."""
        return self._ready.wait(seconds)

    def wait(self, seconds: float) -> bool:
        """Whether it is ready within so many seconds; compiling goes on if it is not."""
        self.start()
        limit = time.perf_counter() + seconds
        while not self._ready.wait(0.02):  # short waits, so that Ctrl-C is noticed
            if time.perf_counter() > limit:
                return False
        if self._error is not None:
            raise self._error
        return True

    def _run(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:
            self._error = error
        finally:
            self._ready.set()
