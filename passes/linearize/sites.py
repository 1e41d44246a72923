"""Sites: the calls of non-linearities, and how much of them can be replaced.

A site's values have free dimensions (the batch, a sequence of any length) and fixed ones. Its
*positions* are the places of one block of fixed dimensions beside each other, the largest that
there is; each can be kept or replaced by itself, for all places of the other dimensions at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.program import Program
from graphopt.passes.linearize.activations import Activation, family_of, is_in_place

aten = torch.ops.aten

# Operators whose outputs have channels in dimension 1, and in the last one.
_CHANNELS_FIRST = {
    aten.conv1d, aten.conv2d, aten.conv3d, aten.convolution, aten.batch_norm, aten.group_norm,
    aten.instance_norm, aten.conv_transpose1d, aten.conv_transpose2d, aten.conv_transpose3d,
    aten.max_pool1d, aten.max_pool2d, aten.max_pool3d, aten.avg_pool1d, aten.avg_pool2d,
    aten.avg_pool3d, aten.adaptive_avg_pool1d, aten.adaptive_avg_pool2d, aten.adaptive_avg_pool3d,
    aten.pixel_shuffle, aten.upsample_nearest2d, aten.upsample_bilinear2d,
}  # fmt: skip
_CHANNELS_LAST = {
    aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.layer_norm, aten.rms_norm,
    aten.embedding, aten.einsum,
}  # fmt: skip
# How many ops of the same shape are looked through for one that tells where channels are.
_LOOKED_THROUGH = 64


@dataclass(frozen=True, eq=False)
class Site:
    """One call of a non-linearity.

    Attributes:
        node: The call, in the graph where it was found.
        family: What it is.
        shape: Sizes of what it reads at the example inputs.
        block: First and last-plus-one dimension of its positions.
        channel: The dimension that has its channels, inside the block; None: it has none.
        per_sample: How many elements of one sample reach it.
        fixed: Why it has to stay as it is, or None.
    """

    node: fx.Node
    family: Activation
    shape: tuple[int, ...]
    block: tuple[int, int]
    channel: int | None
    per_sample: int
    fixed: str | None

    @property
    def name(self) -> str:
        """The node's name."""
        return self.node.name

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes of the block."""
        return self.shape[self.block[0] : self.block[1]]

    @property
    def positions(self) -> int:
        """Places of the block."""
        return math.prod(self.sizes)

    @property
    def weight(self) -> int:
        """Elements of one sample that one position stands for."""
        return self.per_sample // self.positions

    @property
    def channels(self) -> int:
        """How many channels there are; one where there are none."""
        return 1 if self.channel is None else self.shape[self.channel]

    @property
    def is_pool(self) -> bool:
        """Whether it takes maxima over windows; these are replaced as a whole, by averages."""
        return self.family.name == "max_pool"

    @property
    def has_slopes(self) -> bool:
        """Whether it has a parameter for each channel, as PReLU may."""
        value = _tensor_argument(self.node)
        return value is not None and value.numel() > 1

    def average(self) -> tuple[Any, tuple[Any, ...]]:
        """A pooling's average: the op, and what it takes besides the value."""
        packet = self.node.target.overloadpacket  # type: ignore[union-attr]
        op = getattr(aten, packet.__name__.replace("max", "avg")).default
        window, *rest = self.node.args[1:]
        stride, padding, _, ceil = [*rest, *([], 0, 1, False)[len(rest) :]]
        return op, (window, stride or window, padding, ceil, False)

    def base(self, x: torch.Tensor) -> torch.Tensor:
        """What a replacement is a polynomial of."""
        if not self.is_pool:
            return x
        op, args = self.average()
        found: torch.Tensor = op(x, *args)
        return found

    def channel_of_positions(self) -> torch.Tensor:
        """The channel of each position: ``[positions]``, int64."""
        if self.channel is None or self.is_pool:
            return torch.zeros(self.positions, dtype=torch.int64)
        places = torch.arange(self.channels)
        beside = [1] * len(self.sizes)
        beside[self.channel - self.block[0]] = -1
        return places.view(beside).expand(self.sizes).reshape(-1)

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        """A value as ``[free, positions, free]``, the dimensions before and behind flattened."""
        start, stop = self.block
        before = math.prod(value.shape[:start])
        return value.reshape(before, self.positions, math.prod(value.shape[stop:]))


