"""Which results lie in whose memory, held against what the kernels really return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.cost.sizes import is_alias
from graphopt.ir.aliases import shares
from graphopt.ir.sharing import gives_only_aliases, gives_only_views, shared_arguments
from graphopt.ir.storage import aliased_input

aten = torch.ops.aten
OPS: dict[Any, tuple[Any, ...]] = {
    aten.view.default: ([2, 12],),
    aten._unsafe_view.default: ([2, 12],),
    aten.t.default: (),
    aten.select.int: (0, 1),
    aten.split.Tensor: (2,),
    aten.split_with_sizes.default: ([1, 3],),
    aten.unsafe_split.Tensor: (2,),
    aten.unsafe_split_with_sizes.default: ([1, 3],),
    aten.unsafe_chunk.default: (2,),
    aten.unbind.int: (),
    aten.tensor_split.sections: (2,),
    aten.detach.default: (),
    aten.add.Tensor: (1,),
    aten.clone.default: (),
    aten.relu.default: (),
    aten.topk.default: (1,),
}


@pytest.mark.parametrize("target", OPS, ids=str)
def test_all_readers_agree_with_the_kernel(target: Any) -> None:
    x = torch.rand(4, 6)
    result = target(x, *OPS[target])
    first = result[0] if isinstance(result, (list, tuple)) else result
    really = first.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    graph = fx.Graph()
    source = graph.placeholder("x")
    source.meta["val"] = x
    node = graph.call_function(target, (source, *OPS[target]))
    node.meta["val"] = result
    assert bool(shared_arguments(target)) == really
    assert gives_only_aliases(target) == gives_only_views(target) == is_alias(node) == really
    assert shares(node) == ([source] if really else [])
    assert aliased_input(node) is (source if really else None)


def test_reshape_may_copy() -> None:
    assert shared_arguments(aten.reshape.default)
    assert gives_only_aliases(aten.reshape.default)
    assert not gives_only_views(aten.reshape.default)


def test_an_op_in_place_gives_no_new_view() -> None:
    assert shared_arguments(aten.add_.Tensor) == {"self"}
    assert not gives_only_views(aten.add_.Tensor)


PARTS: dict[str, Callable[[Tensor], Any]] = {
    "split": lambda y: y.split(2, 1),
    "sizes": lambda y: y.split([1, 3], 1),
    "unbind": lambda y: y.unbind(1),
    "unsafe": lambda y: torch.unsafe_split(y, 2, 1),
}


class WritesBelow(nn.Module):
    """Writes to a tensor after it was taken apart, and reads a part."""

    def __init__(self, parts: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        first, *_ = self.parts(y)
        y.mul_(3)
        return first * 1


@pytest.mark.parametrize("name", PARTS)
def test_a_part_sees_what_is_written_to_the_whole(name: str) -> None:
    model, x = WritesBelow(PARTS[name]), torch.rand(3, 4)
    module = graphopt.optimize(model, example_inputs=(x,), verify=False)
    assert module.report["canonicalize"]["functionalized"] == 1
    torch.testing.assert_close(module(x), model(x))
