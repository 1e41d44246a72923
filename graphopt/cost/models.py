"""Seconds of a node: counted, by a roofline, or measured, behind one interface."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import fx

from graphopt.cost.flops import flops
from graphopt.cost.operators import Progress, measure_ops
from graphopt.cost.roofline import Roofline, calibrated
from graphopt.cost.sizes import (
    Substitution,
    UnknownSizeError,
    bytes_moved,
    tensors_in,
)


@runtime_checkable
class CostModel(Protocol):
    """How long a node takes.

    Attributes:
        name: What a plan says it was made with.
    """

    @property
    def name(self) -> str:
        """What a plan says it was made with."""
        ...

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one execution of the node; 0 for views and for what isn't a call."""
        ...

    def prepare(self, nodes: Iterable[fx.Node], progress: Progress | None = None) -> None:
        """Get the figures for many nodes at once, where that is cheaper than one by one."""
        ...


@dataclass(frozen=True)
class AnalyticCost:
    """A roofline: an op takes its launch overhead, plus computing, plus moving its bytes.

    The ops of a graph run one by one, and none of PyTorch's overlaps both perfectly: the sum ranks
    them better than the longer of the two.  After Williams, Waterman and Patterson, "Roofline: an
    insightful visual performance model" (2009), with one ceiling for each kind of arithmetic.

    Attributes:
        roofline: The machine's ceilings.
        symbols: What stands for symbolic sizes; default: the hints.
    """

    roofline: Roofline
    symbols: Substitution | None = None
    name: str = "analytic"

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one execution of the node."""
        if node.op != "call_function" or node.target is operator.getitem:
            return 0.0
        try:
            moved = bytes_moved(node, self.symbols)
        except UnknownSizeError:
            moved = 0
        if moved == 0:
            return 0.0
        arithmetic = flops(node, self.symbols) / self.roofline.rate(str(node.target), _dtype(node))
        return self.roofline.overhead + arithmetic + moved / self.roofline.bandwidth

    def prepare(self, nodes: Iterable[fx.Node], progress: Progress | None = None) -> None:
        """Nothing to prepare: every figure is computed."""


@dataclass(frozen=True)
class ProfiledCost:
    """Each distinct op and shape is timed once on this machine, on synthesized inputs.

    Attributes:
        fallback: What answers for ops that can't be run by themselves.
        symbols: What stands for symbolic sizes; default: the hints.
    """

    fallback: CostModel
    symbols: Substitution | None = None
    name: str = "profiled"
    _known: dict[fx.Node, float] = field(default_factory=dict, repr=False, compare=False)

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one execution of the node."""
        if node not in self._known:
            self.prepare([node])
        return self._known[node]

    def prepare(self, nodes: Iterable[fx.Node], progress: Progress | None = None) -> None:
        """Time all distinct calls among the nodes."""
        found = measure_ops(nodes, symbols=self.symbols, seconds=True, progress=progress)
        for node, measurement in found.items():
            seconds = measurement.seconds
            self._known[node] = self.fallback.seconds(node) if seconds is None else seconds


@dataclass(frozen=True)
class FlopsCost:
    """Work as it is counted: FLOPs, and a quarter of one for each byte moved.

    Independent of the machine, so that plans are the same everywhere, and recomputing elementwise
    ops is preferred to recomputing products. Seconds are those of a nominal machine of 1 TFLOP/s.

    Attributes:
        symbols: What stands for symbolic sizes; default: the hints.
    """

    symbols: Substitution | None = None
    name: str = "flops"

    def seconds(self, node: fx.Node) -> float:
        """Seconds of one execution of the node on the nominal machine."""
        if node.op != "call_function" or node.target is operator.getitem:
            return 0.0
        try:
            moved = bytes_moved(node, self.symbols)
        except UnknownSizeError:
            moved = 0
        return (flops(node, self.symbols) + 0.25 * moved) * 1e-12

    def prepare(self, nodes: Iterable[fx.Node], progress: Progress | None = None) -> None:
        """Nothing to prepare: every figure is computed."""


COST_MODELS = ("flops", "analytic", "profiled")


def cost_model(
    name: str, device: torch.device | str = "cpu", symbols: Substitution | None = None
) -> CostModel:
    """The cost model of that name, one of `COST_MODELS`."""
    if name == "flops":
        return FlopsCost(symbols)
    return profiled(device, symbols) if name == "profiled" else analytic(device, symbols)


def analytic(
    device: torch.device | str = "cpu", symbols: Substitution | None = None
) -> AnalyticCost:
    """The roofline model, calibrated on this machine the first time and cached.

    Args:
        device: Device whose ceilings count.
        symbols: What stands for symbolic sizes; default: the hints.
    """
    return AnalyticCost(calibrated(torch.device(device)), symbols)


def profiled(
    device: torch.device | str = "cpu", symbols: Substitution | None = None
) -> ProfiledCost:
    """The measuring model; ops that can't be run by themselves get the analytic figure."""
    return ProfiledCost(analytic(device, symbols), symbols)


def _dtype(node: fx.Node) -> torch.dtype:
    sources = [node, *node.all_input_nodes]
    for source in sources:
        for tensor in tensors_in(source.meta.get("val")):
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32
