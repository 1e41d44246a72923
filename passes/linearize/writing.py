"""Adding nodes, and tensors of their own, in the place of one call of a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.ir.graphs import assign, copy_place
from graphopt.ir.skeleton import ADDED, Container


def added_container(root: Container) -> Container:
    """The container of what linearization adds."""
    if ADDED not in root._modules:
        container = Container()
        container._path, container._class_name = ADDED, "Linearized"
        container.training = root.training
        root._modules[ADDED] = container
    found = root._modules[ADDED]
    assert isinstance(found, Container)
    return found


class Writing:
    """What is written in the place of one call.

    Attributes:
        module: The graph module.
        graph: Its graph.
        node: The call.
        own: The container of its tensors.
    """

    def __init__(
        self, module: fx.GraphModule, node: fx.Node, added: Container, name: str, shown: str
    ) -> None:
        """Start with an empty container.

        Args:
            module: The graph module, which is changed.
            node: The call.
            added: The container of all that linearization adds.
            name: Of the call, for the names of its tensors.
            shown: What ``print`` shows of the container.
        """
        self.module, self.graph, self.node = module, module.graph, node
        self.own = _own_container(added, name, shown)

    def call(self, target: Any, *args: Any) -> fx.Node:
        """Add a call."""
        node = self.graph.call_function(target, args)
        copy_place(node, self.node)
        return node

    def parameter(self, name: str, value: Tensor) -> fx.Node:
        """Add a parameter."""
        parameter = nn.Parameter(value.to(self._device))
        self.own._parameters[name] = parameter
        return self._attribute(name, parameter)

    def tensor(self, name: str, value: Tensor) -> fx.Node:
        """Add a buffer that isn't part of the state."""
        placed = value.to(self._device)
        self.own._buffers[name] = placed
        self.own._non_persistent_buffers_set.add(name)
        return self._attribute(name, placed)

    @property
    def _device(self) -> torch.device:
        """Where the call's result lies."""
        return self.node.meta["val"].device

    def _attribute(self, name: str, value: Tensor) -> fx.Node:
        path = f"{self.own._path}.{name}"
        assign(self.module, path, value)
        return self.graph.create_node("get_attr", path)


def _own_container(added: Container, name: str, shown: str) -> Container:
    while name in added._modules:
        name = f"{name}_"
    container = Container()
    container._path, container._class_name = f"{ADDED}.{name}", "Replacement"
    container._repr = shown
    container.training = added.training
    added._modules[name] = container
    return container
