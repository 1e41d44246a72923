"""Runs a `PlannedStep` under autograd, handing gradients over one stage at a time.

A single autograd function would hold every parameter's gradient until it returns. Here a chain of
gates does: each gate takes a token and the operands whose gradients are final at its stage, and
returns the token; the last function takes the token and runs the whole forward stage. Autograd
then calls the chain backwards, and each gate runs one backward stage on the shared table of live
values and returns its gradients, which are accumulated and freed before the next stage starts.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError, UnsupportedError
from graphopt.ir.output_views import OutputViews
from graphopt.runtime.boxed import BoxedCallable, run_boxed
from graphopt.runtime.plan import Operand, PlannedStep, Stage

FetchOperand = Callable[[Operand], Tensor]
Fallback = Callable[..., Sequence[Any]]


class BudgetWarning(UserWarning):
    """A call stayed right but did not keep its memory budget."""


class CompiledStep:
    """A planned step made callable.

    Args:
        step: The plan.
        fallback: Runs the unplanned forward graph on flat inputs with autograd; used for the
            gradient of outputs that the plan does not differentiate.
        views: Program outputs that are made from the step's.
        compiler: Turns a boxed graph module into a callable that empties its argument list.
    """

    def __init__(
        self,
        step: PlannedStep,
        fallback: Fallback,
        views: OutputViews,
        compiler: Callable[..., BoxedCallable] = run_boxed,
    ) -> None:
        self.step = step
        self.fallback = fallback
        self.views = views
        self.stages = [_CompiledStage(stage, compiler(stage.module)) for stage in step.stages]

    def __call__(self, fetch: FetchOperand, inputs: Sequence[Tensor]) -> list[Any]:
        """Runs forward; gradients flow to the operands that require them.

        Args:
            fetch: Gives the tensor behind a parameter or buffer.
            inputs: Flat program inputs.

        Returns:
            The flat program outputs.
        """
        operands = {
            name: inputs[int(operand.name)] if operand.kind == "input" else fetch(operand)
            for name, operand in self.step.operands.items()
        }
        call = _Call(self, operands, fetch, inputs)
        with _autocast_disabled():
            computed = self._differentiable(call) if self.step.backward else call.run_forward()
        outputs = self._arrange(dict(zip(self.step.results, computed, strict=True)), fetch, inputs)
        return self.views.apply(outputs, inputs)

    def _differentiable(self, call: _Call) -> Sequence[Any]:
        device = next((t.device for t in call.operands.values() if t.requires_grad), None)
        token = torch.zeros((), device=device, requires_grad=True)
        if call.replay is not None:
            owners = [call.operand_tensor(o) for o in self.step.unplanned]
            token = _Rest.apply(call, token, *owners)
        for index in reversed(range(len(self.step.backward))):
            owners = [call.operand_tensor(o) for o, _ in self.step.backward[index].gradients]
            token = _Gate.apply(call, index, token, *owners)
        return _Forward.apply(call, token)

    def _arrange(
        self, computed: dict[int, Any], fetch: FetchOperand, inputs: Sequence[Tensor]
    ) -> list[Any]:
        outputs = []
        for position in range(self.step.num_outputs):
            if position in self.step.duplicates:
                outputs.append(computed[self.step.duplicates[position]])
            elif position in self.step.passthrough:
                outputs.append(_unchanged(self.step.passthrough[position], fetch, inputs))
            else:
                outputs.append(computed[position])
        return outputs


@dataclass(frozen=True)
class _CompiledStage:
    stage: Stage
    function: BoxedCallable

    def run(self, table: dict[str, Any], *, keep: bool = False) -> None:
        """Reads its values from the table, frees those it may, writes its results."""
        stage = self.stage
        arguments = [
            table.pop(name) if name in stage.frees and not keep else table[name]
            for name in stage.takes
        ]
        # Nothing here requires a gradient, so nothing is recorded; but some ops (oneDNN's RNN)
        # keep what their backward needs only in this mode.
        with torch.enable_grad():
            results = self.function(arguments)
        table.update(zip(stage.gives, results, strict=True))


class _Call:
    """One forward pass and its backward pass: the table of live values."""

    def __init__(
        self,
        compiled: CompiledStep,
        operands: dict[str, Tensor],
        fetch: FetchOperand,
        inputs: Sequence[Tensor],
    ) -> None:
        self.compiled, self.step = compiled, compiled.step
        self.operands, self.fetch, self.inputs = operands, fetch, inputs
        self.table: dict[str, Any] = {}
        self.kept: dict[str, Any] = {}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype, torch.device]] = {}
        self.versions: dict[str, tuple[int, str | None]] = {}
        self.next_stage = 0
        self.extra: dict[Operand, Tensor] = {}
        self.replay = _Replay.of(self) if self._may_need_replay() else None

    def operand_tensor(self, operand: Operand) -> Tensor:
        """The tensor whose gradient a stage gives."""
        if operand.kind == "input":
            return self.inputs[int(operand.name)]
        return self.fetch(operand)

    # -- forward -----------------------------------------------------------------------------

    def run_forward(self) -> list[Any]:
        """Runs the forward stage; returns the computed program outputs."""
        self.table = {name: tensor.detach() for name, tensor in self.operands.items()}
        if not self.step.backward:
            forward = self.compiled.stages[0]
            self.operands = {}
            forward.run(self.table)
            results = [self.table[name] for name in self.step.results.values()]
            self.table = {}
            return results
        self.compiled.stages[0].run(self.table)
        # Aliases: a result gets a grad_fn that leads back here, and the table, or a view in it,
        # must not lead to the result. Aliases share the version, so that writes are noticed.
        results = [_alias(self.table[name]) for name in self.step.results.values()]
        self._keep_for_backward()
        return results

    def _keep_for_backward(self) -> None:
        needed = {name for stage in self.step.backward for name in stage.takes}
        needed |= {name for stage in self.step.backward for _, name in stage.gradients}
        self.table = {name: value for name, value in self.table.items() if name in needed}
        owners = {t.untyped_storage()._cdata: n for n, t in self.operands.items()}
        for name, value in self.table.items():
            if isinstance(value, Tensor):
                self.versions[name] = value._version, owners.get(value.untyped_storage()._cdata)
        self.operands = {}
        if self.replay is None:
            self.inputs = ()

    # -- backward ----------------------------------------------------------------------------

    def start_backward(self, tangents: Sequence[Tensor | None]) -> None:
        """Stores the gradients of the outputs; the gates do the rest."""
        if torch.is_grad_enabled():
            raise UnsupportedError(
                "A planned backward pass cannot be differentiated again (create_graph=True).",
                hint="Optimise without a memory budget where second derivatives are needed.",
            )
        if self.next_stage:
            raise RuntimeError(
                "Trying to backward through a planned step a second time: its values were freed. "
                "Specify retain_graph=True on the first backward."
            )
        self._check_versions()
        unplanned = {}
        for position, tangent in zip(self.step.results, tangents, strict=True):
            if position in self.step.tangents:
                self.table[self.step.tangents[position]] = self._planned_tangent(position, tangent)
            elif tangent is not None:
                unplanned[position] = tangent
        if unplanned:
            self._differentiate_unplanned(unplanned)

    def run_stage(self, index: int) -> list[Tensor | None]:
        """Runs one backward stage; returns the gradients that are final after it."""
        keep = torch._C._autograd._get_current_graph_task_keep_graph()
        if index == 0 and keep:
            self.kept = dict(self.table)
        stage = self.compiled.stages[index + 1]
        with _autocast_disabled():
            stage.run(self.table)
        self.next_stage = index + 1
        gradients = []
        names = [name for _, name in stage.stage.gradients]
        for position, (operand, name) in enumerate(stage.stage.gradients):
            last = name not in names[position + 1 :] and not self._read_later(name, index)
            gradient = self.table.pop(name) if last else self.table[name]
            gradients.append(self._with_extra(operand, gradient))
        if self.next_stage == len(self.step.backward):
            self._finish(keep)
        return gradients

    def rest(self) -> list[Tensor | None]:
        """Gradients of the operands that the plan gives none."""
        return [self.extra.pop(operand, None) for operand in self.step.unplanned]

    def _finish(self, keep: bool) -> None:
        self.table = {}
        if keep:
            self.table, self.kept, self.next_stage = self.kept, {}, 0
        else:
            self.replay = None

    def _read_later(self, name: str, index: int) -> bool:
        return any(
            name in stage.takes or any(name == n for _, n in stage.gradients)
            for stage in self.step.backward[index + 1 :]
        )

    def _with_extra(self, operand: Operand, gradient: Tensor) -> Tensor:
        extra = self.extra.pop(operand, None)
        return gradient if extra is None else gradient + extra

    def _planned_tangent(self, position: int, tangent: Tensor | None) -> Tensor:
        name = self.step.results[position]
        if tangent is None:
            like = self.shapes[name]
            return torch.zeros(like[0], dtype=like[1], device=like[2])
        return _in_order(tangent, self.step.tangent_layouts[position])

    def _check_versions(self) -> None:
        for name, (version, owner) in self.versions.items():
            if name in self.table and self.table[name]._version != version:
                operand = self.step.operands.get(owner or "")
                what = f"{operand.kind} '{operand.name}'" if operand else "an output of the model"
                raise GraphoptError(
                    f"{what} was modified in place between forward and backward, which needs its "
                    "earlier value.",
                    hint="Run backward before the optimizer step or the write, or write to a copy.",
                )

    # -- outputs without a planned gradient ----------------------------------------------------

    def _may_need_replay(self) -> bool:
        return bool(self.step.out_requires_grad - set(self.step.tangents))

    def _differentiate_unplanned(self, tangents: dict[int, Tensor]) -> None:
        warnings.warn(
            f"Outputs {sorted(tangents)} got a gradient although the loss given to graphopt does "
            "not use them: the gradients are right, the memory budget does not hold.",
            BudgetWarning,
            stacklevel=2,
        )
        assert self.replay is not None
        wanted = [o for s in self.step.backward for o, _ in s.gradients]
        wanted += self.step.unplanned
        self.extra = self.replay.gradients(self, wanted, tangents)


@dataclass
class _Replay:
    """What it takes to run the unplanned forward pass again with the same random numbers."""

    cpu_state: Tensor | None
    cuda_states: list[Tensor] | None

    @staticmethod
    def of(call: _Call) -> _Replay:
        if not call.step.random:
            return _Replay(None, None)
        cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
        return _Replay(torch.get_rng_state(), torch.cuda.get_rng_state_all() if cuda else None)

    def gradients(
        self, call: _Call, wanted: Sequence[Operand], tangents: dict[int, Tensor]
    ) -> dict[Operand, Tensor]:
        owners = [call.operand_tensor(o) for o in wanted]
        with self._as_then(call), torch.enable_grad():
            outputs = call.compiled.fallback(*call.inputs)
            found = torch.autograd.grad(
                [outputs[p] for p in tangents], owners, list(tangents.values()), allow_unused=True
            )
        return {o: g for o, g in zip(wanted, found, strict=True) if g is not None}

    @contextlib.contextmanager
    def _as_then(self, call: _Call) -> Iterator[None]:
        written = [call.operand_tensor(call.step.operands[n]) for n in call.step.mutates]
        backups = [w.detach().clone() for w in written]
        with torch.random.fork_rng(enabled=self.cpu_state is not None):
            if self.cpu_state is not None:
                torch.set_rng_state(self.cpu_state)
            if self.cuda_states is not None:
                torch.cuda.set_rng_state_all(self.cuda_states)
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, backup in zip(written, backups, strict=True):
                        tensor.copy_(backup)


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
    """Returns the gradients of operands that only unplanned outputs depend on."""

    @staticmethod
    def forward(ctx: Any, call: _Call, token: Tensor, *_owners: Tensor) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return token.detach().clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.call.rest()


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
        call.shapes = {
            name: (result.shape, result.dtype, result.device)
            for name, result in zip(call.step.results.values(), results, strict=True)
            if isinstance(result, Tensor)
        }
        ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *tangents: Tensor | None) -> tuple[None, None]:
        ctx.call.start_backward(tangents)
        return None, None


def _alias(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _unchanged(what: Any, fetch: FetchOperand, inputs: Sequence[Tensor]) -> Any:
    if isinstance(what, Operand):
        return inputs[int(what.name)] if what.kind == "input" else fetch(what)
    return what


def _in_order(tangent: Tensor, order: tuple[int, ...]) -> Tensor:
    """The tangent, dense in the given dimension order (the joint graph's views rely on it)."""
    permuted = tangent.permute(order)
    if permuted.is_contiguous():
        return tangent
    inverse = [order.index(d) for d in range(len(order))]
    return permuted.contiguous().permute(inverse)


@contextlib.contextmanager
def _autocast_disabled() -> Iterator[None]:
    """Plans are traced below autocast: their casts are explicit."""
    with contextlib.ExitStack() as stack:
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield
