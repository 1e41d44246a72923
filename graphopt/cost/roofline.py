"""A machine's ceilings: arithmetic per second, bytes per second, overhead of a call.

They are measured once for a machine, a device, a number of threads and a PyTorch version, which
takes about a second, and kept in the user's cache folder (``$GRAPHOPT_CACHE``, else
``$XDG_CACHE_HOME/graphopt``, else ``~/.cache/graphopt``).  A folder that can't be written, or a
file that can't be read, only means that they are measured again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_VERSION = 2
_MEMORY: dict[str, Roofline] = {}


@dataclass(frozen=True)
class Roofline:
    """Ceilings of one device.

    Attributes:
        matmul: FLOPs per second of a large matrix product in float32.
        conv: FLOPs per second of a convolution in float32.
        low_precision: Speed of bfloat16 products relative to float32.
        bandwidth: Bytes per second read and written by an elementwise op (in cache on a CPU).
        overhead: Seconds that a call of the smallest op takes.
    """

    matmul: float
    conv: float
    low_precision: float
    bandwidth: float
    overhead: float

    def rate(self, op: str, dtype: torch.dtype) -> float:
        """FLOPs per second of an op by its name, such as ``aten.convolution.default``."""
        rate = self.conv if "conv" in op else self.matmul
        return rate * self.low_precision if dtype.itemsize < 4 else rate


def calibrated(device: torch.device) -> Roofline:
    """The device's ceilings, from memory, from the cache folder, or measured now."""
    key = _key(device)
    if key not in _MEMORY:
        path = cache_folder() / f"roofline-{key}.json"
        found = _read(path)
        if found is None:
            found = _calibrate(device)
            _write(path, found)
        _MEMORY[key] = found
    return _MEMORY[key]


def cache_folder() -> Path:
    """Folder in which graphopt keeps what it measured; it need not exist."""
    own = os.environ.get("GRAPHOPT_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "graphopt"
    with contextlib.suppress(RuntimeError):  # no home folder
        return Path.home() / ".cache" / "graphopt"
    return Path(tempfile.gettempdir()) / "graphopt-cache"


def _key(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
            name = next(
                (s.split(":")[1].strip() for s in lines if s.startswith("model name")), name
            )
    facts = [name, device.type, torch.get_num_threads(), torch.__version__, _VERSION]
    return hashlib.sha256(json.dumps([str(f) for f in facts]).encode()).hexdigest()[:16]


def _read(path: Path) -> Roofline | None:
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
        found = Roofline(**{name: float(value) for name, value in data.items()})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    sound = all(0 < value < 1e20 for value in asdict(found).values())
    return found if sound else None


def _write(path: Path, found: Roofline) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(found), file)
        os.replace(temporary, path)  # whole or not at all, also with several processes
    except OSError:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _calibrate(device: torch.device) -> Roofline:
    """Measures one thread: plans need the ratios, which a busy machine distorts with several."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(device)
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def _measure(device: torch.device) -> Roofline:
    big = device.type == "cuda"
    size = 4096 if big else 384
    a = torch.full((size, size), 0.5, device=device)
    image = torch.full((64 if big else 4, 32, 32, 32), 0.5, device=device)
    kernel = torch.full((32, 32, 3, 3), 0.5, device=device)
    flat = torch.full(((1 << 26) if big else (1 << 18),), 0.5, device=device)
    tiny = torch.zeros(8, device=device)
    half = a.to(torch.bfloat16)
    conv_flops = 2.0 * image.numel() * 32 * 9
    matmul = 2.0 * size**3 / _best(lambda: a @ a, device)
    low = 2.0 * size**3 / _best(lambda: half @ half, device)
    return Roofline(
        matmul=matmul,
        conv=conv_flops / _best(lambda: torch.conv2d(image, kernel, padding=1), device),
        low_precision=low / matmul,
        bandwidth=2.0 * flat.numel() * flat.element_size() / _best(lambda: flat + 1.0, device),
        overhead=_best(lambda: torch.add(tiny, tiny), device),
    )


def _best(fn: Callable[[], Any], device: torch.device, budget: float = 0.1) -> float:
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    best, spent, count = float("inf"), 0.0, 0
    while count < 3 or (spent < budget and count < 200):
        synchronize()
        start = time.perf_counter()
        fn()
        synchronize()
        seconds = time.perf_counter() - start
        best, spent, count = min(best, seconds), spent + seconds, count + 1
    return max(best, 1e-9)
