"""A planned step: one forward graph and the backward pass cut where gradients become final.

Every graph is plain FX. Values that outlive a graph are kept by name in one table for each call
(see `graphopt.runtime.execute`), so that whatever a plan frees is really freed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx


@dataclass(frozen=True)
class Operand:
    """Something that lives outside of the plan: a parameter, a buffer or a program input.

    Attributes:
        kind: What it is.
        name: FQN of a parameter or buffer; decimal position of a flat program input.
    """

    kind: Literal["parameter", "buffer", "input"]
    name: str


@dataclass(frozen=True)
class Stage:
    """One graph of a plan.

    Attributes:
        module: Boxed graph; takes the values named in `takes`, returns those named in `gives`.
        takes: Names of the values read, in placeholder order.
        frees: The names among `takes` that nobody reads afterwards.
        gives: Names of the results, in order.
        gradients: Gradients that may be handed over when the stage ends: operand -> value name.
        leaves: For each of `gradients` whether its value leaves the table then.
    """

    module: fx.GraphModule
    takes: tuple[str, ...]
    frees: frozenset[str]
    gives: tuple[str, ...]
    gradients: tuple[tuple[Operand, str], ...] = ()
    leaves: tuple[bool, ...] = ()


@dataclass(frozen=True)
class PlannedStep:
    """All graphs of one planned call.

    Attributes:
        operands: Value name -> operand, for everything the stages read from outside.
        forward: The forward stage. Its `gives` covers `results` and all that backward needs.
        backward: The backward stages in order; empty if nothing requires a gradient.
        results: Program output position -> value name.
        passthrough: Program output position -> constant, or operand returned as it is.
        duplicates: Program output position -> earlier position returning the same tensor.
        tangents: Program output position -> value name under which its gradient is stored, for
            the outputs the plan differentiates.
        out_requires_grad: Positions of outputs that carry a gradient in the source model.
        num_outputs: Number of flat program outputs.
        unplanned: Operands that require a gradient and get none from the plan.
        random: Whether the forward stage draws random numbers.
        mutates: Names of operands that the forward stage writes to.
        restores: Those among them whose old values outputs depend on.
    """

    operands: dict[str, Operand]
    forward: Stage
    backward: tuple[Stage, ...]
    results: dict[int, str]
    passthrough: dict[int, object]
    duplicates: dict[int, int]
    tangents: dict[int, str]
    out_requires_grad: frozenset[int]
    num_outputs: int
    unplanned: tuple[Operand, ...] = ()
    random: bool = False
    mutates: frozenset[str] = frozenset()
    restores: frozenset[str] = frozenset()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Forward, then backward."""
        return (self.forward, *self.backward)
