"""What a linearized module should compute, worked out without its graph.

The source model runs as it is, in Python; calls of non-linearities are caught in their order, and
each mixes the call's own result with a polynomial by a mask, from what the module's state says.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CAUGHT = frozenset(
    """relu relu_ relu6 hardtanh clamp leaky_relu prelu abs gelu silu sigmoid tanh hardswish
    hardsigmoid elu max_pool1d max_pool2d max_pool3d""".split()
)


class Blended(TorchFunctionMode):
    """Runs every non-linearity that it meets as the report and the state say.

    Args:
        module: A linearized module.
        block: First and last-plus-one dimension of the fixed places, negative ones from the end.
        channel: The dimension that has channels.
    """

    def __init__(self, module: Any, block: tuple[int, int | None], channel: int) -> None:
        super().__init__()
        self.sites = module.report.to_dict()["linearize"]["sites"]
        self.state = dict(module.state_dict())
        self.own = module._graphopt
        self.block, self.channel, self.count = block, channel, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") not in CAUGHT:
            return func(*args, **kwargs)
        x = args[0]
        site = self.sites[self.count]
        self.count += 1
        before = x.clone()
        exact = func(*args, **kwargs)
        if site["choice"] == "keep":
            return exact
        result = self.mixed(site, before, exact, args[1:], kwargs)
        return x.copy_(result) if exact is x else result

    def mixed(self, site: Any, x: Tensor, exact: Tensor, rest: Any, kwargs: Any) -> Tensor:
        coefficients = self.state.get(f"_graphopt.{site['node']}.coefficients")
        if site["op"] == "max_pool":
            pool = getattr(F, f"avg_pool{x.dim() - 2}d")
            x = pool(
                x, rest[0], rest[1] if len(rest) > 1 else kwargs.get("stride"),
                rest[2] if len(rest) > 2 else kwargs.get("padding", 0),
                kwargs.get("ceil_mode", False), count_include_pad=False,
            )  # fmt: skip
        replaced = x if coefficients is None else torch.zeros_like(x)
        if coefficients is not None:
            shape = [1] * x.dim()
            shape[self.channel] = coefficients.shape[1]
            for power, each in enumerate(coefficients):
                replaced = replaced + each.view(shape) * x**power
        if site["kept"] == 0:
            return replaced
        dims = list(range(x.dim()))[self.block[0] : self.block[1]]
        sizes = [x.shape[d] if d in dims else 1 for d in range(x.dim())]
        mask = torch.zeros(sizes, dtype=torch.bool).flatten()
        mask[getattr(self.own, site["node"]).kept] = True
        return torch.where(mask.view(sizes), exact, replaced)


@torch.no_grad()
def blended(
    model: nn.Module, module: Any, *args: Any,
    block: tuple[int, int | None] = (1, None), channel: int = 1,
) -> Tensor:  # fmt: skip
    """The source's outputs with the replacements of the module."""
    twin = copy.deepcopy(model).eval()
    own = {k: v for k, v in module.state_dict().items() if not k.startswith("_graphopt.")}
    twin.load_state_dict(own)
    mode = Blended(module, block, channel)
    with mode:
        result: Tensor = twin(*args)
    assert mode.count == len(mode.sites)
    return result
