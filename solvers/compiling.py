"""Compiles the searches in the background, so that a time limit also holds the first time.

Numba takes seconds to half a minute for what it has not compiled before, and keeps the result
beside the source files.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


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
                threading.Thread(target=self._run, daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Whether it is ready within so many seconds; compiling goes on if it is not."""
        self.start()
        limit = time.perf_counter() + seconds
        while not self._ready.wait(0.02):  # short waits, so that Ctrl-C is noticed
            if time.perf_counter() > limit:
                return False
        if self._error is not None:
            # `torch.export` replaces max, min and math.pow for everybody while it traces; numba
            # can't compile in the meantime. Nobody traces while someone waits here: again, then.
            self._error = None
            self._warm_up()
        return True

    def _run(self) -> None:
        try:
            self._warm_up()
        except BaseException as error:  # noqa: BLE001 -- raised again where it is waited for
            self._error = error
        finally:
            self._ready.set()
