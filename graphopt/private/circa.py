"""Circa's stochastic ReLU (Ghodsi et al., NeurIPS 2021) as a simulation of accuracy.

A ReLU is the product of a value with its sign, and a garbled circuit finds the sign.  With shares
``s`` and ``p - t`` of x modulo p, where t is uniform and ``s = x + t mod p``, Circa's circuit
compares ``s`` with t, both without their k lowest bits, instead of adding the shares up.  That is
wrong in two disjoint cases:

- ``x + t`` wraps around: for ``|x|`` of p values of t, whatever the sign of x;
- both have the same upper bits, though x isn't zero.  With PosZero a tie means zero, which is wrong
  for x > 0, where it needs ``t mod 2^k < 2^k - x`` and no wrapping; with NegPass a tie lets x pass,
  which is wrong for x < 0, where it needs ``t mod 2^k >= |x|``.

A fault at x >= 0 gives zero, one at x < 0 gives x.  The number of such t is exact below for
``p = 2^bits``.  Nothing here says how fast the protocol would be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, fx, nn

from graphopt.errors import UnsupportedError, UsageError
from graphopt.ir.capture import capture
from graphopt.ir.interpret import Hook, Value, call, held_by, interpret
from graphopt.ir.module import OptimizedModule
from graphopt.ir.program import Program
from graphopt.ir.untouched import buffers_kept
from graphopt.private.comparisons import COMPARING, functional
from graphopt.private.lower import graph_of
from graphopt.private.reduced import REDUCED, Relu

CircaMode = Literal["poszero", "negpass"]
_MOST_BITS = 52
"""Ring sizes whose values float64 holds."""


def fault_probability(
    x: Tensor, truncated_bits: int, mode: CircaMode = "poszero", ring_bits: int = 31
) -> Tensor:
    """How likely the sign of fixed-point values is found wrongly.

    Args:
        x: Integers between ``-2^(ring_bits - 1)`` and ``2^(ring_bits - 1)``, of any type.
        truncated_bits: Low bits that the comparison leaves out, less than ``ring_bits``.
        mode: What a tie means.
        ring_bits: Shares are modulo 2 to this.

    Returns:
        Probabilities, float64, of x's shape.  Zero has none: both answers give zero.
    """
    _check(truncated_bits, mode, ring_bits)
    size, step = 2.0**ring_bits, 2.0**truncated_bits
    x = x.double()
    far = x.abs()
    ties = torch.zeros_like(x)
    if mode == "poszero":
        whole, rest = torch.floor((size - far) / step), torch.remainder(size - far, step)
        wrong = (x > 0) & (far < step)
        # t from 0 to p - x - 1 whose lowest bits are less than 2^k - x
        ties = torch.where(wrong, whole * (step - far) + torch.minimum(rest, step - far), ties)
    else:
        ties = torch.where((x < 0) & (far < step), size / step * (step - far), ties)
    return (far + ties) / size


class CircaSimulation(nn.Module):
    """A captured model in eval mode whose comparisons are Circa's.

    It takes and gives what the model does, at any batch size, and shares its weights.  Faults are
    drawn from a generator of its own: the same calls after `restart` give the same results.

    Attributes:
        truncated_bits: Low bits that comparisons leave out.
        mode: ``poszero`` or ``negpass``.
        fraction_bits: Of fixed-point values.
        ring_bits: Of the shares.
        seed: Of the faults.
        exact: Names of nodes that compare and aren't made of ReLUs: they are evaluated exactly.
    """

    def __init__(
        self,
        program: Program,
        truncated_bits: int,
        mode: CircaMode,
        fraction_bits: int,
        ring_bits: int,
        seed: int,
    ) -> None:
        super().__init__()
        _check(truncated_bits, mode, ring_bits)
        if not 0 <= fraction_bits < ring_bits:
            raise UsageError(f"fraction_bits={fraction_bits} of a ring of {ring_bits} bits")
        self.truncated_bits = truncated_bits
        self.mode: CircaMode = mode
        self.fraction_bits, self.ring_bits, self.seed = fraction_bits, ring_bits, seed
        self.signature = program.eval_signature or program.signature
        args, kwargs = self.signature.rebuild_call(program.fake_inputs())
        self.graph, _ = graph_of(program, args, kwargs)
        self.exact = tuple(
            n.name for n in self.graph.graph.nodes
            if functional(_packet(n)) in COMPARING and functional(_packet(n)) not in REDUCED
        )  # fmt: skip
        self.restart()

    def restart(self) -> None:
        """Draw from the start again."""
        self.generator = torch.Generator().manual_seed(self.seed)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs.

        Raises:
            UnsupportedError: A value doesn't fit the ring, or is NaN; names the node.
        """
        flat = self.signature.flatten_inputs(args, kwargs)
        return self._run(flat, self._faulty)

    def exactly(self, *args: Any, **kwargs: Any) -> Any:
        """The model's outputs without faults."""
        flat = self.signature.flatten_inputs(args, kwargs)
        return self._run(flat, call)

    def _run(self, flat: Sequence[Any], hook: Hook) -> Any:
        """The outputs; the model's buffers are shared, and stay as they are."""
        with buffers_kept(self.graph):
            results = interpret(self.graph.graph, flat, held_by(self.graph), hook)
            return self.signature.unflatten_outputs(results)

    def _faulty(self, node: fx.Node, value: Value) -> Any:
        reduced = REDUCED.get(functional(_packet(node)))
        if reduced is None:
            return call(node, value)
        args, kwargs = fx.map_arg((node.args, node.kwargs), value)
        if not any(isinstance(a, Tensor) and a.is_floating_point() for a in args):
            return call(node, value)
        relu: Relu = lambda x: self.relu(x, node)  # noqa: E731
        return reduced(relu, *args, **kwargs)

    def relu(self, x: Tensor, node: fx.Node) -> Tensor:
        """One ReLU of Circa's."""
        fixed = (x.detach().double() * 2.0**self.fraction_bits).round()
        largest = float(fixed.abs().max()) if fixed.numel() else 0.0
        if not largest < 2.0 ** (self.ring_bits - 1):
            raise UnsupportedError(
                f"the magnitude {largest / 2.0**self.fraction_bits:.4g} doesn't fit "
                f"{self.ring_bits} bits of which {self.fraction_bits} are of fractions",
                node=node,
                hint="take fewer fraction_bits or more ring_bits",
            )
        likely = fault_probability(fixed, self.truncated_bits, self.mode, self.ring_bits)
        drawn = torch.rand(x.shape, dtype=torch.float64, generator=self.generator).to(x.device)
        passes = (fixed >= 0) ^ (drawn < likely)
        return x * passes


