"""Where the bytes went: per saved value, what autograd keeps and what the plan keeps."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.cost.sizes import Substitution, concrete
from graphopt.planning.problem import Problem
from graphopt.planning.saving import saved_values
from graphopt.planning.situation import Situation
from graphopt.report import ShareSite


def account(situation: Situation, problem: Problem) -> tuple[ShareSite, ...]:
    """One entry for each value that autograd saves or the plan keeps.

    Its rule is the rewrite that was applied to it; else `recompute` where memory-bound ops make
    it again, or `keep`.
    """
    kept = saved_values(problem)
    values, owners = problem.graph.values, {v: node for node, v in problem.value_of.items()}
    nodes = {node.name: node for node in situation.view.graph.nodes}
    sites, told = [], set()
    for site in situation.sites:
        ours = [nodes[name] for name in site.nodes]
        if ours[0] in told:
            continue
        told.update(ours)
        ids = [problem.value_of[node] for node in ours if node in problem.value_of]
        after = sum(values[v].bytes for v in ids if v in kept)
        before = (1 + site.merged) * _eager_bytes(ours[0], situation.sizes)
        sites.append(ShareSite(site.nodes[0], site.rule, before, after))
    needed = _needed(problem)
    for v in sorted(needed | kept):
        node = owners.get(v)
        if node is None or node in told:
            continue
        before = _eager_bytes(node, situation.sizes) if v in needed else 0
        rule, after = ("keep", values[v].bytes) if v in kept else ("recompute", 0)
        sites.append(ShareSite(node.name, rule, before, after))
    return tuple(sites)


def _needed(problem: Problem) -> set[int]:
    """What the backward pass reads of what forward made."""
    read = {v for task in problem.graph.tasks[problem.turn :] for v in task.inputs}
    return {v for v in read if problem.graph.values[v].producer < problem.turn}


def _eager_bytes(node: fx.Node, sizes: Substitution) -> int:
    """Bytes that autograd keeps of a value: on the CPU a dropout's mask has its input's type."""
    drawn = node.target is torch.ops.graphopt.dropout_mask.default
    value = (node.all_input_nodes[0] if drawn else node).meta["val"]
    return concrete(value.numel(), sizes) * value.element_size()
