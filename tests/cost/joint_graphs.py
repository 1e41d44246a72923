"""Joint graphs of two small models, run and simulated node by node."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

from graphopt.cost import OpMeasurement, Substitution, concrete


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.second(torch.relu(self.norm(self.first(x)))))


class SmallCnn(nn.Module):
    def __init__(self, blocks: int = 2, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(blocks)])
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class SmallTransformer(nn.Module):
    def __init__(self, width: int = 32, vocabulary: int = 50, layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def cnn() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return SmallCnn(), (torch.rand(4, 3, 16, 16),)


def transformer() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return SmallTransformer(), (torch.randint(0, 50, (4, 12)),)


def joint_graph(
    model: nn.Module, args: tuple[torch.Tensor, ...], *, free_batch: bool = False
) -> fx.GraphModule:
    shapes = tuple({0: torch.export.Dim.AUTO} for _ in args) if free_batch else None
    exported = torch.export.export(model, args, strict=False, dynamic_shapes=shapes)
    inputs: tuple[Any, ...] = args
    if free_batch:
        names = exported.graph_signature.user_inputs
        inputs = tuple(n.meta["val"] for n in exported.graph.nodes if n.name in names)
    with contextlib.ExitStack() as stack:
        module = exported.module(check_guards=False)
        return aot_export_joint_with_descriptors(stack, module, inputs).graph_module


def real_inputs(graph: fx.Graph, symbols: Substitution | None = None) -> list[torch.Tensor]:
    inputs = []
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        shape = [concrete(size, symbols) for size in value.shape]
        make = torch.rand if value.is_floating_point() else torch.zeros
        inputs.append(make(shape, dtype=value.dtype))
    return inputs


def run_and_free(graph: fx.Graph, inputs: Sequence[torch.Tensor]) -> Any:
    """Run node after node; every value is let go right after its last use."""
    last = {source: node for node in graph.nodes for source in node.all_input_nodes}
    env: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = getattr(graph.owning_module, node.target)
        elif node.op == "output":
            return fx.map_arg(node.args[0], env.__getitem__)
        else:
            args = fx.map_arg(node.args, env.__getitem__)
            kwargs = fx.map_arg(node.kwargs, env.__getitem__)
            env[node] = node.target(*args, **kwargs)
            del args, kwargs
        for source in [*node.all_input_nodes, node]:
            if last.get(source, node) is node and (source in last or source is node):
                env.pop(source, None)
    raise AssertionError("no output node")


def simulate(graph: fx.Graph, measured: dict[fx.Node, OpMeasurement]) -> int:
    """Peak of `run_and_free` as the measurements predict it."""
    owners: dict[fx.Node, list[int | None]] = {}
    sizes: list[int] = []
    for node in graph.nodes:
        owners[node] = _owners(node, owners, measured, sizes)
    nodes = list(graph.nodes)
    dies: dict[int, int] = {}
    for step, node in enumerate(nodes):
        for reader in [node, *node.all_input_nodes]:
            dies.update({owner: step for owner in owners[reader] if owner is not None})
    live = peak = born = 0
    for step, node in enumerate(nodes):
        fresh = [o for o in owners[node] if o is not None and o >= born]
        live += sum(sizes[o] for o in set(fresh))
        born = max([born, *(o + 1 for o in fresh)])
        if node in measured:
            peak = max(peak, live + measured[node].workspace)
        live -= sum(sizes[o] for o, end in dies.items() if end == step)
    return peak


def _owners(
    node: fx.Node,
    owners: dict[fx.Node, list[int | None]],
    measured: dict[fx.Node, OpMeasurement],
    sizes: list[int],
) -> list[int | None]:
    if node.op != "call_function":
        return [None]
    if node.target is operator.getitem:
        source, index = node.args
        return [owners[source][index]]  # type: ignore[index]
    result: list[int | None] = []
    tensors = _tensor_arguments(node)
    found = measured[node]
    for size, alias in zip(found.output_bytes, found.aliases, strict=True):
        if alias is not None:
            result.append(owners[tensors[alias]][0])
        elif size:
            sizes.append(size)
            result.append(len(sizes) - 1)
        else:
            result.append(None)
    return result


def _tensor_arguments(node: fx.Node) -> list[fx.Node]:
    found: list[fx.Node] = []

    def note(argument: fx.Node) -> fx.Node:
        if isinstance(argument.meta.get("val"), torch.Tensor):
            found.append(argument)
        return argument

    fx.map_arg((node.args, node.kwargs), note)
    return found
