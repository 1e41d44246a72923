"""Seconds of single calls as a forward without gradients makes them, measured in turns.

Every distinct call is timed a little, then all of them again, so that a busy moment of the machine
falls on all alike; the best time of each counts.  Times are kept for the process, by op, arguments,
shapes, strides, types, device and number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Hashable, Sequence

import torch

from graphopt.cost.calls import Call
from graphopt.cost.operators import Progress, environment
from graphopt.ir.randomness import kept_random_state

_TURNS = 3
_RUNS = 3  # a turn, after one that isn't timed
_KNOWN: dict[Hashable, float | None] = {}


def call_seconds(
    calls: Sequence[Call], *, limit: float, progress: Progress | None = None
) -> list[float | None]:
    """The best time of each call.

    Args:
        calls: The calls; equal ones are timed once.
        limit: Seconds after which no further call is timed.
        progress: Called with ``(timings done, timings in all)``.

    Returns:
        Seconds, by call; None for one that can't be run on synthesized inputs, or that the limit
        has cut off.  The random state is restored.
    """
    here = _surroundings()
    fresh = {key: call for call in calls if (key := (call.key, here)) not in _KNOWN}
    end, done = time.perf_counter() + limit, 0
    found: dict[Hashable, float | None] = {}
    with kept_random_state(), torch.no_grad():
        for _ in range(_TURNS):
            for key, call in fresh.items():
                if time.perf_counter() > end:
                    break
                found[key] = _better(found.get(key), _timed(call))
                done += 1
                if progress is not None:
                    progress(done, _TURNS * len(fresh))
    _KNOWN.update(found)
    return [_KNOWN.get((call.key, here)) for call in calls]


def _surroundings() -> Hashable:
    """What else decides how long a call takes."""
    types = ("cpu", "cuda")
    casts = [(t, torch.is_autocast_enabled(t), str(torch.get_autocast_dtype(t))) for t in types]
    return (environment(), *casts)


def _better(known: float | None, seconds: float | None) -> float | None:
    return seconds if known is None or seconds is None else min(known, seconds)


def _timed(call: Call) -> float | None:
    synchronize = torch.cuda.synchronize if call.device.type == "cuda" else (lambda: None)
    try:
        args, kwargs = call.synthesize()
        call.target(*args, **kwargs)
        best = float("inf")
        for _ in range(_RUNS):
            synchronize()
            start = time.perf_counter()
            call.target(*args, **kwargs)
            synchronize()
            best = min(best, time.perf_counter() - start)
        return best
    except Exception:  # an op may refuse synthesized inputs in any way; None says so
        return None
