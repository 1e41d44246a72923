"""Choosing approximate rewrites: fitted to each value, measured together, fewer if too much."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphopt.comparison import Observation
from graphopt.cost.sizes import concrete
from graphopt.passes.share.compressed import QuantisedOperand
from graphopt.passes.share.fit import Steps, fit_steps
from graphopt.passes.share.quantise import BITS, dequantise, memory_order, packed_bytes, quantise
from graphopt.passes.share.steps import StepDerivative, candidates
from graphopt.planning.evaluate import forward_values
from graphopt.planning.rewrites import Rewrite
from graphopt.planning.situation import Situation

# Enough for thresholds that don't depend on which elements were taken.
_MOST_SAMPLES = 1 << 18
# Values of less than this share of all that is kept stay as they are.
_SMALL = 0.004


@dataclass(frozen=True)
class Choice:
    """How backward gets one value that it reads, approximately.

    Attributes:
        node: Name of the value's node.
        bytes: What is kept of it.
        error: Squared relative error of the value, or of the activation's derivative: a guide, by
            which choices are ranked; what counts is measured.
        bits: Bits an element, if it is quantised.
        steps: The backward op of an activation and the step function in its derivative's place.
    """

    node: str
    bytes: int
    error: float
    bits: int = 0
    steps: tuple[str, Steps] | None = None


def moves(
    situation: Situation,
    kept: Collection[fx.Node],
    module: nn.Module,
    inputs: Sequence[Tensor],
    seed: int,
) -> list[Choice]:
    """Choices in the order in which they are to be made: least error for the bytes they save first.

    A later choice for a value replaces an earlier one.

    Args:
        situation: The joint graph, with exact rewrites.
        kept: The values that are kept without approximation.
        module: Whose parameters are read.
        inputs: Flat inputs.
        seed: Of random draws.
    """
    large, base = _large(kept, situation), situation.storage.base
    activations = {base[_input_of(node)]: node for node in candidates(situation.view)}
    wanted = [node for node in kept if node in large or node in activations]
    values = forward_values(situation, module, inputs, wanted, seed=seed)
    ranked = []
    for node in wanted:
        found = _choices(node, values[node], activations.get(node), node in large)
        ranked += _by_price(found, values[node].nbytes)
    return [choice for _, choice in sorted(ranked, key=lambda pair: pair[0])]


def _input_of(activation: fx.Node) -> fx.Node:
    u = activation.args[1]
    assert isinstance(u, fx.Node)
    return u


def _large(kept: Collection[fx.Node], situation: Situation) -> set[fx.Node]:
    """Floating values, dense in memory, that are worth a codec."""
    returned = {
        situation.storage.base[n] for n in situation.view.graph.output_node().all_input_nodes
    }
    sizes = {
        node: concrete(node.meta["val"].numel(), situation.sizes) * node.meta["val"].element_size()
        for node in kept
        if node.op == "call_function"
        and node not in returned
        and isinstance(node.meta.get("val"), Tensor)
        and node.meta["val"].is_floating_point()
    }
    least = _SMALL * sum(sizes.values())
    return {node for node, size in sizes.items() if size > least and memory_order(node.meta["val"])}


def _choices(node: fx.Node, value: Tensor, act: fx.Node | None, large: bool) -> list[Choice]:
    """All choices for one value, the one of most bytes first."""
    found = [
        Choice(node.name, packed_bytes(value.numel(), bits), _rounding(value, bits), bits)
        for bits in BITS
        if large
    ]
    if act is not None:
        steps, error = _fitted(act, value)
        bytes_kept = -(-value.numel() // 4)
        found.append(Choice(node.name, bytes_kept, error**2, steps=(act.name, steps)))
    return found


def _rounding(value: Tensor, bits: int) -> float:
    """Squared relative error of a quantised value."""
    order = memory_order(value) or list(range(value.dim()))
    again = dequantise(quantise(value, bits, order), bits, order, value.shape, value.dtype)
    norm = float(value.double().norm()) or 1.0
    return (float((again - value).double().norm()) / norm) ** 2


def _by_price(choices: Sequence[Choice], size: int) -> list[tuple[float, Choice]]:
    """Choices with the error that a saved byte costs more than with the choice before."""
    price, error, ranked = 0.0, 0.0, []
    for choice in choices:
        if choice.bytes >= size:
            continue
        price = max(price, (choice.error - error) / (size - choice.bytes))
        size, error = choice.bytes, choice.error
        ranked.append((price, choice))
    return ranked


def _fitted(node: fx.Node, u: Tensor) -> tuple[Steps, float]:
    flat = u.flatten()
    flat = flat[:: max(1, flat.numel() // _MOST_SAMPLES)].double()
    slopes = _derivative(node, flat)
    x, y = flat.cpu().numpy(), slopes.cpu().numpy()
    steps = fit_steps(x, y)
    return steps, steps.error(x, y)


def _derivative(node: fx.Node, u: Tensor) -> Tensor:
    """What an activation's backward op multiplies gradients by, at u."""
    call: Any = node.target
    return call(torch.ones_like(u), u, *node.args[2:], **node.kwargs)


def gradient_error(exact: Observation, got: Observation) -> tuple[float, float]:
    """Relative distance and cosine of all gradients together."""
    a = np.concatenate([_flat(exact.gradients[name]) for name in sorted(exact.gradients)])
    b = np.concatenate([_flat(got.gradients[name]) for name in sorted(exact.gradients)])
    norm = float(np.linalg.norm(a)) or 1.0
    cosine = float(a @ b) / (norm * (float(np.linalg.norm(b)) or 1.0))
    return float(np.linalg.norm(a - b)) / norm, cosine


def _flat(tensor: Tensor) -> Any:
    return tensor.detach().flatten().double().cpu().numpy()


def as_rewrites(
    choices: Sequence[Choice], exact: Sequence[Rewrite], kept: Sequence[str], graph: str
) -> tuple[Rewrite, ...]:
    """The rules that make these choices, the last for each value.

    Args:
        choices: What was chosen.
        exact: The exact rewrites.
        kept: Names of the values that are kept with those.
        graph: Fingerprint of the graph that the choices are for.
    """
    last = {choice.node: choice for choice in choices}.values()
    steps = tuple((name, s.thresholds, s.levels) for c in last if c.steps for name, s in [c.steps])
    quantised = tuple((choice.node, choice.bits) for choice in last if choice.bits)
    few = (QuantisedOperand(graph, quantised, tuple(kept)),) if quantised else ()
    return (*exact, StepDerivative(graph, steps), *few)


def longest(count: int, allowed: float, measured: Callable[[int], float]) -> int:
    """How many of a row of moves may be made together.

    It is a count that was measured to be allowed; the most, if errors grow along the row.

    Args:
        count: Moves in the row.
        allowed: The error granted.
        measured: The gradient error of the first so many.
    """
    if not count or measured(count) <= allowed:
        return count
    low, high = 0, count  # low is allowed, high is not
    while high - low > 1:
        middle = (low + high) // 2
        if measured(middle) <= allowed:
            low = middle
        else:
            high = middle
    return low
