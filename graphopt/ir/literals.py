"""Literals of a graph that follow ``.half()`` and ``.to()``: dtypes, devices, constants.

Which ones follow is found by tracing a copy of the model in another dtype and on another device:
a literal that changed with the model is tied to a parameter or input, one that didn't is fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tie:
    """Where a literal's value comes from (``node.meta["ties"]``: argument place -> Tie).

    Attributes:
        source: Path of a parameter or buffer, or name of a placeholder.
        kind: ``dtype``, ``device``, ``device.type``, or ``finfo.min``/``max``/``eps``/``tiny``.
        input: Whether ``source`` is a placeholder.
    """

    source: str
    kind: str
    input: bool = False

    def render(self, source: str) -> str:
        """Python for the value, given Python for the source."""
        if self.kind.startswith("finfo."):
            return f"torch.finfo({source}.dtype){self.kind.removeprefix('finfo')}"
        return f"{source}.{self.kind}"

    def value(self, tensor: torch.Tensor) -> Any:
        """The literal's value for a source tensor."""
        if self.kind == "dtype":
            return tensor.dtype
        if self.kind == "device":
            return tensor.device
        if self.kind == "device.type":
            return tensor.device.type
        return getattr(torch.finfo(tensor.dtype), self.kind.removeprefix("finfo."))
