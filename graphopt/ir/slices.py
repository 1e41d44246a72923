"""Which places of a source model's tensors a pruned program has, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.ir.graphs import lookup

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule

Kept = Mapping[int, tuple[int, ...]]
"""Axis -> the places that are kept, rising."""


@dataclass(frozen=True)
class Slices:
    """The slices of the source's tensors that a program holds.

    Attributes:
        kept: Name in the ``state_dict`` (or path of a constant) -> axis -> places.
        shapes: The same names -> full shape.
        full: The source's program with its buffers and without its parameters' values, or None
            where it is not known (a loaded program).
    """

    kept: Mapping[str, Kept]
    shapes: Mapping[str, tuple[int, ...]]
    full: OptimizedModule | None = field(default=None, repr=False, compare=False)

    def narrow(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state of the source as one of the pruned model.

        Args:
            state: Tensors by name; those that have the pruned size already stay.
        """
        return {
            name: self._narrowed(name, value) if self._is_full(name, value) else value
            for name, value in state.items()
        }

    def widen(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state of the pruned model as one of the source, with zeros for what was removed.

        Args:
            state: Tensors by name.
        """
        return {
            name: self.put(name, value, value.new_zeros(self.shapes[name]))
            if name in self.kept
            else value
            for name, value in state.items()
        }

    def put(self, name: str, small: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
        """The full tensor with the values of the small one in their places."""
        kept = self.kept[name]
        grid = [
            torch.tensor(kept.get(axis, tuple(range(size))), device=full.device)
            for axis, size in enumerate(full.shape)
        ]
        return full.index_put(torch.meshgrid(*grid, indexing="ij"), small)  # type: ignore[arg-type]

    def after(self, earlier: Slices | None) -> Slices:
        """These slices of a program that held slices itself, as slices of the source."""
        if earlier is None:
            return self
        names = [*earlier.kept, *(name for name in self.kept if name not in earlier.kept)]
        kept = {n: _composed(earlier.kept.get(n, {}), self.kept.get(n, {})) for n in names}
        return Slices(kept, {**self.shapes, **earlier.shapes}, earlier.full)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        kept = {
            name: {str(axis): list(places) for axis, places in axes.items()}
            for name, axes in self.kept.items()
        }
        return {"kept": kept, "shapes": {n: list(shape) for n, shape in self.shapes.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Slices:
        """Reads what `to_dict` wrote."""
        kept = {
            name: {int(axis): tuple(places) for axis, places in axes.items()}
            for name, axes in data["kept"].items()
        }
        return cls(kept, {name: tuple(shape) for name, shape in data["shapes"].items()})

    def _is_full(self, name: str, value: Any) -> bool:
        return name in self.kept and tuple(getattr(value, "shape", ())) == self.shapes[name]

    def _narrowed(self, name: str, value: torch.Tensor) -> torch.Tensor:
        for axis, places in self.kept[name].items():
            value = value.index_select(axis, torch.tensor(places, device=value.device))
        return value


def _composed(first: Kept, second: Kept) -> dict[int, tuple[int, ...]]:
    """Places of places."""
    result = dict(first)
    for axis, places in second.items():
        before = first.get(axis)
        result[axis] = places if before is None else tuple(before[place] for place in places)
    return result


def masked_twin(module: OptimizedModule) -> OptimizedModule:
    """The full-size model with the pruned module's present weights, and zeros for what is gone.

    Args:
        module: A pruned module.

    Raises:
        UnsupportedError: Nothing was pruned, or the source's program is not known.
    """
    slices = module.program.slices
    if slices is None:
        raise UnsupportedError("nothing was pruned", hint="the module is its own masked twin")
    if slices.full is None:
        raise UnsupportedError(
            "a masked twin of a loaded module: files don't keep the source's graph",
            hint="`program.slices.widen(state_dict)` gives the full weights for the source model",
        )
    twin = copy.deepcopy(slices.full)
    made: dict[int, torch.Tensor] = {}
    for name, owner, key in _tensors(twin):
        small = lookup(module, name)
        if id(small) not in made:
            made[id(small)] = _grown(slices, name, small, lookup(twin, name))
        _set(owner, key, made[id(small)])
    twin.train(module.training)
    return twin


def _grown(slices: Slices, name: str, small: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    value = small.detach().clone()
    if name in slices.kept:
        room = full.detach() if full.device == small.device else small.new_zeros(full.shape)
        value = slices.put(name, value, room.to(small.dtype))
    if isinstance(full, nn.Parameter):
        return nn.Parameter(value, requires_grad=small.requires_grad)
    return value


def _tensors(module: nn.Module) -> Iterable[tuple[str, nn.Module, str]]:
    """All tensors of a tree: name, owner, key."""
    for path, owner in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = (owner._parameters, owner._buffers, vars(owner))
        for table in own:
            for key, value in list(table.items()):
                if isinstance(value, torch.Tensor):
                    yield prefix + key, owner, key


def _set(owner: nn.Module, key: str, tensor: torch.Tensor) -> None:
    for table in (owner._parameters, owner._buffers, vars(owner)):
        if key in table:
            table[key] = tensor  # type: ignore[index]


def blank(program_module: OptimizedModule) -> OptimizedModule:
    """A copy of a module without the memory of its parameters."""
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in program_module.parameters()
    }
    memo: dict[int, Any] = dict(empty)
    return copy.deepcopy(program_module, memo)
