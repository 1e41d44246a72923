"""A Pareto sweep: what accuracy costs under several budgets, replacements and protocols."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from graphopt import registry
from graphopt.batches import MOST, check_data, read_batch
from graphopt.budget import Budget
from graphopt.errors import (
    BudgetInfeasible,
    ModelError,
    UnsupportedError,
    UsageError,
    VerificationError,
    first_line,
)
from graphopt.ir.capture import capture
from graphopt.ir.program import Program
from graphopt.ir.randomness import kept_random_state, seed_torch
from graphopt.ir.untouched import outside_inference_mode
from graphopt.passes.linearize.latency import priced
from graphopt.passes.linearize.levels import CKKS
from graphopt.passes.linearize.linearize import Linearize
from graphopt.passes.linearize.outputs import compared
from graphopt.passes.linearize.points import Measure, Point, Sweep
from graphopt.passes.linearize.sites import sites
from graphopt.pipeline import PassContext, Pipeline, Progress, silent
from graphopt.private import network as read_network
from graphopt.private import protocol as read_protocol

BUDGETS = ("50%", "25%", "10%", "5%")
OPTIONS = ("replacement=affine", "replacement=poly2")
PROTOCOLS = ("crypten",)

Evaluate = Callable[[nn.Module], float]


def sweep(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    budgets: Sequence[str] = BUDGETS,
    options: Sequence[str] = OPTIONS,
    protocols: Sequence[str] = PROTOCOLS,
    network: str = "lan",
    evaluate: Evaluate | None = None,
    dynamic: Any = "batch",
    time_limit: float = 60.0,
    seed: int = 0,
    progress: Progress = silent,
) -> Sweep:
    """Linearize a model under every budget with every option, and price and measure the results.

    The model is left as it is, and captured once; each point is what `graphopt.optimize` gives
    under the same budget. A budget that can't be kept is a point with a reason.

    Args:
        model: The model.
        example_inputs: Positional inputs; costs are those of one inference on them.
        example_kwargs: Keyword inputs.
        data: Calibration batches, as `graphopt.optimize` takes them.
        loss: As there; what it tells is whether batches are pairs.
        budgets: ``50%`` or ``5000`` non-linearities of one sample, or any limit of the pass, such
            as ``relu_sites=3`` or ``pi_latency=50%``; the latter is kept under each protocol apart.
        options: Further options of the pass, such as ``replacement=poly2,granularity=channel``.
        protocols: Under which costs are predicted.
        network: ``lan``, ``wan``, or ``bits a second,round-trip seconds``.
        evaluate: Gives a module's accuracy, higher is better; the module is a copy of its own, in
            eval mode. Default: on the data (the example inputs without any), the share of samples
            with the same largest output as the source's, or, where outputs are not one row of
            numbers for each sample, ``1 - ||y - y_source|| / ||y_source||``, at least 0.
        dynamic: Which sizes stay free, as in `graphopt.capture`.
        time_limit: Seconds that choosing may take, for each point.
        seed: Of everything random.
        progress: Told what goes on.

    Returns:
        The points: the source's own first, then by option and budget, for each protocol; after
        Ctrl-C those found so far.

    Raises:
        UsageError: No budget, no option, or an unknown protocol or network.
        BudgetError: A budget that can't be read.
        CaptureError: The model can't be captured.
        UnsupportedError: A model without BatchNorm and without data.
    """
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if not budgets or not options or not protocols:
        raise UsageError("a sweep of nothing", hint="at least one budget, option and protocol")
    for name in protocols:
        read_protocol(name)
    read_network(network)
    check_data(data)
    plans = [
        each
        for option, budget in itertools.product(options, budgets)
        for each in _plans(option, budget, protocols, network)
    ]
    with outside_inference_mode(), kept_random_state():
        source = _copied(model)
        args, kwargs = tuple(example_inputs), dict(example_kwargs or {})
        progress("capturing the model")
        program = capture(source, args, kwargs, dynamic=dynamic)
        batches = None if data is None else list(itertools.islice(data, MOST))
        context = PassContext(
            args=args, kwargs=kwargs, source=source, data=batches, data_loss=loss,
            time_limit=time_limit, seed=seed, progress=progress,
        )  # fmt: skip
        program = _prepared(program, context)
        judge = _Judge(program, context, evaluate)
        return _Sweeping(program, context, tuple(protocols), network, judge).result(plans)


@dataclass(frozen=True)
class _Plan:
    """What is tried: the pass, and under which protocols its result is priced."""

    option: str
    budget: str
    pass_: Linearize
    protocols: tuple[str, ...]


def _plans(option: str, budget: str, protocols: Sequence[str], network: str) -> Iterator[_Plan]:
    """A pass for all protocols, or, where it aims at seconds, one for each."""
    field = budget if "=" in str(budget) else f"relus={budget}"
    text = ",".join(part for part in (field, option) if part)
    found = registry.parse(f"{Linearize.name}{{{text}}}").passes[0]
    assert isinstance(found, Linearize)
    if found.pi_latency is None:
        yield _Plan(option, str(budget), found, tuple(protocols))
        return
    for name in protocols:
        aimed = dataclasses.replace(found, protocol=name, network=network)  # type: ignore[arg-type]
        yield _Plan(option, str(budget), aimed, (name,))


def _copied(model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    try:
        return copy.deepcopy(model)
    except Exception as error:  # anything that a user's __deepcopy__ or __reduce__ raises
        raise ModelError(f"{type(model).__name__} can't be copied: {first_line(error)}") from error


def _prepared(program: Program, context: PassContext) -> Program:
    """What the pass gets from those in front of it."""
    chosen = registry.choose(Budget.parse("relus=100%")).passes
    before = tuple(each for each in chosen if each.position < Linearize.position)
    if not before:
        return program
    ahead = dataclasses.replace(context, ahead=(Linearize(),), progress=silent)
    return Pipeline(before).run(program, ahead)


class _Judge:
    """Tells the accuracy of a program's module."""

    def __init__(self, program: Program, context: PassContext, evaluate: Evaluate | None) -> None:
        self.evaluate = evaluate
        self.batches = [
            read_batch(batch, context.data_loss, len(context.args)) for batch in context.data or ()
        ]
        self.example, self.seed = (context.args, context.kwargs), context.seed
        self.expected = [] if evaluate is not None else self._outputs(self._module(program))

    @property
    def measure(self) -> Measure:
        """What accuracy is."""
        if self.evaluate is not None:
            return "evaluated"
        rows = compared(self.expected, self.expected)[1] is not None
        return "agreement" if rows else "likeness"

    def of(self, program: Program) -> float:
        """The accuracy of what a program emits.

        Raises:
            UsageError: The user's function gives no finite number.
        """
        module = self._module(program)
        if self.evaluate is None:
            error, agreement = compared(self.expected, self._outputs(module))
            return max(0.0, 1.0 - error) if agreement is None else agreement
        value = float(self.evaluate(module))
        if not math.isfinite(value):
            raise UsageError(f"evaluate gave {value}", hint="a finite number, higher is better")
        return value

    def _module(self, program: Program) -> nn.Module:
        """A module whose weights nothing else uses."""
        return copy.deepcopy(program.emit()).eval()

    @torch.no_grad()
    def _outputs(self, module: nn.Module) -> list[list[Any]]:
        """Flat outputs for each batch; where a module draws numbers, the same ones each time."""
        with kept_random_state():
            seed_torch(self.seed)
            if not self.batches:
                args, kwargs = self.example
                return [pytree.tree_leaves(module(*args, **kwargs))]
            return [pytree.tree_leaves(batch.outputs(module)) for batch in self.batches]


