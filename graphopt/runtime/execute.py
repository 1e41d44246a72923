"""Runs a `PlannedStep` under autograd, handing gradients over one stage at a time.

A single autograd function would hold every parameter's gradient until it returns. Here a chain of
gates does: each gate takes a token and the operands whose gradients are final at its stage, and
returns the token; the last function takes the token and runs the whole forward stage. Autograd
then calls the chain backwards, and each gate runs one backward stage on the shared table of live
values and returns its gradients, which are accumulated and freed before the next stage starts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.ir.output_views import OutputViews
from graphopt.ir.untouched import autocast_off
from graphopt.runtime.boxed import BoxedCallable, run_boxed
from graphopt.runtime.plan import Operand, PlannedStep, Stage
from graphopt.runtime.replay import Replay, Unplanned

FetchOperand = Callable[[Operand], Tensor]


class BudgetWarning(UserWarning):
    """A call stayed right but did not keep its memory budget."""


class CompiledStep:
    """A planned step made callable.

    Args:
        step: The plan.
        unplanned: The forward graph; gives the gradients that the plan does not.
        views: Program outputs that are made from the step's.
        compiler: Turns a boxed graph module into a callable that empties its argument list.
        on_other_loss: Told which outputs got a gradient, when these are not those planned for.
    """

    def __init__(
        self,
        step: PlannedStep,
        unplanned: Unplanned,
        views: OutputViews,
        compiler: Callable[..., BoxedCallable] = run_boxed,
        on_other_loss: Callable[[frozenset[int]], None] = lambda _: None,
    ) -> None:
        self.step, self.unplanned, self.views = step, unplanned, views
        self.on_other_loss = on_other_loss
        self.stages = [_CompiledStage(stage, compiler(stage.module)) for stage in step.stages]
        self.needed = {name for stage in step.backward for name in stage.takes}
        self.needed |= {name for stage in step.backward for _, name in stage.gradients}
        differentiable = step.out_requires_grad | step.tangents.keys()
        self.may_replay = bool(step.backward) and len(differentiable) > 1

    def __call__(self, fetch: FetchOperand, inputs: Sequence[Tensor]) -> list[Any]:
        """Runs forward; gradients flow to the operands that require them.

        Args:
            fetch: Gives the tensor behind a parameter or buffer.
            inputs: Flat program inputs.

        Returns:
            The flat program outputs.
        """

        def tensor(operand: Operand) -> Tensor:
            return inputs[int(operand.name)] if operand.kind == "input" else fetch(operand)

        call = _Call(self, tensor, inputs)
        with autocast_off():
            computed = self._differentiable(call) if self.step.backward else call.run_forward()
        outputs = self._arrange(dict(zip(self.step.results, computed, strict=True)), tensor)
        return self.views.apply(outputs, inputs)

    def _differentiable(self, call: _Call) -> Sequence[Any]:
        device = next((t.device for t in call.operands.values() if t.requires_grad), None)
        token = torch.zeros((), device=device, requires_grad=True)
        rest = None
        if call.replay is not None and self.step.unplanned:
            owners = [call.tensor(operand) for operand in self.step.unplanned]
            rest = _Rest.apply(call, token, *owners)
        for index in reversed(range(len(self.step.backward))):
            owners = [call.tensor(operand) for operand, _ in self.step.backward[index].gradients]
            token = _Gate.apply(call, index, token, *owners)
        results = _Forward.apply(call, token)
        if rest is None:
            return results
        others = self.step.out_requires_grad - self.step.tangents.keys()
        return [
            _Attached.apply(result, rest) if position in others else result
            for position, result in zip(self.step.results, results, strict=True)
        ]

    def _arrange(self, computed: dict[int, Any], tensor: FetchOperand) -> list[Any]:
        outputs = []
        for position in range(self.step.num_outputs):
            if position in self.step.duplicates:
                outputs.append(computed[self.step.duplicates[position]])
            elif position in self.step.passthrough:
                value = self.step.passthrough[position]
                outputs.append(tensor(value) if isinstance(value, Operand) else value)
            else:
                outputs.append(computed[position])
        return outputs


@dataclass(frozen=True)
class _CompiledStage:
    stage: Stage
    function: BoxedCallable

    def run(self, table: dict[str, Any]) -> None:
        """Reads its values from the table, frees those it may, writes its results."""
        stage = self.stage
        arguments = [
            table.pop(name) if name in stage.frees else table[name] for name in stage.takes
        ]
        # Nothing here requires a gradient, so nothing is recorded; but some ops (oneDNN's RNN)
        # keep what their backward needs only in this mode.
        with torch.enable_grad():
            results = self.function(arguments)
        table.update(zip(stage.gives, results, strict=True))


class _Call:
    """One forward pass and its backward pass: the table of live values."""

    def __init__(
        self, compiled: CompiledStep, tensor: FetchOperand, inputs: Sequence[Tensor]
    ) -> None:
        self.compiled, self.step, self.tensor = compiled, compiled.step, tensor
        self.operands = {name: tensor(operand) for name, operand in self.step.operands.items()}
        self.table: dict[str, Any] = {}
        self.kept: dict[str, Any] | None = None  # the table as it was, for another backward
        self.versions: dict[str, tuple[int, str | None]] = {}
        self.spent = False
        self.replayed = False
        self.extra: dict[Operand, Tensor] = {}
        self.replay = self._replay(inputs) if compiled.may_replay else None

    def _replay(self, inputs: Sequence[Tensor]) -> Replay:
        step = self.step
        return Replay(
            self.compiled.unplanned,
            self.tensor,
            inputs,
            frozenset(step.operands[name] for name in step.mutates),
            frozenset(step.operands[name] for name in step.restores),
            random=step.random,
        )

    # -- forward -----------------------------------------------------------------------------

    def run_forward(self) -> list[Any]:
        """Runs the forward stage; returns the computed program outputs."""
        self.table = {name: tensor.detach() for name, tensor in self.operands.items()}
        owners = {t.untyped_storage()._cdata: name for name, t in self.operands.items()}
        self.operands = {}
        del self.tensor  # it leads to the inputs, which shall be able to die
        self.compiled.stages[0].run(self.table)
        results = [self.table[name] for name in self.step.results.values()]
        if not self.step.backward:
            self.table = {}
            return results
        self._keep_for_backward(owners)
        # Aliases: a result gets a grad_fn that leads back here, and the table, or a view in it,
        # must not lead to the result. Aliases share the version, so that writes are noticed.
        return [_alias(result) for result in results]

    def _keep_for_backward(self, owners: dict[int, str]) -> None:
        needed = self.compiled.needed
        self.table = {name: value for name, value in self.table.items() if name in needed}
        for name, value in self.table.items():
            if isinstance(value, Tensor):
                self.versions[name] = value._version, owners.get(value.untyped_storage()._cdata)

    # -- backward ----------------------------------------------------------------------------

    def start_backward(self, tangents: Sequence[Tensor | None]) -> None:
        """Stores the gradients of the outputs; the gates do the rest."""
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "A planned backward pass cannot be differentiated again (create_graph=True).",
                hint="Optimise without a memory budget where second derivatives are needed.",
            )
        if self.kept is not None:
            self.table = dict(self.kept)
        elif self.spent:
            raise RuntimeError(
                "Trying to backward through a planned step a second time: its values were freed. "
                "Specify retain_graph=True on the first backward."
            )
        self._check_versions(self.versions)
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        self.kept = dict(self.table) if keep else None
        self.spent, self.extra = True, {}
        given = {p: t for p, t in zip(self.step.results, tangents, strict=True) if t is not None}
        self.replayed = not self.step.tangents.keys() <= given.keys()
        unplanned = {p: t for p, t in given.items() if p not in self.step.tangents or self.replayed}
        if unplanned:
            self._differentiate_unplanned(unplanned)
        if not self.replayed:
            self.table |= {name: given[p] for p, name in self.step.tangents.items()}
        if not keep:
            self.replay = None

    def run_stage(self, index: int) -> list[Tensor | None]:
        """Runs one backward stage; returns the gradients that are final after it."""
        stage = self.step.backward[index]
        if self.replayed:
            self.table = {}
            return [self.extra.pop(operand, None) for operand, _ in stage.gradients]
        self._check_versions(stage.takes)
        with autocast_off():
            self.compiled.stages[index + 1].run(self.table)
        gradients: list[Tensor | None] = [
            self._with_extra(operand, self.table.pop(name) if leaves else self.table[name])
            for (operand, name), leaves in zip(stage.gradients, stage.leaves, strict=True)
        ]
        if index + 1 == len(self.step.backward):
            self.table = {}
        return gradients

    def rest(self) -> list[Tensor | None]:
        """Gradients of the operands that the plan gives none."""
        return [self.extra.pop(operand, None) for operand in self.step.unplanned]

    def _with_extra(self, operand: Operand, gradient: Tensor) -> Tensor:
        extra = self.extra.pop(operand, None)
        return gradient if extra is None else gradient + extra

    def _check_versions(self, names: Iterable[str]) -> None:
        for name in names:
            version, owner = self.versions.get(name, (None, None))
            if version is not None and self._version(name) not in (None, version):
                operand = self.step.operands.get(owner or "")
                what = f"{operand.kind} '{operand.name}'" if operand else "an output of the model"
                raise GraphoptError(
                    f"{what} was modified in place between forward and backward, which needs its "
                    "earlier value.",
                    hint="Run backward before the optimizer step or the write, or write to a copy. "
                    "(Hooks that step an optimizer are fine if registered before the call.)",
                )

    def _version(self, name: str) -> int | None:
        value = self.table.get(name)
        return value._version if isinstance(value, Tensor) else None

    def _differentiate_unplanned(self, tangents: dict[int, Tensor]) -> None:
        """Autograd's way: no gradient of zeros stands in for one that isn't there."""
        warnings.warn(
            "The loss uses other outputs than the plan was made for: the gradients of this step "
            "are right, but its memory budget does not hold. If that happens again, later steps "
            "are planned for these outputs; give graphopt.optimize the loss to avoid it.",
            BudgetWarning,
            stacklevel=2,
        )
        assert self.replay is not None
        wanted = [o for s in self.step.backward for o, _ in s.gradients]
        wanted += self.step.unplanned
        self.extra = self.replay.gradients(wanted, tangents)
        self.compiled.on_other_loss(frozenset(tangents) | self._planned_used())

    def _planned_used(self) -> frozenset[int]:
        return frozenset() if self.replayed else frozenset(self.step.tangents)


class _Gate(torch.autograd.Function):
    """Passes a token on; in backward runs one stage and returns its gradients."""

    @staticmethod
    def forward(ctx: Any, call: _Call, index: int, token: Tensor, *owners: Tensor) -> Tensor:
        ctx.call, ctx.index = call, index
        ctx.set_materialize_grads(False)
        return token.detach().clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = ctx.call.run_stage(ctx.index)
        return None, None, None, *gradients


class _Rest(torch.autograd.Function):
    """Returns the gradients of operands that only unplanned outputs depend on.

    It is made before everything else of a call, so that autograd runs it after `_Forward`.
    """

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor, *_owners: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return token.detach().clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.call.rest()


class _Attached(torch.autograd.Function):
    """An unplanned output: if it gets a gradient, so do the operands that only it depends on."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, rest: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return _alias(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
        return gradients[0], None


class _Forward(torch.autograd.Function):
    """Runs the forward stage; in backward only stores the gradients of the outputs."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor) -> tuple[Any, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        results = call.run_forward()
        constant = [
            result
            for position, result in zip(call.step.results, results, strict=True)
            if isinstance(result, Tensor) and position not in call.step.out_requires_grad
        ]
        ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[None, None]:
        ctx.call.start_backward(tangents)
        return None, None


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
