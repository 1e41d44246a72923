"""What attributions must reach: our best composite beside the best peer, and chance at zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from graphopt.passes.relevance.judging import Estimate, PerturbationCurves, estimate
from tests.benchmarks.peer_attributions import PEERS

OURS = "ours: "


class Judged(Protocol):
    """What bars look at: the curves, and the hit rate of each sample where truth is known."""

    @property
    def curves(self) -> PerturbationCurves: ...

    @property
    def hits(self) -> Tensor | None: ...


@dataclass(frozen=True)
class Comparison:
    """Our composite and the peer of the largest ABPC, on the same samples.

    Attributes:
        ours: The composite.
        peer: The peer's method.
        abpc: How much larger our ABPC is, over the samples.
        hits: How much more of the known truth ours finds, or None.
    """

    ours: str
    peer: str
    abpc: Estimate
    hits: Estimate | None

    def __str__(self) -> str:
        found = "" if self.hits is None else f", hits {self.hits}"
        return f"{self.ours} against {self.peer}: ABPC {self.abpc}{found}"


def _best(names: Iterable[str], rows: Mapping[str, Judged]) -> str | None:
    return max(names, key=lambda name: rows[name].curves.abpc.mean, default=None)


def _ours(rows: Mapping[str, Judged]) -> str | None:
    return _best([name for name in rows if name.startswith(OURS)], rows)


def _peer(rows: Mapping[str, Judged]) -> str | None:
    return _best([name for name in rows if name in PEERS], rows)


def reference(rows: Mapping[str, Judged]) -> str | None:
    """What all are compared with: the best peer; without peers, our best composite."""
    return _peer(rows) or _ours(rows)


def against_peers(rows: Mapping[str, Judged]) -> Comparison | None:
    """Our best composite beside the best peer, sample by sample; None where one of them lacks.

    The difference has its standard error over the samples, which both have in common.
    """
    ours, peer = _ours(rows), _peer(rows)
    if ours is None or peer is None:
        return None
    mine, other = rows[ours], rows[peer]
    hits = None
    if mine.hits is not None and other.hits is not None:
        hits = estimate(mine.hits - other.hits)
    return Comparison(ours, peer, estimate(mine.curves.areas - other.curves.areas), hits)


def missed(rows: Mapping[str, Judged]) -> list[str]:
    """The bars that aren't reached, in words."""
    found = []
    if compared := against_peers(rows):
        pair = f"{compared.ours} against {compared.peer}"
        if _behind(compared.abpc):
            found.append(f"ABPC of {pair}: {compared.abpc}")
        if compared.hits is not None and _behind(compared.hits):
            found.append(f"hits of {pair}: {compared.hits}")
    if "random" in rows:
        chance = rows["random"].curves.abpc
        if abs(chance.mean) > 2 * chance.standard_error:
            found.append(f"ABPC of an order by chance: {chance}")
    return found


def _behind(difference: Estimate) -> bool:
    return difference.mean < -difference.standard_error
