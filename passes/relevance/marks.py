"""What the calls of a flat graph stand for: the operation that they belong to, and the phase.

A run is traced call by call (`tracing`), so whatever is new in the graph after an operation was
run, or relevance handed back through it, belongs to that operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

Phase = Literal["forward", "backward"]

MARK = "relevance_mark"
"""Where a node's `Mark` is in its ``meta``."""

_VALUES = "relevance_values"


@dataclass(frozen=True)
class Mark:
    """Where a call of a flat graph comes from.

    Attributes:
        phase: ``forward``: the operation itself, and what its rule prepares; ``backward``: what
            hands relevance on.
        owner: Name of the operation's call in the forward graph.
    """

    phase: Phase
    owner: str


class Marker:
    """Marks what is traced; does nothing outside of a trace."""

    def __init__(self) -> None:
        mode = get_proxy_mode()
        self._tracer: Any = None if mode is None else mode.tracer
        self._last = self._latest()

    def _latest(self) -> fx.Node | None:
        return None if self._tracer is None else next(iter(reversed(self._tracer.graph.nodes)))

    def note(self, phase: Phase, owner: str) -> None:
        """Mark all that is new."""
        if self._tracer is None:
            return
        for node in reversed(self._tracer.graph.nodes):
            if node is self._last:
                break
            node.meta[MARK] = Mark(phase, owner)
        self._last = self._latest()

    def name(self, values: Mapping[fx.Node, Any]) -> None:
        """Note which nodes hold values of the forward graph."""
        for node, value in values.items():
            if self._tracer is not None and isinstance(value, Tensor):
                slot: Any = get_proxy_slot(value, self._tracer, None)
                if slot is not None:
                    slot.proxy.node.meta.setdefault(_VALUES, []).append(node.name)


def mark_of(node: fx.Node) -> Mark | None:
    """Where a call comes from; None: an input or a size."""
    return node.meta.get(MARK)


def values_of(node: fx.Node) -> tuple[str, ...]:
    """Names of the values of the forward graph that a node holds."""
    return tuple(node.meta.get(_VALUES, ()))


def is_backward(node: fx.Node) -> bool:
    """Whether a call hands relevance on."""
    mark = mark_of(node)
    return mark is not None and mark.phase == "backward"


def merge(kept: fx.Node, dropped: fx.Node) -> None:
    """Let one node stand for what another one did."""
    names = [*values_of(kept), *(n for n in values_of(dropped) if n not in values_of(kept))]
    if names:
        kept.meta[_VALUES] = names
