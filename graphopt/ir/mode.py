"""Train and eval mode of a captured graph, found by comparing traces in both modes.

An argument that differs between the trace in training mode and the one in eval mode is
*mode-bearing*: dropout's ``train`` flag, BatchNorm's ``training``, the dropout rate of an SDPA.  One
that doesn't differ is fixed, as in Monte-Carlo dropout.  Each mode-bearing node follows the
``training`` flag of the module that owns it, the innermost one in its ``nn_module_stack``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from graphopt.ir.program import Program


@dataclass(frozen=True)
class ModeSwitch:
    """What a node's arguments are in training and in eval mode (``node.meta["mode"]``).

    Attributes:
        owner: Path of the module whose ``training`` flag decides.
        values: Argument place (``args.2``, ``kwargs.dropout_p``) -> (train value, eval value).
    """

    owner: str
    values: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)


def owner_of(node: fx.Node) -> str:
    """Path of the innermost module that a node ran in."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""