class _Sweeping:
    """One sweep."""

    def __init__(
        self,
        program: Program,
        context: PassContext,
        protocols: tuple[str, ...],
        network: str,
        judge: _Judge,
    ) -> None:
        self.program, self.context = program, context
        self.protocols, self.network, self.judge = protocols, network, judge
        self.unpriced: dict[str, str] = {}  # protocols that lack figures for the source, and why

    def result(self, plans: Sequence[_Plan]) -> Sweep:
        """All points."""
        own = [site for site in sites(self.program) if site.family.name != "softmax"]
        count, calls = sum(site.per_sample for site in own), len(own)
        accuracy = self.judge.of(self.program)
        point = Point("", "", count, calls, accuracy=accuracy)
        points = self._priced(self.program, point, self.protocols)
        self.unpriced = {p.protocol: p.reason for p in points if p.reason is not None}
        interrupted = True
        with contextlib.suppress(KeyboardInterrupt):
            for index, plan in enumerate(plans):
                told = f"{plan.budget} {plan.option}".strip()
                self.context.progress(told, index / len(plans))
                points += self._tried(plan, _within(self.context.progress, told, index, len(plans)))
            interrupted = False
        self.context.progress("stopped" if interrupted else "swept", 1.0)
        measure = self.judge.measure
        return Sweep(tuple(points), measure, self.protocols, self.network, interrupted)

    def _tried(self, plan: _Plan, progress: Progress) -> list[Point]:
        point = Point(plan.option, plan.budget)
        limit, name = plan.pass_.pi_latency, plan.protocols[0]
        if limit is not None and name in self.unpriced and (limit.relative or name != CKKS):
            return [dataclasses.replace(point, protocol=name, reason=self.unpriced[name])]
        try:
            context = dataclasses.replace(self.context, progress=progress)
            result = plan.pass_.run(self.program, context)
        except (BudgetInfeasible, VerificationError) as error:
            reason = _reason(error)
            return [
                dataclasses.replace(point, protocol=name, reason=reason) for name in plan.protocols
            ]
        report = result.report["linearize"]
        progress("measuring")
        found = dataclasses.replace(
            point,
            relus=report.relus_after,
            relu_sites=sum(site.kept > 0 for site in report.sites),
            accuracy=self.judge.of(result.program),
        )
        return self._priced(result.program, found, plan.protocols)

    def _priced(self, program: Program, point: Point, protocols: Sequence[str]) -> list[Point]:
        """The point under each protocol; one that lacks figures for an op is a reason."""
        found = []
        for name in protocols:
            here = dataclasses.replace(point, protocol=name)
            try:
                cost = priced(program, self.context, name, self.network)
                here = dataclasses.replace(
                    here, bytes=cost.bytes, rounds=cost.rounds, seconds=cost.seconds
                )
            except UnsupportedError as error:
                here = dataclasses.replace(here, reason=_reason(error))
            found.append(here)
        return found


def _reason(error: BudgetInfeasible | VerificationError | UnsupportedError) -> str:
    """One line."""
    text = " ".join(error.message.split())
    least = getattr(error, "smallest", None)
    return text if least is None else f"{text}; the smallest is {least:.6g}"


def _within(progress: Progress, told: str, index: int, count: int) -> Progress:
    """Progress of one point, as part of all."""

    def tell(message: str, fraction: float | None = None) -> None:
        progress(f"{told}: {message}", (index + (fraction or 0.0)) / count)

    return tell
