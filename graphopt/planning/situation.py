"""Everything that planning needs to know about one way of calling a module."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from graphopt.cost import measure_ops
from graphopt.cost.flops import flops
from graphopt.cost.losses import LossMeasurement
from graphopt.cost.sizes import Substitution, concrete, symbols_of
from graphopt.ir.joint import JointInput, JointView
from graphopt.ir.output_views import OutputViews
from graphopt.ir.storage import Role, StorageMap
from graphopt.planning.prepare import depends_on_tangents
from graphopt.planning.problem import Problem, TurnCosts, build_problem
from graphopt.planning.rewrites import Site
from graphopt.report import ShareRefusal
from graphopt.runtime.replay import Unplanned

# Gradients wait for others until they have this share of all gradient bytes.
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
        stepping: Whether parameters have hooks that may write to them when their gradient is there
            (an optimizer that steps during backward).
    """

    training: tuple[bool, ...]
    grad: bool
    parameters: tuple[tuple[bool, str, str], ...]
    inputs: tuple[tuple[bool, str, str], ...]
    autocast: tuple[tuple[str, str], ...]
    stepping: bool = False

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
            stepping=any(p._post_accumulate_grad_hooks for p in module.parameters()),
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
        unplanned: The mode-specialised forward graph that the view was made from.
        differentiable: Positions of its outputs that get a gradient; None: it has no backward.
        views: Program outputs that are made from the outputs of `forward`.
        outputs_like: Fake outputs of `unplanned`.
        loss: Measures the loss, given the positions of the outputs that are held.
        hold_outputs: Whether callers keep outputs during backward.
        sizes: The example sizes. (The graph's hints are others where a batch of one was given:
            it is traced as two.)
        stepping: Whether parameters may change as soon as they get their gradient.
        sites: Where the graph was rewritten.
        refused: Where a rewrite fits but was not applied.
        original: Fingerprint of the joint graph before it was rewritten.
    """

    view: JointView
    storage: StorageMap
    committed: dict[JointInput, fx.Node]
    unplanned: Unplanned
    differentiable: tuple[int, ...] | None
    views: OutputViews
    outputs_like: list[Any]
    loss: Callable[[frozenset[int] | None], LossMeasurement]
    hold_outputs: bool
    sizes: Substitution
    stepping: bool
    sites: tuple[Site, ...] = ()
    refused: tuple[ShareRefusal, ...] = ()
    original: str = ""

    @cached_property
    def computations(self) -> list[fx.Node]:
        """Nodes that run."""
        return [n for n in self.view.graph.nodes if self.storage.role[n] is Role.COMPUTE]

    @cached_property
    def fingerprint(self) -> str:
        """Equal exactly when sequences of the one graph fit the other."""
        return fingerprint_of(self.view.graph)

    def problem(
        self,
        duration: Callable[[fx.Node], int],
        *,
        symbols: Substitution | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Problem:
        """The task graph at the example sizes, or at those given by `symbols`."""
        sizes = self.sizes if symbols is None else symbols
        if self.view.inputs_of("tangent"):
            _expand_tangents(self.view, self._loss_found)
        measured = measure_ops(self.computations, symbols=sizes, progress=progress)
        examples = measure_ops(self.computations, symbols=self.sizes) if symbols else None
        return build_problem(
            self.view,
            self.storage,
            measured,
            duration,
            self.committed,
            self._turn(sizes),
            small_gradient=self._small_gradient,
            examples=examples,
            stepping=self.stepping,
        )

    def _turn(self, symbols: Substitution) -> TurnCosts | None:
        """The loss, measured at the example sizes and scaled with the outputs to others."""
        tangents = self.view.inputs_of("tangent")
        if not tangents:
            return None
        held, found = self._held, self._loss_found
        sizes = {
            int(t.name): tangent.bytes
            for t in tangents
            if (tangent := found.tangents[int(t.name)]) is not None
        }
        most = found.output_bytes + found.backward_peak
        state = max(0, most - self._bytes(held) - sum(sizes.values()))
        scale = self._bytes(range(len(self.outputs_like)), symbols) / max(1, found.output_bytes)
        return TurnCosts(
            tangent_bytes={p: self._scaled_tangent(p, size, symbols) for p, size in sizes.items()},
            workspace=round(scale * found.forward_peak),
            state=round(scale * state),
            held=held,
            hold_outputs=self.hold_outputs,
        )

    def _scaled_tangent(self, position: int, size: int, symbols: Substitution) -> int:
        return round(size * self._bytes([position], symbols) / max(1, self._bytes([position])))

    def _bytes(self, positions: Iterable[int], symbols: Substitution | None = None) -> int:
        values = (self.outputs_like[position] for position in positions)
        return sum(
            _dense_bytes(v, symbols or self.sizes) for v in values if isinstance(v, torch.Tensor)
        )

    @cached_property
    def _loss_found(self) -> LossMeasurement:
        return self.loss(self._held)

    @cached_property
    def _held(self) -> frozenset[int]:
        """The outputs that are alive while the loss is differentiated, whatever the plan.

        Those that somebody else owns or holds, and those that the loss and the backward pass save.
        """
        tensors = [i for i, v in enumerate(self.outputs_like) if isinstance(v, torch.Tensor)]
        if self.hold_outputs:
            return frozenset(tensors)
        late = depends_on_tangents(self.view)
        readers = [n for n in late if n.op != "output"]
        read = {self.storage.base[a] for n in readers for a in n.all_input_nodes}
        saves = self.loss(None).saves
        made = {o.of: o.node for o in self.view.outputs_of("output") if o.node is not None}
        return frozenset(
            i for i in tensors if i not in made or (saves[i] and self.storage.base[made[i]] in read)
        )

    @cached_property
    def _small_gradient(self) -> int:
        sizes = [
            _dense_bytes(o.node.meta["val"], None)
            for o in self.view.outputs_of("gradient")
            if o.node is not None
        ]
        return int(_SMALL_GRADIENT * sum(sizes))

    def symbols(self, inputs: Sequence[torch.Tensor]) -> Substitution:
        """The values that inputs of other sizes give to the graph's symbols."""
        return symbols_of(
            [i.node.meta["val"] for i in self.view.inputs_of("input")],
            [inputs[int(i.name)].shape for i in self.view.inputs_of("input")],
        )

    def flops(self, node: fx.Node) -> int:
        """FLOPs of one computation at the example sizes."""
        return flops(node, self.sizes)


