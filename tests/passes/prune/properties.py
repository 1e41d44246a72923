"""Properties that pruning has on any model, each stated from outside the code under test."""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import graphopt
from graphopt.ir.program import Program
from graphopt.passes.prune.analysis import Analysis, Slot, analyse
from graphopt.passes.prune.dimensions import Dimensions
from graphopt.passes.prune.rewrite import pruned
from graphopt.passes.prune.rule import Value
from tests.passes.prune.generated import INPUTS, Recipe, built
from tests.zoo import probe_loss

EXACT = 1e-10
"""Relative to the largest element of an output, in double precision."""

Places = Mapping[str, Mapping[int, tuple[int, ...]]]
"""Parameter -> axis -> places that stay, where not all do."""


@dataclass
class Subject:
    """A model, and what the analysis says of it."""

    model: nn.Module
    x: Tensor
    more: Tensor

    @cached_property
    def program(self) -> Program:
        """The captured graph, canonical."""
        module = graphopt.optimize(
            self.model, passes="canonicalize", example_inputs=(self.x,), verify=False
        )
        assert isinstance(module.program, Program)
        return module.program

    @cached_property
    def analysis(self) -> Analysis:
        """Its units."""
        return analyse(self.program)

    @cached_property
    def dimensions(self) -> Dimensions:
        """Its prunable dimensions."""
        return Dimensions(self.analysis)

    def pruned(self, removed: frozenset[int]) -> Program:
        """The program without some units."""
        return pruned(self.program, self.analysis, removed)

    def with_model(self, model: nn.Module) -> Subject:
        """The same of another model."""
        return Subject(model, self.x, self.more)


def subject(recipe: Recipe) -> Subject:
    """The model of a recipe, in double precision."""
    model, x = built(recipe)
    more = INPUTS[recipe.start](3)
    return Subject(model, x, more.to(x.dtype))


def some(dimensions: Dimensions, seed: int) -> frozenset[int]:
    """Units to remove: some of each dimension, never all."""
    draw = random.Random(seed)
    return dimensions.removed(
        draw.sample(each.units, draw.randint(1, each.width)) for each in dimensions.all
    )


