"""Where the bytes went: per saved value, what autograd keeps and what the plan keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from graphopt.cost.sizes import Substitution, concrete
from graphopt.measure import StepMeasurement
from graphopt.planning.problem import Problem
from graphopt.planning.rewrites import Way
from graphopt.planning.situation import Situation
from graphopt.report import ShareReport, ShareSite


def share_report(
    before: StepMeasurement,
    after: StepMeasurement,
    way: Way,
    situation: Situation,
    problem: Problem,
    sequence: Sequence[int],
) -> ShareReport:
    """The section `share` of a planned step.

    Args:
        before: The source model's step.
        after: The planned one.
        way: How the joint graph was rewritten.
        situation: The joint graph.
        problem: Its tasks.
        sequence: The plan.
    """
    return ShareReport(
        saved_before=before.saved,
        saved_after=after.saved,
        peak_before=before.peak,
        peak_after=after.peak,
        gradient_error=way.gradient_error,
        gradient_cosine=way.gradient_cosine,
        sites=account(situation, problem, sequence),
        refused=(*situation.refused, *way.refused),
    )


def account(
    situation: Situation, problem: Problem, sequence: Sequence[int]
) -> tuple[ShareSite, ...]:
    """One entry for each value that autograd saves or the plan keeps.

    Its rule is the rewrite that was applied to it; else `recompute` where the plan makes it again,
    or `keep`.

    Args:
        situation: The joint graph.
        problem: Its tasks.
        sequence: The plan.
    """
    kept = kept_values(problem, sequence)
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
    needed = kept_values(problem, range(len(problem.graph.tasks)))
    for v in sorted(needed | kept):
        node = owners.get(v)
        if node is None or node in told:
            continue
        before = _eager_bytes(node, situation.sizes) if v in needed else 0
        rule, after = ("keep", values[v].bytes) if v in kept else ("recompute", 0)
        sites.append(ShareSite(node.name, rule, before, after))
    return tuple(sites)


def kept_values(problem: Problem, sequence: Sequence[int]) -> frozenset[int]:
    """The values that a plan hands over from forward to backward: made before the turn, read after.

    In the order of the tasks these are the values that autograd would save.
    """
    turn = list(sequence).index(problem.turn) if problem.turn in sequence else len(sequence)
    made: set[int] = set()
    kept: set[int] = set()
    for task in sequence[turn:]:
        kept.update(v for v in problem.graph.tasks[task].inputs if v not in made)
        made.update(problem.graph.tasks[task].outputs)
    return frozenset(kept)


def _eager_bytes(node: fx.Node, sizes: Substitution) -> int:
    """Bytes that autograd keeps of a value: on the CPU a dropout's mask has its input's type."""
    drawn = node.target is torch.ops.graphopt.dropout_mask.default
    value = (node.all_input_nodes[0] if drawn else node).meta["val"]
    return concrete(value.numel(), sizes) * value.element_size()
