"""Task graphs that solver tests and the solver benchmark share."""

from __future__ import annotations

import random
from collections.abc import Sequence

from graphopt.solvers import Task, TaskGraph, Value


def chain(length: int, *, duration: int = 1, size: int = 1) -> TaskGraph:
    """A training chain: f1 .. fL, then bL .. b1, where b_i takes f_{i-1} and b_{i+1}."""
    forward = [Layer(duration, size, (i - 1,) if i else ()) for i in range(length)]
    return training(forward, backward_factor=1.0, output_needed=0.0)


class Layer:
    """One forward operation: its duration, the bytes of its output, the layers it takes."""

    def __init__(self, duration: int, size: int, inputs: Sequence[int] = ()) -> None:
        """Notes the figures."""
        self.duration, self.size, self.inputs = duration, size, tuple(inputs)


def training(
    layers: Sequence[Layer],
    *,
    backward_factor: float = 2.0,
    output_needed: float = 0.5,
    workspace: float = 0.0,
    statistics: bool = False,
    seed: int = 0,
) -> TaskGraph:
    """The training graph of a forward graph: every layer gets a backward task.

    Args:
        layers: in topological order; the last one is the loss.
        backward_factor: duration of a backward task relative to its forward task.
        output_needed: share of the layers whose backward task takes their output as well.
        workspace: workspace of every task relative to its output.
        statistics: gives every layer a second, small output that its backward task takes.
        seed: of the choice of those layers.
    """
    rng = random.Random(seed)
    tasks: list[Task] = []
    values: list[Value] = []
    output: list[int] = []
    second: list[int | None] = []
    users: list[list[int]] = [[] for _ in layers]
    for index, layer in enumerate(layers):
        made = [len(values)]
        values.append(Value(layer.size, len(tasks)))
        if statistics:
            made.append(len(values))
            values.append(Value(max(1, layer.size // 64), len(tasks)))
        output.append(made[0])
        second.append(made[1] if statistics else None)
        for source in layer.inputs:
            users[source].append(index)
        tasks.append(
            Task(
                layer.duration,
                tuple(output[i] for i in layer.inputs),
                tuple(made),
                int(workspace * layer.size),
                name=f"f{index}",
            )
        )
    gradient: dict[int, int] = {}
    for index in reversed(range(len(layers))):
        layer = layers[index]
        inputs = [output[i] for i in layer.inputs] + [gradient[u] for u in users[index]]
        if rng.random() < output_needed or not users[index]:
            inputs.append(output[index])
        if second[index] is not None:
            inputs.append(second[index])
        gradient[index] = len(values)
        size = sum(layers[i].size for i in layer.inputs) or 1
        values.append(Value(size, len(tasks), keep=False))
        tasks.append(
            Task(
                int(layer.duration * backward_factor),
                tuple(dict.fromkeys(inputs)),
                (gradient[index],),
                int(workspace * layer.size),
                name=f"b{index}",
            )
        )
    return TaskGraph(tuple(tasks), tuple(values))


def resnet(
    stages: Sequence[int] = (3, 4, 6, 3), *, width: int = 1 << 20, seed: int = 0, **options: float
) -> TaskGraph:
    """Training graph of a bottleneck ResNet, like ResNet-50 with the default stages."""
    layers = [Layer(200, 4 * width), Layer(10, 4 * width), Layer(8, 4 * width)]

    def add(duration: int, size: int, *inputs: int) -> int:
        layers.append(Layer(duration, size, inputs))
        return len(layers) - 1

    layers[1].inputs, layers[2].inputs = (0,), (1,)
    last = add(5, width, 2)
    for stage, blocks in enumerate(stages):
        size = 4 * width >> stage
        for block in range(blocks):
            short = last
            if block == 0:
                short = add(120, size, last)
                short = add(size * 6 // width, size, short)
            inner = size // 4
            for kind in (60, 130, 60):
                wide = size if kind == 60 and layers[last].size == inner else inner
                last = add(kind, wide, last)
                last = add(max(1, wide * 6 // width), wide, last)
                if wide == inner:
                    last = add(max(1, wide * 4 // width), wide, last)
            last = add(max(1, size * 4 // width), size, last, short)
            last = add(max(1, size * 4 // width), size, last)
    last = add(5, width >> 6, last)
    add(2, 64, add(10, width >> 10, last))
    return training(layers, seed=seed, **options)


def unet(depth: int = 4, *, width: int = 1 << 22, seed: int = 0, **options: float) -> TaskGraph:
    """Training graph of a U-Net: long skips from the contracting to the expanding path."""
    layers = [Layer(50, width)]
    skips: list[int] = []
    for level in range(depth):
        size = width >> level
        for _ in range(2):
            layers.append(Layer(150, size, (len(layers) - 1,)))
            layers.append(Layer(size * 8 // width + 1, size, (len(layers) - 1,)))
        skips.append(len(layers) - 1)
        layers.append(Layer(size * 4 // width + 1, size // 4, (len(layers) - 1,)))
    for level in reversed(range(depth)):
        size = width >> level
        layers.append(Layer(60, size, (len(layers) - 1,)))
        layers.append(Layer(size * 4 // width + 1, 2 * size, (len(layers) - 1, skips[level])))
        for _ in range(2):
            layers.append(Layer(150, size, (len(layers) - 1,)))
            layers.append(Layer(size * 8 // width + 1, size, (len(layers) - 1,)))
    layers.append(Layer(10, 64, (len(layers) - 1,)))
    return training(layers, seed=seed, **options)


def transformer(blocks: int = 12, *, width: int = 1 << 16, **options: float) -> TaskGraph:
    """Training graph of a decoder: `blocks` equal blocks of 14 operations."""
    options.setdefault("output_needed", 1.0)
    layers = [Layer(5, width)]

    def add(duration: int, size: int, *inputs: int) -> int:
        layers.append(Layer(duration, size, inputs))
        return len(layers) - 1

    last = 0
    for _ in range(blocks):
        norm = add(8, width, last)
        query, key, value = (add(60, width, norm) for _ in range(3))
        scores = add(30, 4 * width, query, key)
        soft = add(20, 4 * width, scores)
        mixed = add(30, width, soft, value)
        last = add(4, width, last, add(60, width, mixed))
        norm = add(8, width, last)
        wide = add(16, 4 * width, add(240, 4 * width, norm))
        last = add(4, width, last, add(240, width, wide))
    add(10, 64, add(400, 8 * width, last))
    return training(layers, **options)


def layered(
    n: int, *, seed: int = 0, layer_width: float = 0.3, degree: float = 4.0, reach: int = 2
) -> TaskGraph:
    """A random layered graph: edges mostly go to the next layers, a few go far."""
    rng = random.Random(seed)
    per_layer = max(1, int(n ** (0.5 + layer_width / 2)))
    layer_of: list[int] = []
    while len(layer_of) < n:
        count = max(1, int(rng.gauss(per_layer, per_layer * 0.4)))
        layer_of += [layer_of[-1] + 1 if layer_of else 0] * count
    layer_of = layer_of[:n]
    members: dict[int, list[int]] = {}
    for node, layer in enumerate(layer_of):
        members.setdefault(layer, []).append(node)
    tasks, values = [], []
    for node in range(n):
        layer = layer_of[node]
        sources: set[int] = set()
        for _ in range(rng.randint(1, max(1, int(degree))) if layer else 0):
            back = 1 if rng.random() < 0.75 else rng.randint(1, max(1, reach * 3))
            sources.add(rng.choice(members[max(0, layer - back)]))
        values.append(Value(rng.randint(1, 1000) * 10, node))
        tasks.append(Task(rng.randint(0, 1000), tuple(sorted(sources)), (node,)))
    return TaskGraph(tuple(tasks), tuple(values))


def tiny(seed: int, n: int = 6, *, general: bool = True) -> TaskGraph:
    """A small random graph for exhaustive search, with every feature of the general form."""
    rng = random.Random(seed)
    tasks, values = [], []
    for index in range(n):
        count = rng.choice((1, 1, 2, 0)) if general and index else 1
        sources = rng.sample(range(len(values)), min(len(values), rng.randint(0, 3)))
        made = tuple(range(len(values), len(values) + count))
        values += [
            Value(rng.randint(0, 5), index, keep=general and rng.random() < 0.15) for _ in made
        ]
        tasks.append(
            Task(
                rng.randint(0, 4),
                tuple(sorted(sources)),
                made,
                rng.choice((0, 0, 2)) if general else 0,
                recomputable=not general or rng.random() < 0.85,
            )
        )
    return TaskGraph(tuple(tasks), tuple(values))
