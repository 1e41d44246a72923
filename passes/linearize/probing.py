"""Ranges beyond the calibration inputs: what a polynomial does to values it was not fitted to.

A fit is tame where its samples are. Inputs of the same kind that are only a little larger may drive
a polynomial up, the next one squares that, and so on (Garimella et al. 2021, Sisyphus): within
some layers what was fine at calibration is infinite. So the refitted network and the source run
once more, on calibration inputs that are scaled up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from graphopt.passes.linearize.calibration import Reference, batch_norms
from graphopt.passes.linearize.lockstep import Known, Values, lockstep
from graphopt.passes.linearize.refit import Refitted, evaluated, magnitude, normed
from graphopt.passes.linearize.sites import Site, read_by

# How much larger the inputs are, and how many samples run at once.
BEYOND = 1.25
_AT_ONCE = 16


def probed(reference: Reference, refitted: Refitted) -> dict[Site, float]:
    """Growth of ranges on inputs a quarter larger than the calibration ones.

    Args:
        reference: The graph and its inputs.
        refitted: What becomes of it.

    Returns:
        For each site the largest magnitude that it reads, relative to what the source's site reads
        for the same inputs; infinite where it isn't a number. Empty where no input is floating.
    """
    probe = _Probe(reference, refitted)
    for part in _scaled(reference):
        lockstep(replace(reference, inputs=[part]), probe.step)
    return probe.growth()


def _scaled(reference: Reference) -> Iterator[list[Tensor]]:
    for index in range(len(reference.inputs)):
        for part in reference.parts(index, _AT_ONCE):
            if any(each.is_floating_point() for each in part):
                yield [each * BEYOND if each.is_floating_point() else each for each in part]


class _Probe:
    """Notes what sites read while source and replaced network run side by side."""

    def __init__(self, reference: Reference, refitted: Refitted) -> None:
        self.refitted, self.stand_ins = refitted, refitted.stand_ins()
        self.by_node = {site.name: each for site, each in refitted.replacements.items()}
        self.norms = {
            node: norm
            for node, norm in batch_norms(reference.module.graph).items()
            if set(norm.paths) <= set(refitted.here)
        }
        self.source: dict[Site, float] = {}
        self.result: dict[Site, float] = {}

    def step(self, node: fx.Node, teacher: Known, student: Known) -> Values | None:
        """The replaced network's values of a call."""
        each = self.by_node.get(node.name)
        if each is not None:
            read = read_by(node)
            for side, known in ((self.source, teacher), (self.result, student)):
                side[each.site] = max(side.get(each.site, 0.0), magnitude(known(read)))
            return evaluated(each, node, teacher, student)
        stand_in = self.stand_ins.get(node.name)
        if stand_in is not None:
            args: Any = fx.map_arg(node.args, lambda n: student(n)[0])
            return [stand_in(*args)]
        norm = self.norms.get(node)
        if norm is None:
            return None
        return normed(node, norm, [self.refitted.here[path] for path in norm.paths], student)

    def growth(self) -> dict[Site, float]:
        """Of each site."""
        return {site: value / (self.source[site] or 1.0) for site, value in self.result.items()}
