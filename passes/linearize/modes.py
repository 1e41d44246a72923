"""A program with two graphs, of training and of inference: which call is which."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from torch import fx

from graphopt.errors import UnsupportedError
from graphopt.ir.program import Program
from graphopt.passes.linearize.sites import Site, sites_of


def training_names(program: Program) -> Mapping[str, str]:
    """For each site of the inference graph, the name of the same call in the training graph.

    Both trace the same code but for what branches on ``self.training``, so that the sites come in
    the same order; each pair has to be the same op with the same numbers on values of one size.
    Sites that stay as they are may differ.

    Raises:
        UnsupportedError: The graphs have different non-linearities.
    """
    if program.eval_module is None:
        return {}
    found = {}
    free = (_free(program.eval_module), _free(program.module))
    for one, other in zip_longest(*free):
        if one is None or other is None or _call(one) != _call(other):
            first = one or other
            assert first is not None
            shown = [str(site.node.target) if site else "nothing" for site in (one, other)]
            raise UnsupportedError(
                f"linearizing a model whose non-linearities depend on self.training: {shown[0]} in "
                f"eval mode, {shown[1]} in training",
                node=first.node,
                hint="branch on an argument or a constant instead",
            )
        found[one.name] = other.name
    return found


def _free(module: fx.GraphModule) -> list[Site]:
    return [site for site in sites_of(module) if site.fixed is None]


def _call(site: Site) -> tuple[Any, ...]:
    """What two calls of one site have in common."""
    numbers = [a for a in site.node.args if not isinstance(a, fx.Node)]
    return site.node.target, site.shape, numbers, dict(site.node.kwargs)
