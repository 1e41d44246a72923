"""Bytes of a call as they were measured at some numbers of elements."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Points:
    """Measured bytes by elements, linear in between.

    Oblivious transfer runs in blocks: messages are filled up to bytes and blocks, so that few
    elements cost more for each than many do.

    Attributes:
        counts: Numbers of elements, rising; the last is a block, after which it starts again.
        bytes: Of a call with so many.
    """

    counts: tuple[int, ...]
    bytes: tuple[float, ...]

    @classmethod
    def read(cls, pairs: Sequence[Sequence[float]]) -> Points:
        """From pairs of elements and bytes."""
        counts, sizes = zip(*pairs, strict=True)
        return cls(tuple(map(int, counts)), tuple(map(float, sizes)))

    def at(self, n: int) -> float:
        """Bytes of a call with n elements."""
        whole, rest = divmod(n, self.counts[-1])
        return whole * self.bytes[-1] + (self._within(rest) if rest else 0.0)

    def _within(self, n: int) -> float:
        place = bisect_left(self.counts, n)
        if self.counts[place] == n or not place:
            return self.bytes[place]
        low, high = self.counts[place - 1], self.counts[place]
        share = (n - low) / (high - low)
        return (1 - share) * self.bytes[place - 1] + share * self.bytes[place]
