"""Finding a plan for a situation: costs, order, solver, and what to say where there is none."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import fx

from graphopt import solvers
from graphopt.cost.losses import Loss
from graphopt.cost.models import CostModel, cost_model
from graphopt.errors import BudgetInfeasible, user_line_of
from graphopt.pipeline import Progress, silent
from graphopt.planning.known import Known, known
from graphopt.planning.problem import Problem, live_at_peak
from graphopt.planning.rewrites import Way
from graphopt.planning.situation import Situation
from graphopt.planning.steps import StepNames
from graphopt.solvers import Solution, TaskGraph

# Durations are whole numbers to the solver: parts of the whole step.
_WHOLE = 10**9
# A plan that is proven to be within this share of the shortest step is not improved any more.
TOLERANCE = 5e-4
# The solver is compiled when it is first used on a machine, which is no part of the time limit.
_COMPILING_SECONDS = 60.0


@dataclass(frozen=True)
class PlanSettings:
    """How to plan.

    Attributes:
        budget: Bytes that a call may take at its peak, above parameters, gradients and inputs;
            None: no limit, but as little as possible is saved for backward.
        time_limit: Seconds that the search may take.
        seed: Of the search.
        cost_model: `flops`, `analytic` or `profiled`.
        loss: The loss; None for the default one.
        hold_outputs: Whether callers keep the outputs during backward.
        share: The budget as a share of the peak without recomputation, if it was asked for as
            one: after `.half()` a step has to fit the same share of what it takes then.
        way: How joint graphs are rewritten before they are planned.
    """

    budget: int | None
    time_limit: float = 60.0
    seed: int = 0
    cost_model: str = "flops"
    loss: Loss | None = field(default=None, compare=False)
    hold_outputs: bool = False
    share: float | None = None
    way: Way = field(default_factory=Way)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form, without the loss."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del plain["loss"]
        plain["way"] = self.way.to_dict()
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanSettings:
        """Reads what `to_dict` wrote."""
        return cls(**{**data, "way": Way.from_dict(data["way"])})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "loss": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, value)


@dataclass(frozen=True)
class Plan:
    """A sequence for one joint graph, and what is known about it.

    Attributes:
        sequence: Positions in `tasks`, in the order of execution.
        tasks: What each task of the problem does.
        differentiable: Positions of the outputs that get a gradient.
        fingerprint: Of the joint graph.
        budget: Bytes allowed when it was made.
        peak: Bytes predicted.
        status: As the solver says.
        overhead: Added duration, as a share of the step's.
        lower_bound: No plan within the budget adds less (within `scope`).
        recomputed_flops: FLOPs done more than once.
        step_flops: FLOPs of the step without recomputation.
        seconds: Time spent planning.
        scope: For which plans the bound holds.
        smallest: The smallest peak found.
        smallest_bound: No plan in any order has a smaller peak.
        obstacle: What is live at the smallest peak.
    """

    sequence: tuple[int, ...]
    tasks: tuple[StepNames, ...]
    differentiable: tuple[int, ...] | None
    fingerprint: str
    budget: int
    peak: int
    status: str
    overhead: float
    lower_bound: float
    recomputed_flops: int
    step_flops: int
    seconds: float
    scope: str
    smallest: int
    smallest_bound: int
    obstacle: str = ""

    @property
    def keeps_budget(self) -> bool:
        """Whether the predicted peak is within the budget."""
        return self.peak <= self.budget

    def without_recomputation(self, peak: int) -> Plan:
        """What is to be said of a step that runs as autograd runs it."""
        return dataclasses.replace(
            self, peak=peak, status="optimal", overhead=0.0, lower_bound=0.0, recomputed_flops=0
        )

    def infeasible(self, asked: int, smallest: int) -> BudgetInfeasible:
        """The error that says that no plan was found, and what would do.

        Args:
            asked: The budget in bytes.
            smallest: Measured bytes of the plan of least peak. The error names one per cent more:
                a search that is bounded in time does not find the very least plan every time.
        """
        return BudgetInfeasible(
            f"No plan keeps a peak of {asked:,} bytes.",
            field="memory",
            requested=asked,
            smallest=math.ceil(1.01 * smallest),
            obstacle=self.obstacle,
            proven=self.smallest_bound > asked,
            bound=self.smallest_bound,
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Reads what `to_dict` wrote."""
        tasks = tuple(StepNames.from_dict(task) for task in data["tasks"])
        used = data["differentiable"]
        return cls(
            **{
                **data,
                "sequence": tuple(data["sequence"]),
                "tasks": tasks,
                "differentiable": None if used is None else tuple(used),
            }
        )