def fingerprint_of(graph: fx.Graph) -> str:
    """Equal exactly for graphs of the same nodes, however those that read sizes are called.

    How many sizes a trace reads, and so their numbers, differs after saving and loading.
    """
    names = {node: _steady_name(node, place) for place, node in enumerate(graph.nodes)}
    calls = (
        (names[n], n.target, *fx.map_arg((n.args, n.kwargs), lambda m: names[m]))
        for n in graph.nodes
    )
    return hashlib.sha256("\n".join(map(str, calls)).encode()).hexdigest()


def _steady_name(node: fx.Node, place: int) -> str:
    is_size = isinstance(node.meta.get("val"), torch.SymInt)
    return f"size {place}" if is_size else node.name


def _expand_tangents(view: JointView, found: LossMeasurement) -> None:
    """Tangents as the loss hands them over: a sum's are one number, expanded."""
    for tangent in view.inputs_of("tangent"):
        given = found.tangents[int(tangent.name)]
        fake = tangent.node.meta["val"]
        if given is not None and not any(given.stride) and fake.dim() > 0:
            with fake.fake_mode:
                tangent.node.meta["val"] = fake.new_empty(()).expand(fake.shape)


def _dense_bytes(fake: torch.Tensor, symbols: Substitution | None) -> int:
    return concrete(fake.numel(), symbols) * fake.element_size()
