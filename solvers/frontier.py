"""The smallest peak, and the whole curve of duration over budget."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from graphopt.solvers.arrays import to_arrays
from graphopt.solvers.check import check
from graphopt.solvers.cover import working_set
from graphopt.solvers.graph import TaskGraph, TaskGraphError
from graphopt.solvers.order import reorder
from graphopt.solvers.solution import OnProgress, Solution
from graphopt.solvers.solve import solve


def minimise(
    graph: TaskGraph,
    *,
    order: str = "input",
    time_limit: float = 60.0,
    step_limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    trials: int = 8,
) -> Solution:
    """Finds the plan of smallest peak, by bisection over budgets.

    Args:
        graph: what to run.
        order: "input" or "free", as in `solve`.
        time_limit: seconds, over all trials.
        step_limit: counted steps over all trials, see `solve`.
        seed: of all random choices.
        on_progress: see `solve`.
        trials: how many budgets to try.

    Returns:
        The plan; its `budget` is its peak. `min_peak_bound` is proven, and the status is "optimal"
        if the peak reaches it; `lower_bound` bounds the duration under that budget.
    """
    began = time.perf_counter()
    low = bound = working_set(to_arrays(graph))
    best = solve(graph, max(bound, check(graph, range(len(graph.tasks))).peak), time_limit=1.0)
    target = bound
    for trial in range(trials):
        left = time_limit - (time.perf_counter() - began)
        if best.peak <= low or left < 0.05:
            break
        share = left / max(1, min(3, trials - trial))
        found = solve(
            graph, target, order=order, time_limit=share, seed=seed, on_progress=on_progress,
            step_limit=None if step_limit is None else max(1, step_limit // trials),
        )  # fmt: skip
        if found.peak < best.peak or (found.peak == best.peak and found.duration < best.duration):
            best = found
        if found.status == "infeasible":
            low = max(low, target + 1)
            if found.proven_infeasible:
                bound = max(bound, found.min_peak_bound)
        target = (low + best.peak) // 2
    bound = min(bound, best.peak)
    return replace(
        best,
        budget=best.peak,
        min_peak=best.peak,
        min_peak_bound=bound,
        status="optimal" if best.peak <= bound else "feasible",
        gap=max(0.0, (best.duration - best.lower_bound) / max(1, best.duration)),
        seconds=time.perf_counter() - began,
    )


def frontier(
    graph: TaskGraph,
    budgets: Sequence[int] | int = 8,
    *,
    order: str = "input",
    time_limit: float = 60.0,
    step_limit: int | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> list[Solution]:
    """Solves for several budgets; a larger one never gets a longer plan.

    Args:
        graph: what to run.
        budgets: bytes; or how many, spread between the smallest peak found and that of the order.
        order: "input" or "free"; a free order is found once, for all budgets.
        time_limit: seconds, over all budgets.
        step_limit: counted steps over all budgets, see `solve`.
        seed: of all random choices.
        on_progress: see `solve`.

    Returns:
        One solution a budget, in the order of `budgets` (descending if they are counted).

    Raises:
        TaskGraphError: there is nothing to solve.
    """
    began = time.perf_counter()
    found_order, problem = list(range(len(graph.tasks))), graph
    if order == "free":
        found_order = reorder(graph, time_limit=min(15.0, 0.15 * time_limit), seed=seed)
        problem = graph.reordered(found_order)
    peak = check(problem, range(len(graph.tasks))).peak
    if isinstance(budgets, int):
        if budgets < 1:
            raise TaskGraphError(f"a frontier needs at least one budget, not {budgets}")
        least = minimise(problem, time_limit=0.25 * time_limit, step_limit=step_limit, seed=seed)
        step = (peak - least.peak) / max(1, budgets - 1)
        budgets = [round(peak - i * step) for i in range(budgets - 1)] + [least.peak]
    if not budgets:
        raise TaskGraphError("a frontier needs at least one budget")
    answers: dict[int, Solution] = {}
    start: tuple[int, ...] | None = None
    ascending = sorted({int(budget) for budget in budgets})
    for place, budget in enumerate(ascending):
        left = time_limit - (time.perf_counter() - began)
        answers[budget] = solve(
            problem, budget, time_limit=max(0.1, left / (len(ascending) - place)), seed=seed,
            step_limit=None if step_limit is None else max(1, step_limit // len(ascending)),
            on_progress=on_progress, start=start,
        )  # fmt: skip
        start = answers[budget].sequence
    if order == "free":
        answers = {b: _in_original(graph, found_order, s) for b, s in answers.items()}
    return [answers[int(budget)] for budget in budgets]


def _in_original(graph: TaskGraph, order: list[int], found: Solution) -> Solution:
    """A solution for the reordered problem, told in the original indices."""
    bound = graph.duration
    return replace(
        found,
        sequence=tuple(order[task] for task in found.sequence),
        order="free",
        lower_bound=bound,
        gap=max(0.0, (found.duration - bound) / max(1, found.duration)),
        status="feasible" if found.status == "optimal" and found.duration > bound else found.status,
        scope="any plan in any order",
        min_peak_bound=min(working_set(to_arrays(graph)), found.min_peak),
    )
