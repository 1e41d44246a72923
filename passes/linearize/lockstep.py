"""The model and its replaced twin side by side over all calibration batches, node by node.

Each node runs on every batch before the next node does, so that a site can be fitted to all of the
data with everything in front of it replaced already, in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt.passes.linearize.calibration import Reference, call, writes_to_values

Values = list[Any]  # of one node, one for each batch; a single one where it is the same for all
Known = Callable[[fx.Node], Values]
Step = Callable[[fx.Node, Known, Known], Values | None]


@torch.no_grad()
def lockstep(reference: Reference, step: Step) -> tuple[Values, Values]:
    """Run a graph twice at once: as it is (the teacher) and with changes (the student).

    While nothing is changed both have the same values, which are kept once.

    Args:
        reference: The graph and its inputs.
        step: Asked for the student's values of each call, given the call and functions that give
            the teacher's (of the call too) and the student's values of a node; None: as the graph
            says.

    Returns:
        The outputs of teacher and student for each batch.
    """
    count = len(reference.inputs)
    graph = reference.module.graph
    teacher: dict[fx.Node, Values] = {}
    student: dict[fx.Node, Values] = {}
    last_use = _last_uses(graph)
    placeholders = 0
    apart = writes_to_values(graph)  # then what one of the two writes, the other must not see
    for node in graph.nodes:
        if node.op == "placeholder":
            teacher[node] = student[node] = [batch[placeholders] for batch in reference.inputs]
            if apart:
                teacher[node], student[node] = _copies(teacher[node]), _copies(teacher[node])
            placeholders += 1
        elif node.op == "get_attr":
            teacher[node] = student[node] = [reference.attribute(node)]
            if apart:
                student[node] = [reference.attribute(node)]
        elif node.op == "output":
            (results,) = node.args
            both = (teacher, student)
            found = [[fx.map_arg(results, at(e, i)) for i in range(count)] for e in both]
            return found[0], found[1]
        else:
            teacher[node] = [call(node, at(teacher, i)) for i in range(count)]
            changed = step(node, teacher.__getitem__, student.__getitem__)
            if changed is not None:
                student[node] = changed
            elif not apart and all(student[n] is teacher[n] for n in node.all_input_nodes):
                student[node] = teacher[node]
            else:
                student[node] = [call(node, at(student, i)) for i in range(count)]
        for done in last_use.get(node, ()):
            del teacher[done], student[done]
    raise AssertionError("a graph ends with its output")


def _copies(values: Values) -> Values:
    return [value.clone() for value in values]


def at(values: dict[fx.Node, Values], index: int) -> Callable[[fx.Node], Any]:
    """The values of one batch."""

    def value(node: fx.Node) -> Any:
        found = values[node]
        return found[index] if len(found) > 1 else found[0]

    return value


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node the nodes whose values nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    found: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        found.setdefault(user, []).append(node)
    return found
