"""Replacements fitted one after the other, each with everything in front of it replaced already."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import call
from graphopt.passes.linearize.calibration import BatchNorm, Reference, batch_norms, moments
from graphopt.passes.linearize.lockstep import Known, Values, lockstep
from graphopt.passes.linearize.normalisers import Left, Normaliser, Softmaxes
from graphopt.passes.linearize.replacements import Kind, Replacement, fitted
from graphopt.passes.linearize.sites import Site, read_by

# A norm's new variance, as a share of the one before: channels that barely move say little.
_LEAST_VARIANCE = 0.1


@dataclass(frozen=True)
class Survey:
    """What the model's own values tell.

    Attributes:
        options: For each site its replacements and their coefficients.
        largest: The largest magnitude that each site reads.
    """

    options: Mapping[Site, Mapping[Kind, Tensor | None]]
    largest: Mapping[Site, float]


def survey(reference: Reference, wanted: Mapping[Site, tuple[Kind, ...]]) -> Survey:
    """Fit every replacement to what the model itself does."""
    by_node = {site.name: site for site in wanted}
    options: dict[Site, dict[Kind, Tensor | None]] = {}
    largest: dict[Site, float] = {}

    def step(node: fx.Node, teacher: Known, student: Known) -> None:
        site = by_node.get(node.name)
        if site is not None:
            x, y = teacher(read_by(node)), teacher(node)
            options[site] = {kind: fitted(site, kind, x, y) for kind in wanted[site]}
            largest[site] = magnitude(x)

    lockstep(reference, step)
    return Survey(options, largest)


@dataclass(frozen=True)
class Refitted:
    """Replacements that fit together.

    Attributes:
        replacements: By site.
        statistics: New running statistics of BatchNorms, by path.
        here: The same for the calibration inputs, from which they differ where these are noise.
        largest: The largest magnitude that each site now reads.
        beyond: Growth of ranges on inputs beyond the calibration ones, where that was probed.
        outputs: Of teacher and student, for each batch.
        normalisers: What becomes of each softmax that was set apart.
    """

    replacements: dict[Site, Replacement]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    here: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[Site, float] = field(default_factory=dict)
    beyond: Mapping[Site, float] = field(default_factory=dict)
    outputs: tuple[Values, Values] = ((), ())  # type: ignore[assignment]
    normalisers: list[Normaliser | Left] = field(default_factory=list)

    def stand_ins(self) -> dict[str, Normaliser]:
        """What is called instead of softmaxes, by node name."""
        return {n.call.name: n for n in self.normalisers if isinstance(n, Normaliser)}


def refit(
    reference: Reference,
    chosen: Mapping[Site, Replacement],
    norms: bool = True,
    softmaxes: Softmaxes | None = None,
) -> Refitted:
    """Fit each site on what the replaced part in front of it gives, to what the model itself does.

    Training-free imitation, site by site: closed forms fitted to the model's own values escape in
    deep networks (Garimella et al. 2021, Sisyphus).

    Args:
        reference: The graph and its inputs.
        chosen: Kept positions and kinds; coefficients are fitted anew.
        norms: Whether BatchNorms that see other values now get their statistics.
        softmaxes: Those that are replaced, too.
    """
    by_node = {site.name: site for site in chosen}
    calls = set() if softmaxes is None else {each.name for each in softmaxes.calls}
    recalibrated = _called_once(reference) if norms else {}
    result = Refitted({})

    def step(node: fx.Node, teacher: Known, student: Known) -> Values | None:
        site = by_node.get(node.name)
        if site is not None:
            return _replaced(site, chosen[site], node, teacher, student, result)
        if node.name in calls and softmaxes is not None:
            found, values = softmaxes.normalise(node, teacher, student)
            result.normalisers.append(found)
            return values
        norm = recalibrated.get(node)
        if norm is not None and student(norm.value) is not teacher(norm.value):
            return _recalibrated(reference, node, norm, teacher, student, result)
        return None

    outputs = lockstep(reference, step)
    return replace(result, outputs=outputs)


def _called_once(reference: Reference) -> dict[fx.Node, BatchNorm]:
    """BatchNorms whose statistics no other call uses; those of two calls can't suit both."""
    found = batch_norms(reference.module.graph)
    uses = Counter(
        id(lookup(reference.module, path)) for norm in found.values() for path in norm.paths
    )
    return {
        node: norm
        for node, norm in found.items()
        if all(uses[id(lookup(reference.module, path))] == 1 for path in norm.paths)
    }


def _replaced(
    site: Site,
    wanted: Replacement,
    node: fx.Node,
    teacher: Known,
    student: Known,
    result: Refitted,
) -> Values:
    source = read_by(node)
    x, target = student(source), teacher(node)
    result.largest[site] = magnitude(x)
    found = wanted
    if not wanted.is_whole:
        found = replace(wanted, coefficients=fitted(site, wanted.kind, x, target, wanted.kept))
    result.replacements[site] = found
    return evaluated(found, node, teacher, student)


def evaluated(each: Replacement, node: fx.Node, teacher: Known, student: Known) -> Values:
    """What a site's replacement gives for what the student has."""
    source = read_by(node)
    x = student(source)
    same = x is teacher(source)
    exact = teacher(node) if same else [_called(node, source, v, student) for v in x]
    return [each.of(*pair) for pair in zip(x, exact, strict=True)]


def _recalibrated(
    reference: Reference,
    node: fx.Node,
    norm: BatchNorm,
    teacher: Known,
    student: Known,
    result: Refitted,
) -> Values:
    """BatchNorm by statistics that have moved as much as the values that it reads have."""
    x = student(norm.value)
    here = [reference.attribute(each) for each in norm.statistics]
    real = [lookup(reference.module, path) for path in norm.paths]
    scale = (real[1] + norm.eps) / (here[1] + norm.eps)  # of the data's values to these
    change = [b - a for a, b in zip(moments(*teacher(norm.value)), moments(*x), strict=True)]
    result.statistics.update(zip(norm.paths, _moved(real, change, scale), strict=True))
    moved = _moved(here, change, torch.ones_like(scale))
    result.here.update(zip(norm.paths, moved, strict=True))
    return normed(node, norm, moved, student)


def normed(node: fx.Node, norm: BatchNorm, statistics: Sequence[Tensor], student: Known) -> Values:
    """A norm of what the student has, by other statistics."""
    known = dict(zip(norm.statistics, statistics, strict=True))

    def value(batch: Tensor, each: fx.Node) -> object:
        if each is norm.value:
            return batch
        return known[each] if each in known else student(each)[0]

    return [call(node, lambda each, b=batch: value(b, each)) for batch in student(norm.value)]


def _called(node: fx.Node, source: fx.Node, x: Tensor, student: Known) -> Tensor:
    """A call of a non-linearity on another value."""
    found: Tensor = call(node, lambda each: x if each is source else student(each)[0])
    return found


def _moved(
    known: Sequence[Tensor], change: Sequence[Tensor], scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Known mean and variance, moved as samples' ones have moved."""
    variance = known[1] + change[1] * scale
    return known[0] + change[0] * scale.sqrt(), variance.clamp_min(_LEAST_VARIANCE * known[1])


def magnitude(values: Values) -> float:
    """The largest magnitude; infinite where any is not a number."""
    found = max((float(v.abs().max()) for v in values), key=lambda v: math.inf if v != v else v)
    return found if math.isfinite(found) else math.inf
