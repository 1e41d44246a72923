"""Low-rank adapters on the matrices of a module, for as long as it is trained."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Adapted(nn.Module):
    """A module that computes with ``W + B A`` in place of each of some matrices W.

    B starts at zero, so that nothing changes at first (LoRA; Hu et al. 2021). Kernels of
    convolutions are matrices with one row for each output channel.

    Attributes:
        base: The module; its own parameters are not changed before `merge`.
        names: The parameters that have adapters.
    """

    def __init__(self, base: nn.Module, names: Sequence[str], rank: int, seed: int) -> None:
        """Put adapters beside parameters of a module.

        Args:
            base: The module.
            names: Parameters of two dimensions or more.
            rank: Of the adapters.
            seed: Of A.
        """
        super().__init__()
        self.base, self.names = base, tuple(names)
        call = functools.partial(self._adapted)
        self.forward = functools.update_wrapper(call, base.forward)  # of its signature
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for name in names:
            rows = base.get_parameter(name).flatten(1)
            drawn = torch.randn(rank, rows.shape[1], generator=generator) / rows.shape[1] ** 0.5
            self.down.append(nn.Parameter(drawn.to(rows)))
            self.up.append(nn.Parameter(rows.new_zeros(rows.shape[0], rank)))

    def _adapted(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives with its adapters."""
        return functional_call(self.base, self._merged(), args, kwargs)

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapters to the matrices of the module."""
        for name, value in self._merged().items():
            self.base.get_parameter(name).copy_(value)

    def _merged(self) -> dict[str, Tensor]:
        parts = zip(self.names, self.down, self.up, strict=True)
        found = {}
        for name, down, up in parts:
            matrix = self.base.get_parameter(name).detach()
            found[name] = matrix + (up @ down).view_as(matrix)
        return found
