"""Everything that planning needs to know about one way of calling a module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from graphopt.cost import OpMeasurement, measure_ops
from graphopt.cost.flops import flops
from graphopt.cost.losses import Loss, LossMeasurement, measure_loss
from graphopt.cost.sizes import Substitution, concrete
from graphopt.ir.joint import JointInput, JointView, joint_view
from graphopt.ir.literals import retie
from graphopt.ir.program import Program
from graphopt.ir.signature import Signature
from graphopt.ir.storage import Role, StorageMap, storage_map
from graphopt.passes.rematerialize.prepare import prepare
from graphopt.passes.rematerialize.problem import Problem, TurnCosts, build_problem

# A gradient of less than this share of all gradient bytes waits for the next larger one.
_SMALL_GRADIENT = 0.002


@dataclass(frozen=True)
class CallKey:
    """What a plan depends on besides sizes; a call with another key needs another plan.

    Attributes:
        training: The mode of every module, in the order of `named_modules`.
        grad: Whether gradients are recorded.
        parameters: `requires_grad`, dtype and device of every parameter.
        inputs: The same of every input.
        autocast: Device types under autocast and their dtypes.
    """

    training: tuple[bool, ...]
    grad: bool
    parameters: tuple[tuple[bool, str, str], ...]
    inputs: tuple[tuple[bool, str, str], ...]
    autocast: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, module: nn.Module, inputs: Sequence[torch.Tensor]) -> CallKey:
        """The key of a call that is about to happen."""
        return cls(
            training=tuple(m.training for m in module.modules()),
            grad=torch.is_grad_enabled(),
            parameters=tuple(_traits(p) for p in module.parameters()),
            inputs=tuple(_traits(t) for t in inputs),
            autocast=tuple(
                (kind, str(torch.get_autocast_dtype(kind)))
                for kind in ("cpu", "cuda")
                if torch.is_autocast_enabled(kind)
            ),
        )

    @property
    def differentiable(self) -> bool:
        """Whether the call records a backward pass."""
        owners = (*self.parameters, *self.inputs)
        return self.grad and any(requires_grad for requires_grad, _, _ in owners)


def _traits(tensor: torch.Tensor) -> tuple[bool, str, str]:
    return tensor.requires_grad, str(tensor.dtype), str(tensor.device)


@dataclass(frozen=True, eq=False)
class Situation:
    """A joint graph made ready for planning.

    Attributes:
        view: The prepared joint view.
        storage: Roles and owners of its nodes.
        committed: Mutated operand -> node of its new value.
        forward: The mode-specialised forward graph that the view was made from.
        outputs_like: Fake outputs as the model returns them.
        loss: The loss, None for the default.
        hold_outputs: Whether callers keep outputs during backward.
    """

    view: JointView
    storage: StorageMap
    committed: dict[JointInput, fx.Node]
    forward: fx.GraphModule
    outputs_like: Any
    loss: Loss | None
    hold_outputs: bool

    @cached_property
    def computations(self) -> list[fx.Node]:
        """Nodes that run."""
        return [n for n in self.view.graph.nodes if self.storage.role[n] is Role.COMPUTE]

    @cached_property
    def fingerprint(self) -> str:
        """Equal exactly when sequences of the one graph fit the other."""
        text = "\n".join(f"{n.name} {n.target} {n.args} {n.kwargs}" for n in self.view.graph.nodes)
        return hashlib.sha256(text.encode()).hexdigest()

    def problem(
        self,
        duration: Callable[[fx.Node], int],
        *,
        symbols: Substitution | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Problem:
        """The task graph at the example sizes, or at those given by `symbols`."""
        measured = measure_ops(self.computations, symbols=symbols, progress=progress)
        return build_problem(
            self.view,
            self.storage,
            measured,
            duration,
            self.committed,
            self._turn(symbols),
            small_gradient=self._small_gradient(measured, symbols),
        )

    def _turn(self, symbols: Substitution | None) -> TurnCosts | None:
        tangents = self.view.inputs_of("tangent")
        if not tangents:
            return None
        found = measure_loss(self.outputs_like, self.loss, symbols=symbols)
        sizes = {int(t.name): _dense_bytes(t.node.meta["val"], symbols) for t in tangents}
        peak = max(found.forward_peak, found.backward_peak)
        return TurnCosts(sizes, max(0, peak - sum(sizes.values())), self.hold_outputs)

    def _small_gradient(
        self, measured: Mapping[fx.Node, OpMeasurement], symbols: Substitution | None
    ) -> int:
        sizes = [
            _dense_bytes(o.node.meta["val"], None)
            for o in self.view.outputs_of("gradient")
            if o.node is not None
        ]
        return int(_SMALL_GRADIENT * sum(sizes))

    def symbols(self, inputs: Sequence[torch.Tensor]) -> Substitution:
        """The values that inputs of other sizes give to the graph's symbols."""
        found: dict[Any, int] = {}
        for placeholder in self.view.inputs_of("input"):
            real = inputs[int(placeholder.name)]
            for size, actual in zip(placeholder.node.meta["val"].shape, real.shape, strict=True):
                if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                    found[size.node.expr] = int(actual)
        return found

    def flops(self, node: fx.Node) -> int:
        """FLOPs of one computation at the example sizes."""
        return flops(node)


