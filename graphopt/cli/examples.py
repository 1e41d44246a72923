"""Example inputs for a module that was loaded from a file."""

from __future__ import annotations

from typing import Any

import torch


def example_inputs(module: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the sizes and types with which a module was captured.

    Floating inputs are standard normal draws from a fixed seed, all others are zeros.

    Args:
        module: An `OptimizedModule`.

    Returns:
        Positional and keyword inputs.
    """
    generator = torch.Generator().manual_seed(0)
    flat = [_example(leaf, generator) for leaf in module.program.signature.inputs]
    return module.program.signature.rebuild_call(flat)


def _example(leaf: Any, generator: torch.Generator) -> torch.Tensor:
    if leaf.dtype.is_floating_point:
        value = torch.randn(leaf.shape, generator=generator)
        return value.to(leaf.dtype).to(leaf.device).requires_grad_(leaf.requires_grad)
    return torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device)
