"""The doors to graphopt: `optimize`, `explain`, `capture`, `load`, `frontier`.

Nothing here knows a pass by name: the registry says which pass serves what.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import nn

from graphopt import persist, registry
from graphopt.budget import Budget
from graphopt.comparison import Observation, non_finite, observe, unequal
from graphopt.errors import (
    CaptureError,
    GraphoptError,
    InputMismatch,
    ModelError,
    NonFiniteError,
    UnsupportedError,
    VerificationError,
    first_line,
    user_line_of_error,
)
from graphopt.instruments import Instrument, Verify
from graphopt.ir import capture as _capture
from graphopt.ir.mode import in_modes_of
from graphopt.ir.randomness import kept_random_state
from graphopt.ir.untouched import outside_inference_mode
from graphopt.pipeline import Pass, PassContext, Pipeline, Progress, silent
from graphopt.report import Report
from graphopt.requests import (
    check_model,
    check_options,
    read_budget,
    read_inputs,
    read_loss,
    read_pipeline,
)

if TYPE_CHECKING:
    from graphopt.ir.module import OptimizedModule
    from graphopt.ir.program import Program

_P = ParamSpec("_P")
_T = TypeVar("_T")

CAPTURE_TOLERANCE = 1e-5
"""Allowed relative difference between the source model and its captured form."""


def _isolated(door: Callable[_P, _T]) -> Callable[_P, _T]:
    """Run a door outside of the caller's inference mode, and keep the random states.

    The copy of the model is made inside too; a DataLoader draws a seed whenever it is read.
    """

    @functools.wraps(door)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        with outside_inference_mode(), kept_random_state():
            return door(*args, **kwargs)

    return wrapped


@_isolated
def capture(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = "batch",
) -> Program:
    """Capture a model as a program.

    The model is left as it is; the program shares its parameters.

    Args:
        model: Any module; of an `OptimizedModule` the stored program is returned, plans and all.
        args: Example positional inputs.
        kwargs: Example keyword inputs.
        dynamic: ``"batch"`` (dimension 0 of every tensor input is free), ``"batch,sequence"``
            (dimensions 0 and 1), None, or torch's own ``dynamic_shapes``.

    Returns:
        The program; ``program.emit()`` gives a module.

    Raises:
        CaptureError: What failed, at which line of the model, and what to try.
        InputMismatch: The example inputs don't fit the model.
    """
    positional, keywords = read_inputs(args, kwargs)
    return _captured(model, positional, keywords, dynamic)


@_isolated
def optimize(
    model: nn.Module,
    budget: Budget | str | Mapping[str, Any] | None = None,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    passes: str | Sequence[Pass] | None = None,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    dynamic: Any = "batch",
    time_limit: float = 60.0,
    seed: int = 0,
    verify: bool = True,
    memory_scope: str | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    cost_model: str = "flops",
    instruments: Sequence[Instrument] = (),
    progress: Progress = silent,
    inplace: bool = False,
) -> OptimizedModule:
    """Make a module that does the job of ``model`` under a budget.

    Args:
        model: The model; its mode counts (in eval mode a memory budget is on the forward alone).
            It is left as it is, and the result shares nothing with it.
        budget: Such as ``"memory=50%"``, a mapping of fields, or a `Budget`.
        example_inputs: Positional inputs; the budget is promised for their sizes.
        example_kwargs: Keyword inputs.
        passes: Pipeline text or passes, instead of those that the budget would choose; options
            that they leave open are filled from the budget.
        data: Batches for passes that fit or calibrate: inputs, or pairs of inputs and targets.
        loss: ``loss(outputs)``, or ``loss(outputs, targets)`` exactly when ``data`` yields pairs.
            Default: the model's own scalar loss if its output has one, else the sum of its
            floating outputs.
        dynamic: Which sizes stay free, as in `capture`.
        time_limit: Seconds that planning may take.
        seed: Seed of everything random.
        verify: Check the capture and every claim of every pass on the example inputs.
        memory_scope: ``"activations"`` (default) or ``"step"``: parameters, gradients and the
            optimizer's state count too; the same as the budget field of that name.
        optimizer: The optimizer whose state counts under ``memory_scope="step"``.
        cost_model: ``"flops"``, ``"analytic"`` or ``"profiled"``.
        instruments: Further instruments that watch the pipeline.
        progress: Told what goes on.
        inplace: Let the result share the parameters of ``model`` instead of copying it.

    Returns:
        The optimised module, in the mode of ``model``; ``.report`` says what was done.

    Raises:
        BudgetError: A budget that can't be read or makes no sense.
        CaptureError: The model can't be captured.
        BudgetInfeasible: No way was found to keep the budget; carries the smallest that could.
        VerificationError: A pass broke a claim.
        NonFiniteError: NaN in the inputs, the parameters or the result of the model.
        NothingToTrainError: A training budget without anything to train.
    """
    wanted = read_budget(budget, memory_scope)
    pipeline = read_pipeline(wanted, passes)
    check_options(time_limit, cost_model)
    args, kwargs = read_inputs(example_inputs, example_kwargs)
    check_model(model, args, kwargs)
    source = model if inplace else copied(model)
    progress("capturing the model")
    program = _captured(source, args, kwargs, dynamic)
    example_loss, data = read_loss(loss, data)
    context = PassContext(
        args=args,
        kwargs=kwargs,
        source=source,
        budget=wanted,
        loss=example_loss,
        data_loss=loss,
        data=data,
        optimizer=optimizer,
        time_limit=time_limit,
        seed=seed,
        cost_model=cost_model,
        progress=progress,
    )
    watchers = list(instruments)
    if verify:
        progress("comparing the captured graph with the model")
        verify_capture(source, program, context)
        watchers.insert(0, Verify())
    program = pipeline.run(program, context, watchers)
    return _emit(program, model, wanted)


@_isolated
def explain(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    composite: Any = "cp-lrp",
    target: Any = "argmax",
    attribute: Sequence[str] = ("inputs",),
    memory_budget: Any = None,
    emitter: str = "auto",
    data: Iterable[Any] | None = None,
    progress: Progress = silent,
) -> nn.Module:
    """Make a module that says which inputs an output of ``model`` rests on.

    Args:
        model: The model; it is left as it is.
        example_inputs: Positional inputs.
        example_kwargs: Keyword inputs.
        composite: Which rules are applied where.
        target: ``"argmax"``, a class index, a tensor of them, or a function of the output that
            gives one value per batch element.
        attribute: What gets a relevance: ``"inputs"``, or names of parameters and nodes.
        memory_budget: Peak memory of an explanation, as in a budget.
        emitter: ``"auto"`` hands quotients ``R / x`` on where that is exact, ``"explicit"`` hands
            relevance itself on everywhere.
        data: Batches, for rules that learn from data (``pattern-attribution``).
        progress: Told what goes on.

    Returns:
        A module that takes what ``model`` takes and returns an explanation.

    Raises:
        UnsupportedError: No installed pass makes explanations.
        CaptureError: The model can't be captured.
    """
    explainers = [cls for cls in registry.serving("explanation") if hasattr(cls, "explain")]
    if not explainers:
        raise UnsupportedError(
            "no installed pass makes explanations",
            hint="`graphopt passes` lists what is installed",
        )
    args, kwargs = read_inputs(example_inputs, example_kwargs)
    check_model(model, args, kwargs)
    progress("capturing the model")
    source = copied(model)
    program = _captured(source, args, kwargs, "batch", training=False)
    context = PassContext(args=args, kwargs=kwargs, source=source, progress=progress)
    program = registry.choose(Budget()).run(program, context)
    first: Any = explainers[0]
    return first().explain(
        program,
        context,
        composite=composite,
        target=target,
        attribute=attribute,
        memory_budget=memory_budget,
        emitter=emitter,
        data=data,
    )


@_isolated
def frontier(
    model: nn.Module,
    example_inputs: Sequence[Any] = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    budgets: int | Sequence[Any] = 12,
    data: Iterable[Any] | None = None,
    loss: Callable[..., Any] | None = None,
    dynamic: Any = "batch",
    time_limit: float = 60.0,
    seed: int = 0,
    cost_model: str = "flops",
    progress: Progress = silent,
) -> list[tuple[int, float, float]]:
    """What every memory budget would cost, without choosing one.

    Args:
        model: The model; it is left as it is.
        example_inputs: Positional inputs.
        example_kwargs: Keyword inputs.
        budgets: How many points, or the budgets themselves (``"50%"``, bytes).
        data: As in `optimize`: the first pair gives a loss of outputs and targets its targets.
        loss: As in `optimize`.
        dynamic: As in `capture`.
        time_limit: Seconds for the whole curve.
        seed: Seed of everything random.
        cost_model: ``"flops"``, ``"analytic"`` or ``"profiled"``.
        progress: Told what goes on.

    Returns:
        Points ``(peak bytes, overhead, lower bound on the overhead)`` by falling peak; overheads
        are fractions of the step without recomputation.

    Raises:
        UnsupportedError: No installed pass draws the curve.
        CaptureError: The model can't be captured.
    """
    planners = [cls for cls in registry.serving("memory") if hasattr(cls, "frontier")]
    if not planners:
        raise UnsupportedError("no installed pass plans memory", hint="see `graphopt passes`")
    check_options(time_limit, cost_model)
    args, kwargs = read_inputs(example_inputs, example_kwargs)
    check_model(model, args, kwargs)
    example_loss, data = read_loss(loss, data)
    source = copied(model)
    program = _captured(source, args, kwargs, dynamic)
    context = PassContext(
        args=args,
        kwargs=kwargs,
        source=source,
        loss=example_loss,
        data_loss=loss,
        data=data,
        time_limit=time_limit,
        seed=seed,
        cost_model=cost_model,
        progress=progress,
    )
    first: Any = planners[0]
    program = _prepared(first(), program, context)
    points = first().frontier(program, context, budgets)
    return sorted(points, key=lambda point: -point[0])


def _prepared(planner: Pass, program: Program, context: PassContext) -> Program:
    """What a pass that serves a memory budget gets from those in front of it."""
    chosen = registry.choose(Budget.parse("memory=100%")).passes
    before = [each for each in chosen if each.position < planner.position]
    ahead = dataclasses.replace(context, ahead=(planner,))
    return Pipeline(tuple(before)).run(program, ahead)


def load(path: str | os.PathLike[str], *, trust: bool = False) -> OptimizedModule:
    """Load a module that `OptimizedModule.save` wrote.

    Args:
        path: The file.
        trust: Load a file from somewhere else even if it could execute code.

    Returns:
        The module, with its plans and its report.

    Raises:
        FileFormatError: The file is corrupt, or not one of ours.
        UnsafeFileError: It holds more than plain weights and JSON.
    """
    return persist.load(path, trust=trust)


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model.

    Raises:
        ModelError: It can't be copied; says why and what to do.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # anything that a user's __deepcopy__ or __reduce__ raises
        raise ModelError(
            f"{type(model).__name__} can't be copied: {first_line(error)}",
            hint="pass inplace=True, and the result shares the model's parameters",
        ) from error


def verify_capture(source: nn.Module, program: Program, context: PassContext) -> None:
    """Check that the captured program does what its source does, in train and in eval mode.

    Raises:
        VerificationError: Outputs, gradients or buffers differ by more than `CAPTURE_TOLERANCE`.
        NonFiniteError: The model gives NaN on the example inputs.
    """
    emitted = program.emit()
    for training in (True, False):
        run = functools.partial(
            observe,
            args=context.args,
            kwargs=context.kwargs,
            training=training,
            loss=context.loss,
            seed=context.seed,
        )
        expected = _run_source(run, source)
        _check_finite(expected.outputs, "the model's output")
        _check_finite(expected.gradients, "the gradient of")
        got = run(emitted)
        mode = "train" if training else "eval"
        if expected.structure != got.structure:
            raise VerificationError(
                f"the captured graph gives other outputs in {mode} mode: "
                f"{expected.structure} became {got.structure}",
                claim="shapes",
            )
        worst = unequal(expected, got, CAPTURE_TOLERANCE, functools.partial(run, source))
        if worst is not None:
            raise VerificationError(
                f"the captured graph differs from the model in {mode} mode: {worst.kind} "
                f"{worst.name} by {worst.error:.3g} (relative)",
                claim=worst.kind,
                hint="does forward depend on something besides its inputs, buffers and torch's "
                "random numbers?",
            )


def _captured(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    dynamic: Any,
    *,
    training: bool = True,
) -> Program:
    """Capture; where that fails because the model itself does on these inputs, say so instead.

    Without ``training`` eval mode is enough, where only training mode can't be captured.
    """
    compiling = sys.modules.get("graphopt.solvers.compiling")  # not imported: nothing to wait for
    if compiling is not None:
        compiling.settle()
    try:
        return _capture.capture(model, args, kwargs, dynamic=dynamic)
    except CaptureError:
        try:
            observe(model, args, kwargs, training=False)
        except Exception as error:  # user code may raise anything
            raise _fails_itself(model, error, InputMismatch) from error
        if not training:
            with contextlib.suppress(CaptureError):
                return _capture.capture(model, args, kwargs, dynamic=dynamic, training=False)
        raise


def _run_source(run: Callable[[nn.Module], Observation], source: nn.Module) -> Observation:
    """Run the user's model; what it raises is the model's own problem, and said to be."""
    try:
        return run(source)
    except GraphoptError:
        raise
    except Exception as error:  # user code may raise anything
        raise _fails_itself(source, error, ModelError) from error


def _fails_itself(
    model: nn.Module, error: Exception, kind: type[ModelError] | type[InputMismatch]
) -> GraphoptError:
    return kind(
        f"{type(model).__name__} itself fails on the example inputs: "
        f"{type(error).__name__}: {first_line(error)}",
        user_line=user_line_of_error(error),
        hint="run one forward and backward of the model with these inputs first",
    )


def _check_finite(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    name = non_finite(tensors)
    if name is not None and bool(tensors[name].isnan().any()):
        raise NonFiniteError(
            f"{what} {name} holds NaN on the example inputs",
            hint="give inputs on which the model is finite, or verify=False",
        )


def _emit(program: Program, model: nn.Module, budget: Budget) -> OptimizedModule:
    program = program.replace(report=Report.of(program, budget.to_dict()))
    return in_modes_of(program.emit(), model)
