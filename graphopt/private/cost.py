"""What communication costs: bytes, rounds, and seconds on a network."""

from __future__ import annotations

from dataclasses import dataclass

from graphopt.errors import UsageError


@dataclass(frozen=True)
class Cost:
    """Communication of one evaluation.

    Attributes:
        bytes: Sent by all parties together.
        rounds: Times that the parties wait for each other.
    """

    bytes: float = 0.0
    rounds: int = 0

    def __add__(self, other: Cost) -> Cost:
        """One after the other."""
        return Cost(self.bytes + other.bytes, self.rounds + other.rounds)

    def beside(self, other: Cost) -> Cost:
        """Both at once: bytes add up, the longer one sets the rounds."""
        return Cost(self.bytes + other.bytes, max(self.rounds, other.rounds))


@dataclass(frozen=True)
class Network:
    """A link between the parties.

    Attributes:
        name: Its name.
        bandwidth: Bits a second, shared by both directions.
        rtt: Seconds there and back.
    """

    name: str
    bandwidth: float
    rtt: float

    def seconds(self, cost: Cost, trips: float = 2.0) -> float:
        """Seconds that the communication takes, computation left out.

        Args:
            cost: Bytes and rounds.
            trips: One-way trips that a round takes.
        """
        return 8.0 * cost.bytes / self.bandwidth + cost.rounds * trips * self.rtt / 2


LAN = Network("lan", 3e9, 0.8e-3)
WAN = Network("wan", 200e6, 40e-3)
NETWORKS = {n.name: n for n in (LAN, WAN)}
"""The two settings of Cheetah (Huang et al., USENIX Security 2022, section 6)."""


def network(given: str | tuple[float, float] | Network) -> Network:
    """Read a network: ``lan``, ``wan``, or ``(bits a second, seconds there and back)``.

    Raises:
        UsageError: It is none of these.
    """
    if isinstance(given, Network):
        return given
    if isinstance(given, str):
        found = NETWORKS.get(given.strip().lower())
        if found is not None:
            return found
        parts = given.strip("() ").split(",")
    else:
        parts = list(given)
    try:
        bandwidth, rtt = (float(part) for part in parts)
    except (TypeError, ValueError):
        bandwidth, rtt = 0.0, 0.0
    if not (0 < bandwidth < float("inf") and 0 <= rtt < float("inf")):
        raise UsageError(
            f"no network {given!r}",
            hint="lan, wan, or bandwidth,rtt in bits/s and seconds: 1e8,0.02",
        )
    return Network(f"{bandwidth:g} bit/s, {rtt:g} s", bandwidth, rtt)
