"""What an op really allocates and how long it takes, measured once for each distinct call.

The bytes of fake tensors miss what happens inside an op: a convolution's backward, the backward of
softmax and layer norm, or the copy before a batched product need memory besides their inputs and
outputs, and an op may return its input or an output laid out otherwise than the graph says.  So
every distinct call is run once on synthesized inputs under the allocator's eye.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt.cost.allocator import trace_memory
from graphopt.cost.calls import Call, CallError, describe
from graphopt.cost.sizes import (
    Substitution,
    UnknownSizeError,
    output_bytes,
    tensors_in,
    values_of,
)
from graphopt.ir.randomness import kept_random_state
from graphopt.ir.untouched import autocast_off

Progress = Callable[[int, int], None]
_SESSION = 200  # calls to a profiler session: starting one is slow, its event buffer is finite
_REPEAT_SECONDS = 0.01


@dataclass(frozen=True)
class OpMeasurement:
    """What one call allocates and how long it takes.

    Attributes:
        output_bytes: Bytes allocated for each output; 0 where it shares its storage with an input
            or an earlier output, or is no tensor.
        workspace: Bytes that live only while the op runs, at its worst moment, beyond its inputs
            and all of its outputs.
        seconds: Best time of a few runs; None if it wasn't asked for or can't be measured.
        aliases: For each output the position, among the op's tensor arguments, of the one whose
            storage it shares, or None.
        measured: False where the op couldn't be run and the graph's own sizes stand in.
        reason: Why it couldn't.
    """

    output_bytes: tuple[int, ...]
    workspace: int = 0
    seconds: float | None = None
    aliases: tuple[int | None, ...] = ()
    measured: bool = True
    reason: str | None = None

    @property
    def peak(self) -> int:
        """Most bytes beyond the inputs while the op runs."""
        return sum(self.output_bytes) + self.workspace


_CACHE: dict[Hashable, OpMeasurement] = {}


def measure_ops(
    nodes: Iterable[fx.Node],
    *,
    symbols: Substitution | None = None,
    seconds: bool = False,
    progress: Progress | None = None,
) -> dict[fx.Node, OpMeasurement]:
    """Measure many nodes; each distinct call runs once and is remembered for this process.

    The ops run without autocast, as in a planned step, with the number of threads set at the time.
    Their inputs require no gradient, but grad mode is on: oneDNN's recurrent layers allocate what
    their backward needs only then.  The random state is restored.

    Args:
        nodes: Nodes of a forward-level or joint graph, with fake tensors in ``meta["val"]``.
        symbols: What stands for symbolic sizes (default: the hints), to predict other batch sizes.
        seconds: Whether to time each call as well.
        progress: Called with ``(calls done, calls in all)``.

    Returns:
        A measurement for each node.  Placeholders, attributes, ``getitem`` and nodes without tensor
        outputs cost nothing.  Where a call can't be run, ``measured`` is False.
    """
    nodes = list(nodes)
    known: dict[fx.Node, OpMeasurement] = {}
    keys: dict[fx.Node, Hashable] = {}
    calls: dict[Hashable, Call] = {}
    for node in nodes:
        call = _call_of(node, symbols)
        if isinstance(call, OpMeasurement):
            known[node] = call
            continue
        keys[node] = key = (call.key, environment())
        calls.setdefault(key, call)
    _measure_calls(calls, seconds, progress)
    for node, key in keys.items():
        found = _CACHE[key]
        known[node] = found if found.measured else _from_fakes(node, symbols, found.reason)
    return known


def environment() -> Hashable:
    """What decides, besides the call itself, what it takes."""
    return (
        torch.get_num_threads(),
        torch.backends.mkldnn.enabled,
        torch.are_deterministic_algorithms_enabled(),
    )


def _call_of(node: fx.Node, symbols: Substitution | None) -> Call | OpMeasurement:
    count = len(values_of(node))
    if (
        node.op != "call_function"
        or node.target is operator.getitem
        or next(tensors_in(node.meta.get("val")), None) is None
    ):
        return OpMeasurement((0,) * count, seconds=0.0, aliases=(None,) * count)
    try:
        return describe(node, symbols)
    except (CallError, UnknownSizeError) as error:
        return _from_fakes(node, symbols, str(error))


def _from_fakes(node: fx.Node, symbols: Substitution | None, reason: str | None) -> OpMeasurement:
    try:
        sizes = tuple(output_bytes(node, symbols))
    except UnknownSizeError as error:
        sizes = (0,) * len(values_of(node))
        reason = str(error)
    none = (None,) * len(sizes)
    return OpMeasurement(sizes, aliases=none, measured=False, reason=reason)


def _measure_calls(calls: dict[Hashable, Call], seconds: bool, progress: Progress | None) -> None:
    fresh = [(key, call) for key, call in calls.items() if key not in _CACHE]
    untimed = [
        (key, call)
        for key, call in calls.items()
        if seconds and (key not in _CACHE or _lacks_time(_CACHE[key]))
    ]
    total = len(fresh) + len(untimed)
    done = 0
    with kept_random_state(), torch.enable_grad(), autocast_off():
        for start in range(0, len(fresh), _SESSION):
            chunk = fresh[start : start + _SESSION]
            for device in {call.device for _, call in chunk}:
                here = [(key, call) for key, call in chunk if call.device == device]
                _CACHE.update(_measure_memory(here, device))
                done += len(here)
                _tell(progress, done, total)
        for key, call in untimed:
            if _lacks_time(_CACHE[key]):
                _CACHE[key] = replace(_CACHE[key], seconds=_time_call(call))
            done += 1
            _tell(progress, done, total)


def _lacks_time(found: OpMeasurement) -> bool:
    return found.measured and found.seconds is None


def _tell(progress: Progress | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


@dataclass
class _Run:
    """Outcome of one call: the storages of its outputs, or why it failed."""

    sizes: tuple[int, ...] = ()
    aliases: tuple[int | None, ...] = ()
    error: str | None = None


def _measure_memory(
    chunk: Sequence[tuple[Hashable, Call]], device: torch.device
) -> dict[Hashable, OpMeasurement]:
    runs: list[_Run] = []

    def session(mark: Callable[[str], None]) -> None:
        for index, (_, call) in enumerate(chunk):
            runs.append(_run_marked(call, index, mark))

    trace = trace_memory(session, device=device)
    segments = {name: rest for name, *rest in trace.segments()} if trace.marks else {}
    return {
        key: _measurement(runs[index], segments.get(f"run {index}"))
        for index, (key, _) in enumerate(chunk)
    }


def _run_marked(call: Call, index: int, mark: Callable[[str], None]) -> _Run:
    try:
        args, kwargs = call.synthesize()
        call.target(*args, **kwargs)  # the first run may fill caches that later ones find
        mark(f"run {index}")
        value = call.target(*args, **kwargs)
        mark(f"end {index}")
        return _storages(value, [*_flat_tensors(args), *_flat_tensors(kwargs)])
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        return _Run(error=f"{type(error).__name__}: {lines[0]}")


def _flat_tensors(value: Any) -> list[torch.Tensor]:
    return list(tensors_in(value))


def _storages(value: Any, inputs: list[torch.Tensor]) -> _Run:
    owners = {_storage_id(t): position for position, t in reversed(list(enumerate(inputs)))}
    seen: set[int] = set()
    sizes: list[int] = []
    aliases: list[int | None] = []
    for output in value if isinstance(value, (list, tuple)) else [value]:
        identity = _storage_id(output) if isinstance(output, torch.Tensor) else None
        aliases.append(owners.get(identity) if identity is not None else None)
        fresh = identity is not None and identity not in owners and identity not in seen
        sizes.append(output.untyped_storage().nbytes() if fresh else 0)
        if identity is not None:
            seen.add(identity)
    return _Run(tuple(sizes), tuple(aliases))


def _storage_id(tensor: torch.Tensor) -> int | None:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # an opaque layout has no storage
        return None


def _measurement(run: _Run, segment: list[int] | None) -> OpMeasurement:
    if run.error is not None or segment is None:
        return OpMeasurement((), measured=False, reason=run.error or "no trace")
    before, peak, after = segment
    sizes = list(run.sizes)
    # What the allocator kept beyond the outputs' storages (its rounding, on CUDA) goes to the
    # largest output.
    surplus = (after - before) - sum(sizes)
    if sizes and any(sizes):
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        sizes[largest] = max(0, sizes[largest] + surplus)
    workspace = max(0, (peak - before) - sum(sizes))
    return OpMeasurement(tuple(sizes), workspace, aliases=run.aliases)


def _time_call(call: Call) -> float | None:
    try:
        args, kwargs = call.synthesize()
        synchronize = torch.cuda.synchronize if call.device.type == "cuda" else _nothing
        best = float("inf")
        spent, count = 0.0, 0
        while count < 2 or (spent < _REPEAT_SECONDS and count < 20):
            synchronize()
            start = time.perf_counter()
            call.target(*args, **kwargs)
            synchronize()
            seconds = time.perf_counter() - start
            spent, count, best = spent + seconds, count + 1, min(best, seconds)
        return best
    except Exception:  # ran before under the allocator's eye; a time is not worth failing for
        return None


def _nothing() -> None:
    """Stand in for a device's synchronisation where calls are synchronous."""


__all__ = [
    "OpMeasurement",
    "environment",
    "measure_ops",
]
