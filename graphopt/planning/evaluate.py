"""Values of a joint graph's forward pass on real inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import fill, held_by
from graphopt.ir.randomness import kept_random_state, seed_torch
from graphopt.planning.situation import Situation


def forward_values(
    situation: Situation,
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    wanted: Iterable[fx.Node],
    *,
    seed: int = 0,
) -> dict[fx.Node, torch.Tensor]:
    """Runs what some nodes of the forward pass depend on.

    Args:
        situation: The joint graph.
        module: Whose parameters and buffers are read.
        inputs: Flat inputs.
        wanted: The nodes.
        seed: Of all random draws.

    Returns:
        Their values; the module and the random state stay as they were.
    """
    wanted = set(wanted)
    needed, waiting = set(wanted), list(wanted)
    while waiting:
        fresh = set(waiting.pop().all_input_nodes) - needed
        needed |= fresh
        waiting += fresh
    values: dict[fx.Node, Any] = {}
    for joint_input in situation.view.inputs:
        if joint_input.kind == "input":
            values[joint_input.node] = inputs[int(joint_input.name)].detach()
        elif joint_input.kind != "tangent":
            values[joint_input.node] = lookup(module, joint_input.name).detach()
    with kept_random_state(), torch.no_grad():
        seed_torch(seed)
        nodes = [node for node in situation.view.graph.nodes if node in needed]
        fill(values, nodes, held_by(situation.view.module))
    return {node: values[node] for node in wanted}