def outputs(module: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs."""
    with torch.no_grad():
        return tree_leaves(module(x))


def distance(got: Iterable[Tensor], want: Iterable[Tensor]) -> float:
    """The largest difference, relative to the largest element of its output."""
    pairs = list(zip(got, want, strict=True))
    assert all(a.shape == b.shape and b.isfinite().all() for a, b in pairs)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-3)) for a, b in pairs)


def kept(analysis: Analysis, removed: frozenset[int]) -> Places:
    """The places of parameters that stay."""
    every = {s.path: analysis.kept(s, removed) for s in analysis.slots.values() if s.is_trained}
    return {path: axes for path, axes in every.items() if axes}


def zeroed(model: nn.Module, places: Places) -> nn.Module:
    """The source's own code, with zeros by hand wherever nothing is kept."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path, axes in places.items():
            parameter = model.get_parameter(path)
            for axis, stay in axes.items():
                gone = sorted(set(range(parameter.shape[axis])) - set(stay))
                parameter.index_fill_(axis, torch.tensor(gone), 0.0)
    return model


def check_masked(it: Subject, seed: int) -> None:
    """What is left computes what the masked network does, also for another batch size."""
    removed = some(it.dimensions, seed)
    places = kept(it.analysis, removed)
    module, twin = it.pruned(removed).emit().eval(), zeroed(it.model, places)
    for x in (it.x, it.more):
        assert distance(outputs(module, x), outputs(twin, x)) <= EXACT
    for name, parameter in module.named_parameters():
        full = it.model.get_parameter(name).shape
        want = [len(places.get(name, {}).get(i, range(n))) for i, n in enumerate(full)]
        assert list(parameter.shape) == want


def check_keep_all(it: Subject, seed: int) -> None:
    """With nothing removed every bit stays as captured."""
    module, source = it.pruned(frozenset()).emit().eval(), it.program.emit().eval()
    for got, want in zip(outputs(module, it.x), outputs(source, it.x), strict=True):
        assert torch.equal(got, want)
    assert distance(outputs(module, it.x), outputs(it.model, it.x)) <= EXACT


def check_zero_invariance(it: Subject, seed: int) -> None:
    """Units that are zero beforehand can be removed from the model, and nothing changes."""
    removed = some(it.dimensions, seed)
    places = kept(it.analysis, removed)
    zero = it.with_model(zeroed(it.model, places))
    assert kept(zero.analysis, removed) == places, "weights don't matter to what is coupled"
    module = zero.pruned(removed).emit().eval()
    assert distance(outputs(module, it.x), outputs(zero.model, it.x)) <= EXACT


def check_union(it: Subject, seed: int) -> None:
    """To prune twice is to prune the union."""
    first, second = some(it.dimensions, seed), some(it.dimensions, seed + 1)
    both = it.dimensions.removed(
        set(d.units) - first - second or d.units for d in it.dimensions.all
    )
    first = it.analysis.spared(first & both)
    once = it.pruned(first)
    analysis = analyse(once)
    again = _units_at(it, analysis, first, both)
    twice, union = pruned(once, analysis, again).emit().eval(), it.pruned(both).emit().eval()
    want = {name: p.shape for name, p in union.named_parameters()}
    assert {name: p.shape for name, p in twice.named_parameters()} == want
    assert distance(outputs(twice, it.x), outputs(union, it.x)) <= EXACT


def _units_at(
    it: Subject, analysis: Analysis, first: frozenset[int], both: frozenset[int]
) -> frozenset[int]:
    """Units of a pruned program of which no place stays when the union is removed."""
    stays, found = set(), set()
    by_path = {slot.path: slot for slot in it.analysis.slots.values()}
    for slot in analysis.slots.values():
        old = by_path.get(slot.path)
        if old is None:
            continue
        for now, then in zip(slot.value.axes, old.value.axes, strict=True):
            left = it.analysis.units.kept(then, first)
            mask = it.analysis.units.kept(then, both)[left]
            found |= analysis.units.units_of(now)
            stays |= analysis.units.units_of(now[mask])
    return frozenset(found - stays)


def check_permuted(it: Subject, seed: int) -> None:
    """The order of units does not matter: permuted in the source, others are kept alike."""
    draw = random.Random(seed)
    swapped: dict[int, int] = {}
    for dimension in _plain(it):
        units = list(dimension)
        swapped.update(zip(units, draw.sample(units, len(units)), strict=True))
    model = copy.deepcopy(it.model)
    with torch.no_grad():
        for slot in it.analysis.slots.values():
            _permute(it, slot, model, swapped)
    assert distance(outputs(model, it.x), outputs(it.model, it.x)) <= EXACT
    removed = some(it.dimensions, seed)
    other = it.with_model(model)
    moved = frozenset(swapped.get(u, u) for u in removed)
    one, two = it.pruned(removed).emit().eval(), other.pruned(moved).emit().eval()
    assert distance(outputs(two, it.x), outputs(one, it.x)) <= EXACT


def _plain(it: Subject) -> list[tuple[int, ...]]:
    """Dimensions whose units are alike everywhere.

    In parameters each has at most one place in any axis, for itself; elsewhere an axis has all of
    them or none (of parts that are cut out, one may be read and the other not).
    """
    several: set[int] = set()
    for slot in it.analysis.slots.values():
        for labels in slot.value.axes:
            count: Counter[int] = Counter()
            for label in it.analysis.units.canonical(labels).tolist():
                members = it.analysis.units.members(label)
                count.update(members)
                several.update(members if len(members) > 1 else ())
            several.update(u for u, n in count.items() if n > 1)
    tensors = tree_leaves(list(it.analysis.values.values()))
    axes = [labels for v in tensors if isinstance(v, Value) for labels in v.axes]
    found = [it.analysis.units.units_of(labels) for labels in axes if labels.any()]
    return [
        d.units for d in it.dimensions.all
        if not several & set(d.units)
        and all(len(units & set(d.units)) in (0, d.width) for units in found)
    ]  # fmt: skip


def _permute(it: Subject, slot: Slot, model: nn.Module, swapped: Mapping[int, int]) -> None:
    names = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for axis, labels in enumerate(slot.value.axes):
        now = it.analysis.units.canonical(labels).tolist()
        place = {label: i for i, label in enumerate(now)}
        order = [place[swapped[label]] if label in swapped else i for i, label in enumerate(now)]
        if order != list(range(len(now))):
            target = torch.from_numpy(np.array(order))
            tensor = names[slot.path]
            tensor.copy_(torch.empty_like(tensor).index_copy_(axis, target, tensor.clone()))


def check_trained(it: Subject, seed: int) -> None:
    """After a step of training it still is the masked network, equally trained."""
    removed = some(it.dimensions, seed)
    places = kept(it.analysis, removed)
    module, twin = it.pruned(removed).emit(), zeroed(it.model, places)
    for each in (module, twin):
        each.eval()
        probe_loss(each(it.x)).backward()
    want = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    if not all(g.isfinite().all() for g in want.values()):
        return
    scale = max(float(g.abs().max()) for g in want.values())
    for name, parameter in module.named_parameters():
        if parameter.grad is None:
            assert name not in want or not want[name].any()
            continue
        expected = want[name]
        for axis, stay in places.get(name, {}).items():
            expected = expected.index_select(axis, torch.tensor(stay))
        assert float((parameter.grad - expected).abs().max()) <= 1e-9 * scale, name
    with torch.no_grad():
        for each in (module, twin):
            for parameter in each.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 / scale * parameter.grad
    twin = zeroed(twin, places)
    assert distance(outputs(module, it.x), outputs(twin, it.x)) <= EXACT * 100


def check_exported(it: Subject, seed: int) -> None:
    """`torch.export` takes the result."""
    module = it.pruned(some(it.dimensions, seed)).emit().eval()
    again = torch.export.export(module, (it.x,)).module()
    assert distance(outputs(again, it.x), outputs(module, it.x)) <= EXACT


def check_saved(module: graphopt.OptimizedModule, x: Tensor, path: Path) -> None:
    """What was saved and loaded gives the same bits."""
    module.save(path)
    again = graphopt.load(path)
    assert all(
        torch.equal(a, b) for a, b in zip(outputs(again, x), outputs(module, x), strict=True)
    )
    assert again.report.to_dict() == module.report.to_dict()
