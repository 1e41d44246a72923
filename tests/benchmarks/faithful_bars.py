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
    """Ours and a peer on the same samples.

    Attributes:
        ours: The composite.
        peer: The peer's method.
        more: How much more ours has, over the samples: the standard error is that of the
            difference, since both have the samples in common.
    """

    ours: str
    peer: str
    more: Estimate

    def __str__(self) -> str:
        return f"{self.ours} against {self.peer}: {self.more}"


def _best(names: Iterable[str], rows: Mapping[str, Judged]) -> str | None:
    return max(names, key=lambda name: rows[name].curves.abpc.mean, default=None)


def _ours(rows: Mapping[str, Judged]) -> str | None:
    return _best([name for name in rows if name.startswith(OURS)], rows)


def _peer(rows: Mapping[str, Judged]) -> str | None:
    return _best([name for name in rows if name in PEERS], rows)


def reference(rows: Mapping[str, Judged]) -> str | None:
    """What all are compared with: the best peer; without peers, our best composite."""
    return _peer(rows) or _ours(rows)


def against_peers(rows: Mapping[str, Judged]) -> dict[str, Comparison]:
    """Our composite of the largest ABPC beside the best peers.

    Returns:
        ``ABPC``: beside the peer of the largest; ``hits``, where truth is known: the same composite
        beside the peer that finds most of it. Nothing where there are no peers or none of ours.
    """
    ours, peer = _ours(rows), _peer(rows)
    if ours is None or peer is None:
        return {}
    mine, other = rows[ours], rows[peer]
    found = {"ABPC": Comparison(ours, peer, estimate(mine.curves.areas - other.curves.areas))}
    rates = {name: rows[name].hits for name in rows if name in PEERS}
    known = {name: hits for name, hits in rates.items() if hits is not None}
    if mine.hits is not None and known:
        finder = max(known, key=lambda name: float(known[name].mean()))
        found["hits"] = Comparison(ours, finder, estimate(mine.hits - known[finder]))
    return found


def missed(rows: Mapping[str, Judged]) -> list[str]:
    """The bars that aren't reached, in words."""
    compared = against_peers(rows).items()
    found = [f"{what} of {each}" for what, each in compared if _behind(each.more)]
    if "random" in rows:
        chance = rows["random"].curves.abpc
        if abs(chance.mean) > 2 * chance.standard_error:
            found.append(f"ABPC of an order by chance: {chance}")
    return found


def _behind(difference: Estimate) -> bool:
    return difference.mean < -difference.standard_error
