"""Tracing a call of a module: the joint graph, and what surrounds it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphopt.cost.losses import Loss, LossMeasurement, default_loss, measure_loss
from graphopt.cost.sizes import Substitution, symbols_of
from graphopt.ir.joint import JointView, joint_view
from graphopt.ir.literals import retie
from graphopt.ir.mode import runs_eval
from graphopt.ir.output_views import OutputViews, split_views
from graphopt.ir.program import Program
from graphopt.ir.signature import Signature
from graphopt.ir.storage import storage_map
from graphopt.planning.prepare import prepare
from graphopt.planning.rewrites import Rewrite, Site
from graphopt.planning.situation import CallKey, Situation, fingerprint_of
from graphopt.report import ShareRefusal
from graphopt.runtime.replay import Unplanned

log = logging.getLogger("graphopt")


@dataclass(frozen=True, eq=False)
class TracedCall:
    """The joint graph of a call as it was traced; situations are made from copies of it.

    Attributes:
        view: The joint view.
        unplanned: The mode-specialised forward graph that the view was made from.
        differentiable: Positions of its outputs that get a gradient; None: it has no backward.
        views: Program outputs that are made from the outputs of `forward`.
        outputs_like: Fake outputs of `unplanned`.
        loss: Measures the loss, given the positions of the outputs that are held.
        hold_outputs: Whether callers keep outputs during backward.
        sizes: The example sizes.
        key: Of the call.
    """

    view: JointView
    unplanned: Unplanned
    differentiable: tuple[int, ...] | None
    views: OutputViews
    outputs_like: list[Any]
    loss: Callable[[frozenset[int] | None], LossMeasurement]
    hold_outputs: bool
    sizes: Substitution
    key: CallKey

    def situation(self, rewrites: Sequence[Rewrite] = ()) -> Situation:
        """Makes a copy of the graph ready for planning.

        Args:
            rewrites: Rules by which it is changed, in this order; those that were fitted to
                another graph are left out.
        """
        view = self.view.copy()
        committed = prepare(view)
        original = fingerprint_of(view.graph)
        fitting = [rule for rule in rewrites if self.key.grad and rule.graph in ("", original)]
        if len(fitting) < len(rewrites) and self.key.grad:
            log.warning(
                "graphopt: what was approximated within a gradient error was fitted to another "
                "kind of call; this one is exact, and keeps more for its backward pass"
            )
        found = [site for rule in fitting for site in rule.apply(view)]
        return Situation(
            view=view,
            storage=storage_map(view.graph),
            committed=committed,
            unplanned=self.unplanned,
            differentiable=self.differentiable,
            views=self.views,
            outputs_like=self.outputs_like,
            loss=self.loss,
            hold_outputs=self.hold_outputs,
            sizes=self.sizes,
            stepping=self.key.stepping,
            sites=tuple(site for site in found if isinstance(site, Site)),
            refused=tuple(site for site in found if isinstance(site, ShareRefusal)),
            original=original,
        )


def trace_call(
    program: Program,
    module: nn.Module,
    key: CallKey,
    inputs: Sequence[torch.Tensor],
    *,
    loss: Loss | None = None,
    differentiable: Sequence[int] | None = None,
    hold_outputs: bool = False,
) -> TracedCall:
    """Traces the joint graph of a call.

    Args:
        program: The program that the module was emitted from.
        module: The module, in the mode and with the parameters that count.
        key: Its `CallKey`.
        inputs: Flat inputs; only their traits and sizes are used.
        loss: The loss; decides which outputs are differentiated.
        differentiable: These are, if given, and their sum stands for the loss.
        hold_outputs: Whether callers keep outputs during backward.
    """
    forward = program.specialize(_modes(module, key))
    placeholders = forward.graph.find_nodes(op="placeholder")
    by_name = {n.name: t for n, t in zip(placeholders, inputs, strict=True)}
    forward = retie(forward, module, by_name)
    fakes = [_like(n.meta["val"], t) for n, t in zip(placeholders, inputs, strict=True)]
    sizes = symbols_of(fakes, [t.shape for t in inputs])
    forward, views = split_views(forward)
    output = forward.graph.output_node()
    results: Sequence[Any] = output.args[0]  # type: ignore[assignment]
    flat = [_stand_in(v.meta.get("val")) if isinstance(v, fx.Node) else v for v in results]
    if differentiable is not None:
        on_flat = partial(_sum_of, tuple(differentiable))
    else:
        signature = _signature(program, module)
        shapes = [torch.empty(tuple(t.shape), device="meta") for t in inputs]
        on_flat = partial(_loss_of_flat, loss or default_loss, views, signature, shapes)

    @functools.cache
    def measured(held: frozenset[int] | None) -> LossMeasurement:
        return measure_loss(flat, on_flat, symbols=sizes, held=held)

    if differentiable is None and key.differentiable:
        differentiable = _used_outputs(flat, measured(None))
    view = joint_view(forward, fakes, differentiable=differentiable, grad=key.grad)
    return TracedCall(
        view=view,
        unplanned=Unplanned(forward),
        differentiable=tuple(differentiable) if differentiable is not None else None,
        views=views,
        outputs_like=flat,
        loss=measured,
        hold_outputs=hold_outputs,
        sizes=sizes,
        key=key,
    )


def _modes(module: nn.Module, key: CallKey) -> dict[str, bool]:
    """The mode of every module under each of its names: a key has one entry a module."""
    modes = dict(zip(module.modules(), key.training, strict=True))
    return {name: modes[part] for name, part in module.named_modules(remove_duplicate=False)}


def _sum_of(positions: tuple[int, ...], flat: list[Any]) -> torch.Tensor:
    return default_loss([flat[position] for position in positions])


def _stand_in(value: Any) -> Any:
    """Of a returned parameter the value: whether outputs require a gradient is not known here."""
    return value.detach() if isinstance(value, torch.Tensor) and value.requires_grad else value


def _loss_of_flat(
    loss: Loss,
    views: OutputViews,
    signature: Signature,
    inputs: Sequence[torch.Tensor],
    flat: list[Any],
) -> torch.Tensor:
    """The loss as a function of what the graph returns."""
    return loss(signature.unflatten_outputs(views.apply(flat, inputs)))


def _like(fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """The program's fake input with the dtype, device and `requires_grad` of a real one."""
    if (fake.dtype, fake.device, fake.requires_grad) == (
        real.dtype, real.device, real.requires_grad,
    ):  # fmt: skip
        return fake
    with fake.fake_mode:  # type: ignore[attr-defined]
        made = torch.empty_strided(fake.shape, fake.stride(), dtype=real.dtype, device=real.device)
    return made.requires_grad_(real.requires_grad)


def _signature(program: Program, module: nn.Module) -> Signature:
    signature = program.eval_signature
    if signature is not None and runs_eval(
        program.branches, lambda path: module.get_submodule(path).training
    ):
        return signature
    return program.signature


def _used_outputs(flat: Sequence[Any], found: LossMeasurement) -> list[int]:
    """Positions of the flat outputs that the loss depends on."""
    used = {id(v) for v, t in zip(flat, found.tangents, strict=True) if t is not None}
    return [i for i, value in enumerate(flat) if id(value) in used]