def _packet(node: fx.Node) -> Any:
    return getattr(node.target, "overloadpacket", None)


def _check(truncated_bits: int, mode: str, ring_bits: int) -> None:
    if mode not in get_args(CircaMode):
        raise UsageError(f"the mode is poszero or negpass, not {mode!r}")
    if not 1 < ring_bits <= _MOST_BITS:
        raise UsageError(f"a ring of {ring_bits} bits: 2 to {_MOST_BITS} can be simulated")
    if not 0 <= truncated_bits < ring_bits:
        raise UsageError(
            f"{truncated_bits} truncated bits of {ring_bits}",
            hint=f"0 to {ring_bits - 1}; published networks stand 12 to 18 of 31",
        )


def simulate(
    model: nn.Module | Program,
    example_inputs: Sequence[Any] = (),
    *,
    truncated_bits: int,
    mode: CircaMode = "poszero",
    fraction_bits: int = 15,
    ring_bits: int = 31,
    seed: int = 0,
    example_kwargs: Mapping[str, Any] | None = None,
) -> CircaSimulation:
    """The model with Circa's stochastic ReLUs: an accuracy simulation, which says nothing of speed.

    ReLUs are faulty, and so is what reduces to them: ReLU6, hardtanh, clamp, leaky ReLU, PReLU,
    abs, maximum, minimum, max pooling (as a tournament).  Values are rounded to fixed point for the
    sign alone.

    Args:
        model: The model, or its program.
        example_inputs: Example positional inputs.
        truncated_bits: Low bits that comparisons leave out.
        mode: ``poszero``: small positive values may become zero; ``negpass``: small negative ones
            may pass.
        fraction_bits: Of fixed-point values.
        ring_bits: Shares are modulo 2 to this.
        seed: Of the faults; the global generator isn't touched.
        example_kwargs: Example keyword inputs.

    Raises:
        UsageError: Bits or a mode that there aren't.
        CaptureError: The model can't be captured.
    """
    _check(truncated_bits, mode, ring_bits)
    program = program_of(model, example_inputs, example_kwargs)
    return CircaSimulation(program, truncated_bits, mode, fraction_bits, ring_bits, seed)


def program_of(
    model: nn.Module | Program,
    example_inputs: Sequence[Any],
    example_kwargs: Mapping[str, Any] | None,
) -> Program:
    """A model's program; captured where it is none."""
    if isinstance(model, Program):
        return model
    if isinstance(model, OptimizedModule):
        return model.program
    return capture(model, tuple(example_inputs), dict(example_kwargs or {}))
