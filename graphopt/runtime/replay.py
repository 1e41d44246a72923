"""The unplanned forward pass, run again under autograd for gradients that a plan doesn't give."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import GraphoptError
from graphopt.ir.graphs import lookup
from graphopt.ir.randomness import kept_random_state
from graphopt.runtime.plan import Operand


class Unplanned:
    """A forward graph that holds no parameters or buffers of its own.

    Args:
        forward: The flat forward graph that a step was planned from.
    """

    def __init__(self, forward: fx.GraphModule) -> None:
        parameters = dict(forward.named_parameters(remove_duplicate=False))
        state = parameters | dict(forward.named_buffers(remove_duplicate=False))
        targets = {str(n.target) for n in forward.graph.find_nodes(op="get_attr")}
        self.operands = {
            name: Operand("parameter" if name in parameters else "buffer", name)
            for name in targets & state.keys()
        }
        held = {name: torch.empty(0) for name in self.operands}
        others = {name: lookup(forward, name) for name in targets - state.keys()}
        self.module = fx.GraphModule({**held, **others}, forward.graph)

    def __call__(self, tensors: Mapping[Operand, Tensor]) -> Sequence[Any]:
        """The flat outputs, given the operands."""
        inputs = [t for operand, t in tensors.items() if operand.kind == "input"]
        state = {name: tensors[operand] for name, operand in self.operands.items()}
        return torch.func.functional_call(self.module, state, tuple(inputs))


class Replay:
    """What it takes to run the unplanned forward pass of one call again.

    Args:
        unplanned: The forward graph.
        fetch: Gives the tensor behind a parameter or buffer.
        inputs: Flat inputs of the call.
        written: Operands that the forward pass writes.
        restored: Those among them whose old values its results depend on.
        random: Whether it draws random numbers.
    """

    def __init__(
        self,
        unplanned: Unplanned,
        fetch: Callable[[Operand], Tensor],
        inputs: Sequence[Tensor],
        written: frozenset[Operand],
        restored: frozenset[Operand],
        *,
        random: bool,
    ) -> None:
        self.unplanned, self.written = unplanned, written
        inputs_by_operand = {Operand("input", str(i)): t for i, t in enumerate(inputs)}
        state = {operand: fetch(operand) for operand in unplanned.operands.values()}
        self.tensors = state | inputs_by_operand
        for operand in restored & self.tensors.keys():
            self.tensors[operand] = self.tensors[operand].detach().clone()
        self.versions = {o: t._version for o, t in self.tensors.items() if o not in written}
        self.cpu_state = torch.get_rng_state() if random else None
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind))
            for kind in ("cpu", "cuda")
            if torch.is_autocast_enabled(kind)
        ]
        cuda = random and torch.cuda.is_available() and torch.cuda.is_initialized()
        self.cuda_states = torch.cuda.get_rng_state_all() if cuda else None

    def gradients(
        self, wanted: Sequence[Operand], tangents: Mapping[int, Tensor]
    ) -> dict[Operand, Tensor]:
        """Gradients as autograd computes them; what gets none is left out.

        Args:
            wanted: Operands.
            tangents: Output position -> gradient.

        Raises:
            GraphoptError: Something that the forward pass reads was written to since.
        """
        for operand, version in self.versions.items():
            if self.tensors[operand]._version != version:
                raise GraphoptError(
                    f"{operand.kind} '{operand.name}' was modified in place between forward and "
                    "backward, which needs its earlier value.",
                    hint="Run backward before the optimizer step or the write, or write to a copy.",
                )
        known = [operand for operand in wanted if operand in self.tensors]
        with contextlib.ExitStack() as stack:
            stack.enter_context(kept_random_state())
            stack.enter_context(torch.enable_grad())
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype))
            if self.cpu_state is not None:
                torch.set_rng_state(self.cpu_state)
            if self.cuda_states is not None:
                torch.cuda.set_rng_state_all(self.cuda_states)
            outputs = self.unplanned(self._fresh())
            found = torch.autograd.grad(
                [outputs[p] for p in tangents],
                [self.tensors[o] for o in known],
                list(tangents.values()),
                allow_unused=True,
            )
        return {o: g for o, g in zip(known, found, strict=True) if g is not None}

    def _fresh(self) -> dict[Operand, Tensor]:
        """The operands, with copies of those that are written: the call has written them once."""
        return {
            operand: tensor.detach().clone() if operand in self.written else tensor
            for operand, tensor in self.tensors.items()
        }
