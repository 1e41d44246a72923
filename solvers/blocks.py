"""Repeated blocks: tasks that look alike, so that one move can treat them alike."""

from __future__ import annotations

import numpy as np

from graphopt.solvers.arrays import Array
from graphopt.solvers.graph import TaskGraph


def task_classes(graph: TaskGraph, depth: int = 2) -> Array:
    """A class per task: equal for tasks that agree in figures and surroundings.

    Colours are refined `depth` times by the colours of producers and users (Weisfeiler-Lehman),
    which tells the places inside a block apart but not one repetition of the block from another.

    Args:
        graph: the task graph.
        depth: how far the surroundings reach.
    """
    users: list[list[int]] = [[] for _ in graph.values]
    for index, task in enumerate(graph.tasks):
        for value in dict.fromkeys(task.inputs):
            users[value].append(index)
    colours: list[object] = [
        (
            task.duration,
            task.workspace,
            task.recomputable,
            tuple(graph.values[v].bytes for v in task.outputs),
            len(task.inputs),
        )
        for task in graph.tasks
    ]
    numbers = _number(colours)
    for _ in range(depth):
        colours = [
            (
                numbers[index],
                tuple(sorted(numbers[graph.values[v].producer] for v in task.inputs)),
                tuple(sorted(numbers[user] for v in task.outputs for user in users[v])),
            )
            for index, task in enumerate(graph.tasks)
        ]
        numbers = _number(colours)
    return np.array(numbers, np.int64)


def _number(colours: list[object]) -> list[int]:
    index: dict[object, int] = {}
    return [index.setdefault(colour, len(index)) for colour in colours]