def make_situation(
    program: Program,
    module: nn.Module,
    key: CallKey,
    inputs: Sequence[torch.Tensor],
    *,
    loss: Loss | None = None,
    hold_outputs: bool = False,
) -> Situation:
    """Traces the joint graph of a call.

    Args:
        program: The program that the module was emitted from.
        module: The module, in the mode and with the parameters that count.
        key: Its `CallKey`.
        inputs: Flat inputs; only their traits are used, sizes are the program's symbols.
        loss: The loss; decides which outputs are differentiated.
        hold_outputs: Whether callers keep outputs during backward.
    """
    names = [name for name, _ in module.named_modules()]
    forward = program.specialize(dict(zip(names, key.training, strict=True)))
    placeholders = forward.graph.find_nodes(op="placeholder")
    by_name = {n.name: t for n, t in zip(placeholders, inputs, strict=True)}
    forward = retie(forward, module, by_name)
    fakes = [_like(n.meta["val"], t) for n, t in zip(placeholders, inputs, strict=True)]
    output = next(n for n in reversed(forward.graph.nodes) if n.op == "output")
    flat = [v.meta.get("val") if isinstance(v, fx.Node) else v for v in output.args[0]]
    outputs_like = _signature(program, key).unflatten_outputs(flat)
    differentiable = _used_outputs(outputs_like, flat, loss) if key.differentiable else None
    view = joint_view(forward, fakes, differentiable=differentiable, grad=key.grad)
    committed = prepare(view)
    return Situation(
        view=view,
        storage=storage_map(view.graph),
        committed=committed,
        forward=forward,
        outputs_like=outputs_like,
        loss=loss,
        hold_outputs=hold_outputs,
    )


def _like(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The program's fake input with the dtype, device and `requires_grad` of a real one."""
    if (fake.dtype, fake.device, fake.requires_grad) == (
        real.dtype, real.device, real.requires_grad,
    ):  # fmt: skip
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=real.dtype, device=real.device)
    return made.requires_grad_(real.requires_grad)


def _signature(program: Program, key: CallKey) -> Signature:
    if program.eval_signature is not None and not all(key.training):
        return program.eval_signature
    return program.signature


def _used_outputs(outputs_like: Any, flat: Sequence[Any], loss: Loss | None) -> list[int]:
    """Positions of the flat outputs that the loss depends on."""
    found: LossMeasurement = measure_loss(outputs_like, loss)
    leaves = pytree.tree_leaves(outputs_like)
    used = {id(v) for v, t in zip(leaves, found.tangents, strict=True) if t is not None}
    return [i for i, value in enumerate(flat) if id(value) in used]


def _dense_bytes(fake: torch.Tensor, symbols: Substitution | None) -> int:
    return concrete(fake.numel(), symbols) * fake.element_size()
