"""The model as calibration runs it: its eval-mode graph, batches, statistics of its norms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.batches import MOST, read_batch
from graphopt.errors import InputMismatch, NonFiniteError, UnsupportedError
from graphopt.ir.aliases import is_written
from graphopt.ir.graphs import lookup
from graphopt.ir.interpret import Value, call, interpret
from graphopt.ir.program import Program
from graphopt.pipeline import PassContext

aten = torch.ops.aten
# Samples of noise where there is no data.
_NOISE_SAMPLES = 256
# Samples that are differentiated at once: at most so many, and so many elements of all sites.
_MOST_AT_ONCE, _ELEMENTS_AT_ONCE = 64, 1 << 26


@dataclass(frozen=True)
class Reference:
    """What calibration runs.

    Attributes:
        module: The graph in eval mode.
        inputs: The flat inputs of each batch.
        statistics: Tensors that stand in for those at some paths: norms' statistics on noise.
        targets: What came with the inputs of each batch, or None.
        stand_ins: What is called instead of some nodes' targets, by node name.
    """

    module: fx.GraphModule
    inputs: Sequence[Sequence[Tensor]]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    targets: Sequence[Any] = ()
    stand_ins: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def run(self, node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
        """Run one call, or what stands in for it, on values that a function gives."""
        stand_in = self.stand_ins.get(node.name)
        if stand_in is None:
            return call(node, value)
        return stand_in(*fx.map_arg(node.args, value), **fx.map_arg(node.kwargs, value))

    def attribute(self, node: fx.Node) -> Any:
        """The value of a ``get_attr`` node; of its own, so that nothing writes to the model."""
        path = str(node.target)
        if path in self.statistics:
            return self.statistics[path]
        value = lookup(self.module, path)
        if not isinstance(value, Tensor):
            return value
        return value.detach().clone() if is_written(node) else value.detach()

    def batch_size(self, index: int) -> int:
        """Samples of a batch."""
        return max((int(t.shape[0]) for t in self.inputs[index] if t.dim()), default=1)

    def parts(self, index: int, at_once: int) -> list[list[Tensor]]:
        """A batch as smaller ones; whole where something in it has no samples."""
        flat, size = self.inputs[index], self.batch_size(index)
        if not all(t.dim() and t.shape[0] == size for t in flat):
            return [list(flat)]
        return [list(part) for part in zip(*(t.split(at_once) for t in flat), strict=True)]


def samples_at_once(elements: int) -> int:
    """How many samples are differentiated at once, whose sites have so many elements each."""
    return max(1, min(_MOST_AT_ONCE, _ELEMENTS_AT_ONCE // max(elements, 1)))


def reference(program: Program, context: PassContext, most_samples: int) -> Reference:
    """Prepare calibration on the data, or on noise where there is none.

    Args:
        program: The program.
        context: Its data.
        most_samples: How many samples may be used.

    Raises:
        InputMismatch: The model doesn't take the data.
        NonFiniteError: The data holds NaN.
        UnsupportedError: There is no data, and no BatchNorm that remembers what data is like.
    """
    module = program.specialize(False)
    if context.data is None:
        return _without_data(program, module, context, most_samples)
    examples = program.signature.flatten_inputs(context.args, context.kwargs)
    inputs: list[list[Tensor]] = []
    targets: list[Any] = []
    room = most_samples
    for batch in itertools.islice(context.data, MOST):
        read = read_batch(batch, context.data_loss, len(context.args))
        flat = program.signature.flatten_inputs(read.args, read.kwargs)
        for leaf, tensor, example in zip(program.signature.inputs, flat, examples, strict=True):
            if tensor.dtype != example.dtype:
                raise InputMismatch(
                    f"the calibration data has {tensor.dtype} in {leaf.name}, the example inputs "
                    f"{example.dtype}",
                    hint="convert the data",
                )
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise NonFiniteError(
                    f"the calibration data holds NaN or infinity in {leaf.name}",
                    hint="clean the data first",
                )
        program.signature.check(flat)
        if any(0 in tensor.shape for tensor in flat):
            continue  # nothing is learnt from no sample
        inputs.append([t.detach().clone()[:room] if t.dim() else t for t in flat])
        paired = read.targets is not None
        targets.append(read.targets if paired else _targets(batch, len(context.args)))
        room -= max((int(t.shape[0]) for t in flat if t.dim()), default=1)
        if room <= 0:
            break
    if not inputs:
        raise InputMismatch(
            "data yields no batch with a sample in it", hint="give at least one, or data=None"
        )
    return Reference(module, inputs, targets=targets)


def _targets(batch: Any, arguments: int) -> Any:
    """What comes with a batch's inputs, whether a loss takes it or not."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    return batch[1] if pair and arguments != 2 else None


