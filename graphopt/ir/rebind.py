"""A program over other tensors than its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from graphopt.ir.graphs import bind_graph, copy_graph
from graphopt.ir.program import Program
from graphopt.ir.skeleton import copy_tree


def with_replaced(program: Program, replaced: Mapping[int, Any]) -> Program:
    """The program with other parameters, buffers and constants in place of some of its own.

    Args:
        program: The program; it is not changed.
        replaced: Identity of a tensor -> what stands in its place, under all of its names.
    """
    root = copy_tree(program.skeleton.root, type(program.skeleton.root), replaced)

    def rebound(module: fx.GraphModule | None) -> fx.GraphModule | None:
        return None if module is None else bind_graph(copy_graph(module), root)

    module = rebound(program.module)
    assert module is not None
    return program.replace(
        module=module,
        eval_module=rebound(program.eval_module),
        skeleton=program.skeleton.rebuilt(root),
    )
