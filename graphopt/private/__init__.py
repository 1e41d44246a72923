"""Private inference: what a network costs under secure computation, predicted and measured.

from graphopt.private import predict, private_cost, protocol

predict(model, "cheetah", "wan", (x,)).seconds
private_cost(model, (x,), engine="crypten").bytes
protocol("crypten").nonlinearity("relu", 6752)
"""

from __future__ import annotations

from graphopt.private.circa import CircaSimulation, fault_probability, simulate
from graphopt.private.circa_search import CircaReport, search
from graphopt.private.comparisons import comparisons
from graphopt.private.cost import LAN, WAN, Cost, Network, network
from graphopt.private.lower import lower
from graphopt.private.predict import PrivateCost, SiteCost, predict
from graphopt.private.protocols import Protocol, Unit, protocol, protocols
from graphopt.private.report import PrivateReport, private_cost

__all__ = [
    "LAN",
    "WAN",
    "CircaReport",
    "CircaSimulation",
    "Cost",
    "Network",
    "PrivateCost",
    "PrivateReport",
    "Protocol",
    "SiteCost",
    "Unit",
    "comparisons",
    "fault_probability",
    "lower",
    "network",
    "predict",
    "private_cost",
    "protocol",
    "protocols",
    "search",
    "simulate",
]
