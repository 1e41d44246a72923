"""From a captured model to what runs and explains it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.ir.graphs import lookup
from graphopt.ir.module import OptimizedModule
from graphopt.passes.relevance.options import Options
from graphopt.passes.relevance.planning import make_plan
from graphopt.passes.relevance.prepare import prepared
from graphopt.passes.relevance.target import explained_outputs
from graphopt.passes.relevance.tracing import Explainer


def explainer_of(
    model: OptimizedModule, options: Options, example: Sequence[Tensor]
) -> tuple[Explainer, tuple[str, ...]]:
    """What runs a model and explains it, and the names of the tensors that it takes.

    Args:
        model: The captured model.
        options: How it is explained.
        example: Flat example inputs, at least two samples.
    """
    program = model.program
    signature = program.signature
    if program.eval_module is not None and program.eval_signature is not None:
        signature = program.eval_signature
    graph = prepared(program.specialize(training=False))
    names = tuple({str(n.target): None for n in graph.find_nodes(op="get_attr")})
    tensors = {name: lookup(model, name) for name in names}
    choose = functools.partial(explained_outputs, options.target, signature=signature)
    plan = make_plan(graph, tensors, example, options.composite, options.attribute, choose)
    return Explainer(plan, signature, options.target, options.explicit), names


def doubled(flat: Sequence[Tensor]) -> list[Tensor]:
    """Example inputs with at least two samples."""
    sizes = [t.shape[0] for t in flat if t.ndim]
    if not sizes or max(sizes) > 1:
        return list(flat)
    return [torch.cat([t, t]) if t.ndim else t for t in flat]
