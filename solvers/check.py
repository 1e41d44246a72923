"""The independent checker: what a plan costs, computed straight from the definition.

It shares no code with the solver on purpose; keep it that way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.solvers.graph import TaskGraph


@dataclass(frozen=True)
class Check:
    """What a plan does.

    Attributes:
        peak: most bytes live at any step.
        duration: sum of the durations of all executions.
        errors: why the sequence is no valid plan; empty if it is one.
    """

    peak: int
    duration: int
    errors: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the sequence is a valid plan."""
        return not self.errors


def check(graph: TaskGraph, sequence: Sequence[int], *, order: str = "input") -> Check:
    """Peak, duration and validity of a plan.

    While task t runs at step k, live are: the instances of values with a use at a step >= k
    before their next production, all outputs of t, and the workspace of t. The last instance of
    a `keep` value lives to the end.

    Args:
        graph: the task graph.
        sequence: task indices, in the order of execution.
        order: "input" also demands that first executions follow the input order.
    """
    errors = _validity(graph, sequence, order)
    if any(not 0 <= task < len(graph.tasks) for task in sequence):
        return Check(0, 0, tuple(errors))
    sizes = [value.bytes for value in graph.values]
    live = {index for index, value in enumerate(graph.values) if value.keep}
    held = sum(sizes[value] for value in live)  # bytes of what lives after the step
    peak = 0
    for task in reversed(sequence):
        step = graph.tasks[task]
        inputs, outputs = set(step.inputs), set(step.outputs)
        extra = sum(sizes[value] for value in (inputs | outputs) - live)
        peak = max(peak, held + extra + step.workspace)
        held -= sum(sizes[value] for value in outputs & live)
        live -= outputs
        held += sum(sizes[value] for value in inputs - live)
        live |= inputs
    if live and not errors:
        errors.append(f"values {sorted(live)[:5]} are needed before anything produces them")
    duration = sum(graph.tasks[task].duration for task in sequence)
    return Check(peak, duration, tuple(errors))


def _validity(graph: TaskGraph, sequence: Sequence[int], order: str) -> list[str]:
    errors: list[str] = []
    first: dict[int, int] = {}
    produced: set[int] = set()
    for step, task in enumerate(sequence):
        if not 0 <= task < len(graph.tasks):
            errors.append(f"step {step}: there is no task {task}")
            continue
        missing = [value for value in graph.tasks[task].inputs if value not in produced]
        if missing:
            errors.append(f"step {step}: task {task} needs values {missing}, not produced yet")
        if task in first and not graph.tasks[task].recomputable:
            errors.append(f"step {step}: task {task} must run only once")
        first.setdefault(task, step)
        produced.update(graph.tasks[task].outputs)
    never = [task for task in range(len(graph.tasks)) if task not in first]
    if never:
        errors.append(f"tasks {never[:5]} never run")
    errors += [
        f"task {later} first runs before task {before}"
        for before, later in graph.after
        if first.get(before, -1) > first.get(later, len(sequence))
    ]
    if order == "input" and list(first) != sorted(first):
        errors.append("first executions do not follow the input order")
    return errors
