"""The steps of a plan by the names of what they run, so that a plan outlives its graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.joint import JointInput, JointView
from graphopt.runtime.lower import Step


@dataclass(frozen=True)
class StepNames:
    """A `Step` with names in place of nodes.

    Attributes:
        kind: As of `Step`.
        nodes: Names of the nodes run.
        reuse: Pairs of a node and the argument whose memory takes its result.
        node: Name of the node whose value is committed or handed over.
        of: Kind and name of the operand concerned.
    """

    kind: str
    nodes: tuple[str, ...] = ()
    reuse: tuple[tuple[str, str], ...] = ()
    node: str | None = None
    of: tuple[str, str] | None = None

    @classmethod
    def of_step(cls, step: Step) -> StepNames:
        """The names of a step."""
        return cls(
            kind=step.kind,
            nodes=tuple(node.name for node in step.nodes),
            reuse=tuple((node.name, argument.name) for node, argument in step.reuse.items()),
            node=step.node.name if step.node is not None else None,
            of=(step.of.kind, step.of.name) if step.of is not None else None,
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StepNames:
        """Reads what `dataclasses.asdict` gave."""
        fields = {f.name: data[f.name] for f in dataclasses.fields(cls)}
        return cls(
            **{
                **fields,
                "nodes": tuple(fields["nodes"]),
                "reuse": tuple((a, b) for a, b in fields["reuse"]),
                "of": tuple(fields["of"]) if fields["of"] is not None else None,
            }
        )


class StepReader:
    """Finds the nodes of a joint graph by name.

    Args:
        view: A joint graph with the plan's fingerprint.
    """

    def __init__(self, view: JointView) -> None:
        self.nodes: dict[str, fx.Node] = {node.name: node for node in view.graph.nodes}
        self.inputs: dict[tuple[str, str], JointInput] = {(i.kind, i.name): i for i in view.inputs}

    def read(self, names: StepNames) -> Step:
        """The step."""
        return Step(
            kind=names.kind,  # type: ignore[arg-type]
            nodes=tuple(self.nodes[name] for name in names.nodes),
            reuse={self.nodes[node]: self.nodes[argument] for node, argument in names.reuse},
            node=self.nodes[names.node] if names.node is not None else None,
            of=self.inputs[names.of] if names.of is not None else None,
        )