def read_by(node: fx.Node) -> fx.Node:
    """The value that a call of a non-linearity reads."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return source


def sites(program: Program) -> list[Site]:
    """The sites of a program in the order of their calls, as inference runs them.

    Only what depends on the model's inputs counts: a function of parameters alone is a constant.
    """
    return sites_of(program.module if program.eval_module is None else program.eval_module)


def sites_of(module: fx.GraphModule) -> list[Site]:
    """The sites of one graph."""
    graph = module.graph
    read: set[fx.Node] = set()
    batch = batch_of(graph)
    found = []
    for node in graph.nodes:
        if node.op == "placeholder" or any(n in read for n in node.all_input_nodes):
            read.add(node)
            family = family_of(node)
            if family is not None:
                site = _site(node, family, batch, read)
                found += [] if site is None else [site]
            elif node.op == "call_function":
                found += _inside(module, node, batch)
    return found


def _inside(module: fx.GraphModule, node: fx.Node, batch: int) -> Iterator[Site]:
    """Sites in the sub-graphs of a call, which stay."""
    for source in node.all_input_nodes:
        inner = getattr(module, str(source.target), None) if source.op == "get_attr" else None
        if isinstance(inner, fx.GraphModule):
            everything = set(inner.graph.nodes)
            for call in inner.graph.nodes:
                family = family_of(call)
                site = _site(call, family, batch, everything) if family is not None else None
                if site is not None:
                    yield _kept(site, f"it is inside of {node.name} ({node.target})")


def _kept(site: Site, reason: str) -> Site:
    return Site(
        site.node, site.family, site.shape, site.block, site.channel, site.per_sample, reason
    )


def _site(node: fx.Node, family: Activation, batch: int, read: set[fx.Node]) -> Site | None:
    data = [n for n in node.all_input_nodes if n in read and _floating(n)]
    if not data or (family.name in ("where", "maximum", "minimum") and not _floating(node)):
        return None
    source = data[0]
    if family.name == "where":
        condition = _condition(node)
        if condition is None or not _compares_data(condition):
            return None
        source = condition
    value = source.meta["val"]
    shape = tuple(hint(s) for s in value.shape)
    free = [not isinstance(s, int) for s in value.shape]
    if not any(free) and shape and shape[0] % batch == 0:
        free[0] = True
    channel = _channel(data[0], shape)
    block = (0, 0) if family.name == "max_pool" else _block(shape, free, channel)
    inside = channel is not None and not free[channel]
    return Site(
        node, family, shape, block, channel if inside else None,
        per_sample=max(1, math.prod(shape) // batch),
        fixed=_reason(node, family, data, block),
    )  # fmt: skip


def _condition(node: fx.Node) -> fx.Node | None:
    """What a selection goes by."""
    found = node.args[1 if "masked_fill" in str(node.target) else 0]
    return found if isinstance(found, fx.Node) else None


def _compares_data(condition: fx.Node) -> bool:
    """Whether a condition is computed from floating values (which are secret)."""
    seen, stack = set(), [condition]
    while stack:
        each = stack.pop()
        if each in seen:
            continue
        seen.add(each)
        if _floating(each) and each.op != "get_attr":
            return True
        stack += each.all_input_nodes
    return False


def _reason(
    node: fx.Node, family: Activation, data: Sequence[fx.Node], block: tuple[int, int]
) -> str | None:
    """Why a site can't be replaced."""
    if is_in_place(node):
        return "it writes in place to memory that others read"
    if len(data) > 1:
        return f"{family.name} of two values"
    if node.args[0] is not data[0]:
        return f"{family.name} of a constant and the value"
    if family.name == "max_pool":
        return _pool_reason(node)
    if not family.elementwise:
        return f"no replacement for {node.target}"
    slopes = _tensor_argument(node)
    if slopes is not None and slopes.numel() > 1 and (family.name != "prelu" or block[0] != 1):
        return f"{family.name} with a tensor of bounds"
    return None


def _pool_reason(node: fx.Node) -> str | None:
    if not isinstance(node.meta.get("val"), torch.Tensor):
        return f"{node.target} gives positions too"
    rest = node.args[1:]
    if len(rest) > 3 and any(d != 1 for d in _listed(rest[3])):
        return "a dilated maximum has no average"
    return None


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _tensor_argument(node: fx.Node) -> torch.Tensor | None:
    """The value of a tensor among the arguments behind the first."""
    for each in node.args[1:]:
        value = each.meta.get("val") if isinstance(each, fx.Node) else None
        if isinstance(value, torch.Tensor):
            return value
    return None


def _floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def batch_of(graph: fx.Graph) -> int:
    """Size of the batch at the example inputs."""
    for node in graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and value.dim():
            return max(1, hint(value.shape[0]))
    return 1


def hint(size: Any) -> int:
    """A size at the example inputs."""
    return size if isinstance(size, int) else int(size.node.hint)


def _block(shape: Sequence[int], free: Sequence[bool], channel: int | None) -> tuple[int, int]:
    """The fixed dimensions beside each other that hold the channel; else those with most places."""
    runs, start = [], None
    for place, is_free in enumerate([*free, True]):
        if is_free and start is not None:
            runs.append((start, place))
            start = None
        elif not is_free and start is None:
            start = place
    for run in runs:
        if channel is not None and run[0] <= channel < run[1]:
            return run
    return max(runs, key=lambda run: math.prod(shape[run[0] : run[1]]), default=(0, 0))


def _channel(node: fx.Node, shape: Sequence[int]) -> int | None:
    """The dimension that holds channels, told by the nearest product, convolution or norm."""
    if len(shape) < 2:
        return None
    seen, queue = {node}, [node]
    while queue and len(seen) < _LOOKED_THROUGH:
        each = queue.pop(0)
        packet = getattr(each.target, "overloadpacket", None)
        if packet in _CHANNELS_FIRST:
            return 1
        if packet in _CHANNELS_LAST:
            return len(shape) - 1
        same = [n for n in each.all_input_nodes if _dims(n) == len(shape) and n not in seen]
        seen.update(same)
        queue += same
    return 1 if len(shape) > 3 else len(shape) - 1


def _dims(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, torch.Tensor) else None