@dataclass(frozen=True)
class BatchNorm:
    """A call of BatchNorm that uses running statistics.

    Attributes:
        value: What it normalises.
        statistics: The nodes of running mean and variance.
        eps: What it adds to the variance.
    """

    value: fx.Node
    statistics: tuple[fx.Node, fx.Node]
    eps: float

    @property
    def paths(self) -> tuple[str, str]:
        """Where mean and variance are."""
        mean, variance = self.statistics
        return str(mean.target), str(variance.target)


def batch_norms(graph: fx.Graph) -> dict[fx.Node, BatchNorm]:
    """The BatchNorms of an eval-mode graph that use running statistics."""
    found = {}
    for node in graph.nodes:
        if getattr(node.target, "overloadpacket", None) is aten.batch_norm:
            value, _, _, mean, variance, training, _, eps, *_ = node.args
            if isinstance(mean, fx.Node) and isinstance(variance, fx.Node) and not training:
                assert isinstance(value, fx.Node)
                assert isinstance(eps, float)
                found[node] = BatchNorm(value, (mean, variance), eps)
    return found


def _without_data(
    program: Program, module: fx.GraphModule, context: PassContext, most_samples: int
) -> Reference:
    norms = batch_norms(module.graph)
    if not norms:
        raise UnsupportedError(
            "linearization without data of a model without BatchNorm: nothing tells what its "
            "activations are like",
            hint="pass data=, some unlabelled batches",
        )
    generator = torch.Generator().manual_seed(context.seed)
    examples = program.signature.flatten_inputs(context.args, context.kwargs)
    count = min(_NOISE_SAMPLES, most_samples)
    noise = Reference(module, [[_noise(example, count, generator) for example in examples]])
    statistics: dict[str, Tensor] = {}
    _observe_norms(noise, statistics)
    return Reference(module, noise.inputs, statistics)


def _noise(example: Tensor, count: int, generator: torch.Generator) -> Tensor:
    if not example.dim():
        return example
    shape = (count, *example.shape[1:])
    if example.is_floating_point():
        drawn = torch.randn(shape, generator=generator)
        return drawn.to(example.dtype).to(example.device)
    places = torch.randint(example.numel(), shape, generator=generator)
    return example.flatten()[places.to(example.device)]


@torch.no_grad()
def _observe_norms(noise: Reference, statistics: dict[str, Tensor]) -> None:
    """Run noise with every BatchNorm normalising by it, and note by what.

    What then comes out of a norm has the mean and deviation that the data had: its bias and scale.
    """
    norms = batch_norms(noise.module.graph)

    def run(node: fx.Node, value: Value) -> Any:
        norm = norms.get(node)
        if norm is None:
            return call(node, value)
        own = moments(value(norm.value))
        statistics.update(zip(norm.paths, own, strict=True))
        known = dict(zip(norm.statistics, own, strict=True))
        return call(node, lambda each: known[each] if each in known else value(each))

    interpret(noise.module.graph, noise.inputs[0], noise.attribute, run)


def moments(*values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of each channel (dimension 1) over several batches."""
    axes = [[i for i in range(v.dim()) if i != 1] for v in values]
    count = sum(v.numel() // v.shape[1] for v in values)
    double = [v.double() for v in values]
    mean = sum(v.sum(a) for v, a in zip(double, axes, strict=True)) / count
    shape = [[-1 if i == 1 else 1 for i in range(v.dim())] for v in values]
    variance = (
        sum((v - mean.view(s)).square().sum(a) for v, a, s in zip(double, axes, shape, strict=True))
        / count
    )
    return mean.to(values[0].dtype), variance.to(values[0].dtype)
