"""The model and its replaced twin side by side over all calibration batches, node by node.

Each node runs on every batch before the next node does, so that a site can be fitted to all of the
data with everything in front of it replaced already, in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.aliases import writes_to_values
from graphopt.ir.interpret import Value, call, interpret
from graphopt.passes.linearize.calibration import Reference

Values = list[Any]  # of one node, one for each batch; a single one where it is the same for all
Known = Callable[[fx.Node], Values]
Step = Callable[[fx.Node, Known, Known], Values | None]


@dataclass(frozen=True)
class _Pair:
    teacher: Values
    student: Values


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
    apart = writes_to_values(graph)  # then what one of the two writes, the other must not see

    def attribute(node: fx.Node) -> _Pair:
        values = [reference.attribute(node)]
        return _Pair(values, [reference.attribute(node)] if apart else values)

    def run(node: fx.Node, value: Callable[[fx.Node], _Pair]) -> _Pair:
        own = [call(node, _at(lambda n: value(n).teacher, i)) for i in range(count)]
        changed = step(
            node, lambda n: own if n is node else value(n).teacher, lambda n: value(n).student
        )
        if changed is not None:
            return _Pair(own, changed)
        read = [value(n) for n in node.all_input_nodes]
        if not apart and all(each.student is each.teacher for each in read):
            return _Pair(own, own)
        return _Pair(own, [call(node, _at(lambda n: value(n).student, i)) for i in range(count)])

    given = [_given(list(each), apart) for each in zip(*reference.inputs, strict=True)]
    results = interpret(graph, given, attribute, run)
    sides = ("teacher", "student")
    found = [[[_picked(each, s, i) for each in results] for i in range(count)] for s in sides]
    return found[0], found[1]


def _given(values: Values, apart: bool) -> _Pair:
    if not apart:
        return _Pair(values, values)
    return _Pair([v.clone() for v in values], [v.clone() for v in values])


def _at(known: Known, index: int) -> Value:
    """The values of one batch."""
    return lambda node: of_batch(known(node), index)


def of_batch(values: Values, index: int) -> Any:
    """One batch's value of a node."""
    return values[index] if len(values) > 1 else values[0]


def _picked(result: Any, side: str, index: int) -> Any:
    """One of the graph's results, of one batch."""
    return of_batch(getattr(result, side), index) if isinstance(result, _Pair) else result
