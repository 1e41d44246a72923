"""Replacements fitted one after the other, each with everything in front of it replaced already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from graphopt.ir.graphs import lookup
from graphopt.passes.linearize.calibration import Reference, batch_norms, call, moments
from graphopt.passes.linearize.lockstep import Known, Values, lockstep
from graphopt.passes.linearize.replacements import Kind, Replacement, fitted
from graphopt.passes.linearize.sites import Site


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
            x, y = teacher(node.args[0]), teacher(node)
            options[site] = {kind: fitted(site, kind, x, y) for kind in wanted[site]}
            largest[site] = _largest(x)

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
        outputs: Of teacher and student, for each batch.
    """

    replacements: dict[Site, Replacement]
    statistics: dict[str, Tensor] = field(default_factory=dict)
    here: dict[str, Tensor] = field(default_factory=dict)
    largest: dict[Site, float] = field(default_factory=dict)
    outputs: tuple[Values, Values] = ((), ())  # type: ignore[assignment]


def refit(reference: Reference, chosen: Mapping[Site, Replacement], norms: bool = True) -> Refitted:
    """Fit each site on what the replaced part in front of it gives, to what the model itself does.

    Training-free imitation, site by site: closed forms fitted to the model's own values escape in
    deep networks (Garimella et al. 2021, Sisyphus).

    Args:
        reference: The graph and its inputs.
        chosen: Kept positions and kinds; coefficients are fitted anew.
        norms: Whether BatchNorms that see other values now get their statistics.
    """
    by_node = {site.name: site for site in chosen}
    recalibrated = set(batch_norms(reference.module.graph)) if norms else set()
    result = Refitted({})

    def step(node: fx.Node, teacher: Known, student: Known) -> Values | None:
        site = by_node.get(node.name)
        if site is not None:
            return _replaced(site, chosen[site], node, teacher, student, result)
        if node in recalibrated and student(node.args[0]) is not teacher(node.args[0]):
            return _recalibrated(reference, node, teacher, student, result)
        return None

    outputs = lockstep(reference, step)
    return replace(result, outputs=outputs)


def _replaced(
    site: Site,
    wanted: Replacement,
    node: fx.Node,
    teacher: Known,
    student: Known,
    result: Refitted,
) -> Values:
    x, target = student(node.args[0]), teacher(node)
    result.largest[site] = _largest(x)
    found = wanted
    if not wanted.is_whole:
        found = replace(wanted, coefficients=fitted(site, wanted.kind, x, target, wanted.kept))
    result.replacements[site] = found
    same = x is teacher(node.args[0])
    exact = target if same else [call(node, {node.args[0]: v}.get) for v in x]
    return [found.of(*pair) for pair in zip(x, exact, strict=True)]


def _recalibrated(
    reference: Reference, node: fx.Node, teacher: Known, student: Known, result: Refitted
) -> Values:
    """BatchNorm by statistics that have moved as much as the values that it reads have."""
    x = student(node.args[0])
    own, new = moments(*teacher(node.args[0])), moments(*x)
    paths = [str(node.args[place].target) for place in (3, 4)]
    real = [lookup(reference.module, path) for path in paths]
    result.statistics.update(zip(paths, _moved(real, own, new, node.args[7]), strict=True))
    here = [reference.attribute(node.args[place]) for place in (3, 4)]
    moved = _moved(here, own, new, node.args[7])
    result.here.update(zip(paths, moved, strict=True))
    known = {node.args[3]: moved[0], node.args[4]: moved[1]}

    def value(batch: Tensor, each: fx.Node) -> object:
        if each is node.args[0]:
            return batch
        return known[each] if each in known else student(each)[0]

    return [call(node, lambda each, b=batch: value(b, each)) for batch in x]


def _moved(
    known: Sequence[Tensor], own: Sequence[Tensor], new: Sequence[Tensor], eps: float
) -> tuple[Tensor, Tensor]:
    """Known mean and variance, moved as samples' ones have moved."""
    scale = (known[1] + eps) / (own[1] + eps)
    mean = known[0] + (new[0] - own[0]) * scale.sqrt()
    return mean, (new[1] + eps) * scale - eps


def _largest(values: Values) -> float:
    return max(float(v.abs().max()) for v in values)
