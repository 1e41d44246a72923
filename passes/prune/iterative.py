"""Pruning in rounds with training in between."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from torch import nn

from graphopt.budget import Budget, Quantity
from graphopt.errors import UsageError
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import PassRecord, Program
from graphopt.passes.prune.limits import counted
from graphopt.passes.prune.prune import Prune
from graphopt.passes.prune.request import Request, as_list, read_request
from graphopt.pipeline import Pipeline, Progress, silent
from graphopt.plain import to_plain

Shape = Literal["cubic", "linear", "geometric"]
_SHAPES = ("cubic", "linear", "geometric")


def schedule(share: float, rounds: int, shape: Shape = "cubic") -> tuple[float, ...]:
    """The share of the source that is left after each round.

    Args:
        share: What is left in the end, in (0, 1].
        rounds: How many rounds there are.
        shape: ``cubic``: much at first, little at the end, ``1 - (1 - share)(1 - (1 - k/n)^3)``
            (Zhu and Gupta 2017); ``linear``: the same amount in each round; ``geometric``: the same
            share of what is left.

    Returns:
        Falling shares, the last of them `share`.
    """
    shares = []
    for number in range(1, rounds + 1):
        done = number / rounds
        if shape == "geometric":
            shares.append(share**done)
        else:
            shares.append(1 - (1 - share) * (done if shape == "linear" else 1 - (1 - done) ** 3))
    return (*shares[:-1], share)


def iteratively(
    model: nn.Module,
    budget: Budget | str | Mapping[str, Any],
    example_inputs: Any,
    *,
    train: Callable[[OptimizedModule], OptimizedModule | None],
    rounds: int = 5,
    shape: Shape = "cubic",
    example_kwargs: Mapping[str, Any] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    dynamic: Any = "batch",
    time_limit: float = 60.0,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> OptimizedModule:
    """Prune a little, train, prune on, until the budget is kept.

    Each round ranks units anew on what training has made of those that are left. The places that
    are kept are recorded as those of the model that was given: its checkpoints load into the
    result, and `report.masked_module()` has its sizes.

    Args:
        model: The model; it is left as it is.
        budget: ``"flops=50%"``, also of ``params`` or ``bytes``.
        example_inputs: Positional inputs; the budget is for their sizes.
        train: Trains the module that it is given, in place, or returns another that came of it;
            called after every round, the last included.
        rounds: How many rounds there are.
        shape: How the limit comes down, see `schedule`.
        example_kwargs: Keyword inputs.
        data: Batches to score units on.
        loss: The loss on these, as in `graphopt.optimize`.
        dynamic: Which sizes stay free, as in `graphopt.capture`.
        time_limit: Seconds for choosing widths, over all rounds.
        seed: Of everything random.
        progress: Told what goes on.
        **options: Further options of the pass `prune`.

    Returns:
        The module; its report's section ``prune`` counts from the given model on.

    Raises:
        UsageError: No such shape, fewer than one round; `train` returned something else.
        BudgetInfeasible: A round's limit can't be kept.
    """
    if rounds < 1 or shape not in _SHAPES:
        raise UsageError(
            f"rounds={rounds}, shape={shape!r}", hint=f"1 or more; one of {', '.join(_SHAPES)}"
        )
    settings: dict[str, Any] = {"seed": seed, "progress": progress}
    request = read_request(
        copy.deepcopy(model), budget, example_inputs, options, example_kwargs=example_kwargs,
        data=as_list(data), loss=loss, dynamic=dynamic, time_limit=time_limit / rounds, **settings,
    )  # fmt: skip
    limits = _limits(request, rounds, shape)
    program, module = request.program, None
    for number, limit in enumerate(limits):
        progress(f"round {number + 1} of {rounds}", number / rounds)
        options_now = dataclasses.replace(request.options, **limit)
        program = Pipeline((options_now,)).run(program, request.context)
        if number:
            program = _counting_from(request.program, program)
        module = request.emit(program)
        module = _trained(train, module)
        program = module.program
    assert module is not None
    return module


def _limits(request: Request, rounds: int, shape: Shape) -> list[dict[str, Quantity]]:
    """The budget of each round, absolute."""
    full = counted(request.program)
    found: list[dict[str, Quantity]] = [{} for _ in range(rounds)]
    for name, quantity in request.budget.limits().items():
        if name not in full:
            raise UsageError(
                f"{name} can't be brought down in rounds", hint=f"one of {', '.join(full)}"
            )
        share = min(1.0, quantity.of(full[name]) / full[name]) if full[name] else 1.0
        for limit, left in zip(found, schedule(share, rounds, shape), strict=True):
            limit[name] = Quantity(left * full[name], "B" if name == "bytes" else "")
    return found


def _trained(train: Callable[[OptimizedModule], Any], module: OptimizedModule) -> OptimizedModule:
    found = train(module)
    if found is None:
        return module
    if not isinstance(found, OptimizedModule):
        raise UsageError(
            f"train returned {type(found).__name__}",
            hint="train the module in place and return None, or return an OptimizedModule",
        )
    return found


def _counting_from(source: Program, program: Program) -> Program:
    """The program whose last record counts from the source on: its sizes, its places."""
    *earlier, last = program.history
    section = dict(last.report[Prune.name])
    section.update({f"{name}_before": count for name, count in counted(source).items()})
    assert program.slices is not None
    trained = {name for name, _ in source.skeleton.root.named_parameters()}
    kept = {name: axes for name, axes in program.slices.kept.items() if name in trained and axes}
    section["kept"] = to_plain(kept)
    full = _widths(earlier)
    section["dimensions"] = [
        [name, full.get(name, width), left] for name, width, left in section["dimensions"]
    ]
    record = dataclasses.replace(last, report={**last.report, Prune.name: section})
    return program.replace(history=(*earlier, record))


def _widths(records: list[PassRecord]) -> dict[str, int]:
    """The full width of each dimension, when it was first pruned."""
    found: dict[str, int] = {}
    for record in records:
        for name, width, _ in record.report.get(Prune.name, {}).get("dimensions", ()):
            found.setdefault(name, width)
    return found