class Search:
    """Plans of one situation, for one budget or several.

    Args:
        situation: The joint graph.
        problem: Its problem.
        settings: Time and seed; the budget is given with each question.
        progress: Told how the search goes.
    """

    def __init__(
        self,
        situation: Situation,
        problem: Problem,
        settings: PlanSettings,
        progress: Progress = silent,
    ) -> None:
        self.situation, self.problem = situation, problem
        self.settings, self.progress = settings, progress
        self.known: Known = known(problem.graph)

    @cached_property
    def order(self) -> list[int]:
        """The order of least peak before anything is recomputed."""
        if not solvers.prepare():
            self.progress("compiling the solver, once")
            solvers.prepare(_COMPILING_SECONDS)
        if self.known.order is None:
            self.progress("ordering the step")
            limit = min(10.0, 0.15 * self.settings.time_limit)
            found = solvers.reorder(self.problem.graph, time_limit=limit, seed=self.settings.seed)
            self.known.order = list(found)
        return self.known.order

    @cached_property
    def graph(self) -> TaskGraph:
        """The problem in that order."""
        return self.problem.graph.reordered(self.order)

    def plan(
        self, budget: int, *, start: Sequence[int] | None = None, time_limit: float | None = None
    ) -> Plan:
        """The best plan found in the time given; if none keeps the budget, that of least peak.

        Args:
            budget: Bytes.
            start: A sequence to begin with.
            time_limit: Seconds; default: the settings'.
        """
        start = start or self.known.best(budget)
        solution = solvers.solve(
            self.graph,
            budget,
            time_limit=self.settings.time_limit if time_limit is None else time_limit,
            seed=self.settings.seed,
            on_progress=self._tell,
            start=None if start is None else self._in_order(start),
            tolerance=TOLERANCE,
        )
        if solution.peak > budget:
            solution = self._with_least(budget, solution)
        sequence = self._remembered(solution)
        return describe(self.situation, budget, self.problem, solution, sequence)

    def _in_order(self, sequence: Sequence[int]) -> list[int]:
        """The sequence in the indices of the reordered graph."""
        place = {task: position for position, task in enumerate(self.order)}
        return [place[task] for task in sequence]

    def _remembered(self, solution: Solution) -> tuple[int, ...]:
        """The solution's sequence in the problem's own indices."""
        sequence = tuple(self.order[task] for task in solution.sequence)
        self.known.add(self.problem.graph, sequence)
        return sequence

    def _with_least(self, budget: int, solution: Solution) -> Solution:
        """The least peak decides whether a budget is infeasible, whatever the first search saw."""
        least = self.least
        if least.peak <= budget:
            return solvers.solve(
                self.graph,
                budget,
                time_limit=0.5 * self.settings.time_limit,
                seed=self.settings.seed,
                start=least.sequence,
                on_progress=self._tell,
                tolerance=TOLERANCE,
            )
        found = min(least, solution, key=lambda s: s.peak)
        return dataclasses.replace(found, min_peak=found.peak)

    @cached_property
    def least(self) -> Solution:
        """The plan of least peak."""
        self.progress("looking for the smallest budget")
        limit = min(20.0, max(2.0, self.settings.time_limit))
        found = solvers.minimise(self.graph, time_limit=limit, seed=self.settings.seed)
        self._remembered(found)
        return found

    def sweep(self, budgets: int | Sequence[int]) -> list[Plan]:
        """Plans by falling budget, each beginning with the one before; infeasible ones left out."""
        count = budgets if isinstance(budgets, int) else len(budgets)
        share = self.settings.time_limit / max(1, count)
        if isinstance(budgets, int):
            budgets = self._between(budgets)
        plans: list[Plan] = []
        for budget in sorted(budgets, reverse=True):
            start = plans[-1].sequence if plans else None
            plan = self.plan(budget, start=start, time_limit=share)
            if not plan.keeps_budget:
                break
            plans.append(plan)
        return plans

    def _between(self, count: int) -> list[int]:
        """Budgets from the peak without recomputation down to the smallest found."""
        most = solvers.check(self.graph, range(len(self.graph.tasks))).peak
        least = self.least.peak
        steps = max(1, count - 1)
        return [most - (most - least) * i // steps for i in range(count)]

    def _tell(self, state: Any) -> None:
        found = "no plan yet" if state.duration is None else f"gap {100 * state.gap:.2f} %"
        self.progress(f"planning, {state.phase}: {found}", None)


def make_problem(
    situation: Situation, settings: PlanSettings, progress: Progress = silent
) -> Problem:
    """The problem with durations of the chosen cost model."""
    model: CostModel = cost_model(settings.cost_model, symbols=situation.sizes)
    progress("measuring the ops")
    model.prepare(situation.computations)
    seconds = {node: model.seconds(node) for node in situation.computations}
    scale = _WHOLE / max(sum(seconds.values()), 1e-30)
    return situation.problem(
        lambda node: round(seconds[node] * scale),
        progress=lambda done, total: progress("measuring the ops", done / max(1, total)),
    )


def predicted_peak(plan: Plan, problem: Problem) -> int | None:
    """Peak bytes of a plan on its graph at other sizes; None if the tasks are other ones."""
    place = {StepNames.of_step(step): task for task, step in enumerate(problem.steps)}
    if any(names not in place for names in plan.tasks):
        return None
    sequence = [place[plan.tasks[task]] for task in plan.sequence]
    found = solvers.check(problem.graph, sequence, order="free")
    return found.peak if found.ok else None


def describe(
    situation: Situation,
    budget: int,
    problem: Problem,
    solution: Solution,
    sequence: tuple[int, ...],
) -> Plan:
    """A solution as a plan of the situation it was found for."""
    flops = [sum(situation.flops(n) for n in step.nodes) for step in problem.steps]
    done, once = sum(flops[t] for t in sequence), sum(flops)
    base = max(1, problem.graph.duration)
    return Plan(
        sequence=sequence,
        tasks=tuple(StepNames.of_step(step) for step in problem.steps),
        differentiable=situation.differentiable,
        fingerprint=situation.fingerprint,
        budget=budget,
        peak=solution.peak,
        status=solution.status,
        overhead=solution.duration / base - 1,
        lower_bound=max(0.0, solution.lower_bound / base - 1),
        recomputed_flops=done - once,
        step_flops=once,
        seconds=solution.seconds,
        scope=solution.scope,
        smallest=solution.min_peak,
        smallest_bound=solvers.least_peak(problem.graph),
        obstacle=_obstacle(problem, sequence),
    )


def _obstacle(problem: Problem, sequence: Sequence[int]) -> str:
    """The largest values that are live where the plan peaks, and the scratch memory there."""
    live, scratch = live_at_peak(problem.graph, sequence)
    sizes = problem.graph.values
    owners = {value: node for node, value in problem.value_of.items()}
    largest = sorted(live, key=lambda v: -sizes[v].bytes)[:4]
    named = [f"{_place(owners[v])} ({sizes[v].bytes:,} B)" for v in largest if v in owners]
    if scratch > min((sizes[v].bytes for v in largest), default=0):
        named.append(f"scratch memory of the op that runs then ({scratch:,} B)")
    return "live together: " + ", ".join(named) if named else ""


def _place(node: fx.Node) -> str:
    """A value by its op, and by the module or the line of the user's that computes it."""
    maker = node.args[0] if node.target is operator.getitem else node
    meta = getattr(maker, "meta", {})
    stack = meta.get("nn_module_stack") or meta.get("fwd_nn_module_stack") or {}
    paths = [path for path, _ in stack.values() if path]
    where = paths[-1] if paths else user_line_of(maker)
    return f"{node.name} at {where}" if where else node.name
