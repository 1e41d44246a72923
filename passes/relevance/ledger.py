"""Where relevance ends: sums for each sample, by sink and, if wanted, by operation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.ops import Op
from graphopt.passes.relevance.samples import Layout


class Ledger:
    """The sinks of one run.

    Args:
        layouts: Where the samples lie in each value.
        values: Values of the run.
        samples: Size of the batch.

    Attributes:
        totals: Sink -> relevance of each sample, ``[samples]``.
        entries: Operation -> sink -> the same.
    """

    def __init__(
        self, layouts: Mapping[fx.Node, Layout], values: Mapping[fx.Node, Any], samples: Any = None
    ) -> None:
        self._layouts = layouts
        self._values = values
        self.samples = samples
        self.totals: dict[str, Tensor] = {}
        self.entries: dict[Op, dict[str, Tensor]] = {}

    def book(
        self, op: Op, sink: str, relevance: Tensor, at: fx.Node | None = None, share: float = 1
    ) -> None:
        """Book a multiple of relevance.

        Args:
            op: Where it stays.
            sink: What takes it.
            relevance: Its batch dimension is that of a value.
            at: The value; None: the operation's result.
            share: The multiple; the sums are multiplied, which are few.
        """
        found = self.per_sample(op.node if at is None else at, relevance)
        self._add(op, sink, found if share == 1 else found * share)

    def book_channels(
        self, op: Op, sink: str, quotient: Tensor, values: Tensor, channel: int
    ) -> None:
        """Book ``c * b`` for a vector ``b`` along one dimension, which is summed first."""
        layout = self.layout(op.node)
        channel %= quotient.ndim
        others = [d for d in range(quotient.ndim) if d not in (channel, layout.dim)]
        values = values.to(quotient.dtype)
        if layout.dim is None or channel == layout.dim:
            summed = quotient.movedim(channel, -1) @ values
            self._add(op, sink, self.per_sample(op.node, summed))
        elif channel == quotient.ndim - 1:
            dim = layout.dim - (channel < layout.dim)
            summed = quotient @ values
            self._add(op, sink, self._sums(replace(layout, dim=dim), summed))
        else:
            summed = quotient.sum(others) if others else quotient
            summed = summed @ values if channel > layout.dim else values @ summed
            self._add(op, sink, self._sums(replace(layout, dim=0), summed))

    def book_value(self, sink: str, node: fx.Node, relevance: Tensor) -> None:
        """Book relevance that has arrived at a value."""
        found = self.per_sample(node, relevance)
        self.totals[sink] = self.totals[sink] + found if sink in self.totals else found

    def per_sample(self, node: fx.Node, relevance: Tensor) -> Tensor:
        """Sums for each sample of something laid out as a value."""
        return self._sums(self.layout(node), relevance)

    def _sums(self, layout: Layout, value: Tensor) -> Tensor:
        return layout.per_sample(value, self.samples, self._values)

    def layout(self, node: fx.Node) -> Layout:
        """Where the samples lie in a value.

        Raises:
            UnsupportedError: They are not in one dimension of it.
        """
        if node not in self._layouts:
            raise UnsupportedError(
                "the samples of the batch are mixed here, so that relevance can't be told apart",
                node=node,
                hint="explain the model on one sample at a time",
            )
        return self._layouts[node]

    def _add(self, op: Op, sink: str, found: Tensor) -> None:
        self.totals[sink] = self.totals[sink] + found if sink in self.totals else found
        entry = self.entries.setdefault(op, {})
        entry[sink] = entry[sink] + found if sink in entry else found
