"""What the memory allocator sees while something runs.

On the CPU the figures come from the profiler's memory events: every allocation that goes through
PyTorch's allocator is reported with its size, the temporaries inside an op included.  Their running
sum over time, relative to the start of the region, gives the live bytes at each moment.  (Not seen:
buffers that oneDNN allocates for itself, and the release of what existed before.)  On CUDA the
caching allocator's own counters are used; they know the peak and the live bytes, but no timeline.
"""

from __future__ import annotations

import contextlib
import gc
import os
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import profile

from graphopt.errors import UnsupportedError

_MARK = "graphopt::mark "
# Kineto announces every profiler session on stderr unless told not to before the first of them.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")


@dataclass(frozen=True)
class MemoryTrace:
    """Allocator bytes over a region, relative to its start.

    Attributes:
        peak: Most live bytes at any moment.
        live: Live bytes at the end.
        timeline: ``(nanoseconds since the start, live bytes)`` after every allocation and release;
            only the marks and the end on CUDA.
        marks: ``(name, nanoseconds since the start)`` of every `mark`, in order.
        result: What the traced function returned (it is kept alive to the end of the region).
    """

    peak: int
    live: int
    timeline: tuple[tuple[int, int], ...] = field(default=(), repr=False)
    marks: tuple[tuple[str, int], ...] = ()
    result: Any = field(default=None, repr=False, compare=False)

    def live_at(self, name: str) -> int:
        """Live bytes at the first mark of that name.

        Raises:
            KeyError: No such mark.
        """
        return self._live_before(self._time_of(name))

    def peak_between(self, start: str | None = None, end: str | None = None) -> int:
        """Most live bytes between two marks (default: the region's start and end)."""
        begin = 0 if start is None else self._time_of(start)
        stop = None if end is None else self._time_of(end)
        inside = [b for t, b in self.timeline if t >= begin and (stop is None or t < stop)]
        return max(inside, default=0) if start is None else max([self._live_before(begin), *inside])

    def segments(self) -> list[tuple[str, int, int, int]]:
        """``(mark, live at it, peak until the next mark, live at the next mark)`` for each mark.

        The last mark's segment reaches to the end of the region.  Linear in the events, where
        asking for every pair of marks would be quadratic.
        """
        times = [t for t, _ in self.timeline]
        cuts = [bisect_left(times, t) for _, t in self.marks] + [len(times)]
        result = []
        for (name, _), first, last in zip(self.marks, cuts, cuts[1:], strict=False):
            before = self.timeline[first - 1][1] if first else 0
            inside = [b for _, b in self.timeline[first:last]]
            result.append((name, before, max([before, *inside]), inside[-1] if inside else before))
        return result

    def _time_of(self, name: str) -> int:
        for mark_name, time in self.marks:
            if mark_name == name:
                return time
        raise KeyError(f"no mark {name!r} in this trace")

    def _live_before(self, time: int) -> int:
        index = bisect_left(self.timeline, (time, -(1 << 62)))
        return self.timeline[index - 1][1] if index else 0


def trace_memory(
    fn: Callable[..., Any], *, device: torch.device | str | None = None
) -> MemoryTrace:
    """Run ``fn`` once and trace what it allocates above what was live before.

    Garbage is collected before and not during the call, so that earlier garbage isn't counted as a
    release and the figures don't depend on when the collector happens to run.

    Args:
        fn: Called with no argument, or with ``mark`` if it has a parameter of that name:
            ``mark("name")`` notes a moment, for `MemoryTrace.live_at` and the like.
        device: A CUDA device whose allocator is asked; anything else means the CPU.

    Returns:
        The trace.  ``fn``'s return value is alive at the end and counted in ``live``.

    Raises:
        UnsupportedError: A profiler session is already running; there can be only one.
    """
    where = torch.device(device) if device is not None else torch.device("cpu")
    if where.type != "cuda" and torch._C._autograd._profiler_enabled():
        raise UnsupportedError(
            "memory can't be measured while a profiler is running",
            hint="call this outside of torch.profiler.profile",
        )
    gc.collect()
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        if where.type == "cuda":
            return _trace_cuda(fn, where)
        return _trace_cpu(fn)
    finally:
        if was_enabled:
            gc.enable()


def _takes_mark(fn: Callable[..., Any]) -> bool:
    code = getattr(fn, "__code__", None)
    return code is not None and "mark" in code.co_varnames[: code.co_argcount]


@contextlib.contextmanager
def _profiling() -> Iterator[Any]:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True) as session:
        yield session


def _record_mark(name: str) -> None:
    with torch.profiler.record_function(_MARK + name):
        pass


def _trace_cpu(fn: Callable[..., Any]) -> MemoryTrace:
    with _profiling() as session:
        _record_mark("")  # the region's start; the session's own set-up lies before it
        result = fn(mark=_record_mark) if _takes_mark(fn) else fn()
        _record_mark("\0end")
    return _read_events(session.profiler.kineto_results.events(), result)


def _read_events(events: Any, result: Any) -> MemoryTrace:
    deltas: list[tuple[int, int]] = []
    marks: list[tuple[str, int]] = []
    for event in events:
        name = event.name()
        if name == "[memory]":
            if event.device_type() == torch.profiler._utils.DeviceType.CPU:
                deltas.append((event.start_ns(), event.nbytes()))
        elif name.startswith(_MARK):
            marks.append((name[len(_MARK) :], event.start_ns()))
    marks.sort(key=lambda mark: mark[1])
    start, end = marks[0][1], marks[-1][1]
    # A stable sort: events of one nanosecond stay in the order in which they were recorded.
    deltas = sorted((d for d in deltas if start <= d[0] <= end), key=lambda delta: delta[0])
    live = peak = 0
    timeline = []
    for time, change in deltas:
        live += change
        peak = max(peak, live)
        timeline.append((time - start, live))
    named = tuple((name, time - start) for name, time in marks[1:-1])
    return MemoryTrace(peak, live, tuple(timeline), named, result)


def _trace_cuda(fn: Callable[..., Any], device: torch.device) -> MemoryTrace:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    base = torch.cuda.memory_allocated(device)
    marks: list[tuple[str, int]] = []
    timeline: list[tuple[int, int]] = []
    highest = 0

    def note(moment: int) -> None:
        # The peak since the last note stands just before it in the timeline.
        nonlocal highest
        peak = torch.cuda.max_memory_allocated(device) - base
        highest = max(highest, peak)
        timeline.extend([(2 * moment, peak), (2 * moment + 1, _live_cuda(device) - base)])
        torch.cuda.reset_peak_memory_stats(device)

    def mark(name: str) -> None:
        torch.cuda.synchronize(device)
        note(len(marks))
        marks.append((name, 2 * len(marks) + 2))

    result = fn(mark=mark) if _takes_mark(fn) else fn()
    torch.cuda.synchronize(device)
    note(len(marks))
    return MemoryTrace(highest, timeline[-1][1], tuple(timeline), tuple(marks), result)


def _live_cuda(device: torch.device) -> int:
    return int(torch.cuda.memory_allocated(device))
