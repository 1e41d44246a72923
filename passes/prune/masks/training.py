"""Training a masked module further: what is masked stays zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from graphopt.errors import UnsupportedError, UsageError
from graphopt.ir.module import OptimizedModule


def keep_masked(optimizer: torch.optim.Optimizer, module: OptimizedModule) -> RemovableHandle:
    """Set what a module's masks don't keep to zero again after every step of an optimizer.

    With momentum or weight decay in it, a step moves weights whose gradient is zero, so that the
    weights are masked and not their gradients.

        with keep_masked(optimizer, module):
            for images, labels in loader:
                ...
                optimizer.step()

    Args:
        optimizer: Any optimizer of `torch.optim` over the module's parameters.
        module: A module that `sparsify` masked.

    Returns:
        The handle of the hook: leave its context or call ``remove()`` to end it.

    Raises:
        UnsupportedError: Nothing of the module is masked.
        UsageError: The optimizer has none of the masked parameters.
    """
    masks = module.program.masks
    if not masks:
        raise UnsupportedError("nothing of this module is masked", hint="see the pass sparsify")
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = [name for name, p in module.named_parameters() if name in masks and id(p) in trained]
    if not names:
        raise UsageError(
            "this optimizer has none of the masked parameters",
            hint="make it over the parameters of the masked module, not of its source",
        )
    gone: dict[str, Tensor] = {name: ~masks[name].kept for name in names}

    @torch.no_grad()
    def mask(*_: Any) -> None:
        for name in names:
            parameter = module.get_parameter(name)
            if gone[name].device != parameter.device:
                gone[name] = gone[name].to(parameter.device)
            parameter.masked_fill_(gone[name], 0)

    return optimizer.register_step_post_hook(mask)
