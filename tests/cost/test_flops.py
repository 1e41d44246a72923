from __future__ import annotations

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from graphopt.cost import FlopCounter, bytes_moved, flops, graph_flops, symbolic_flops
from graphopt.cost.sizes import output_bytes
from tests.cost.joint_graphs import SmallCnn, SmallTransformer, cnn, joint_graph, transformer


def exported(model: nn.Module, *args, shapes=None):
    program = torch.export.export(model, args, strict=False, dynamic_shapes=shapes)
    return program.module(check_guards=False).graph


def only(graph, op):
    return next(n for n in graph.nodes if n.op == "call_function" and op in str(n.target))


class Products(nn.Module):
    """Ops that the flop counter sees after decomposition only."""

    def forward(self, a, b, v):
        c = torch.einsum("bij,bjk->bik", a, b)
        d = torch.matmul(c, v.unsqueeze(-1)).squeeze(-1)
        return d + torch.matmul(v, b.transpose(1, 2)).sum() + torch.matmul(v, v) + (b @ v).sum()


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, groups=2, stride=2)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.line = nn.Conv1d(4, 6, 3, padding="same")

    def forward(self, x):
        y = self.up(self.grouped(x))
        return self.line(y.flatten(2)), self.line(y.flatten(2)[0])


CASES = {
    "cnn": lambda: (SmallCnn(), (torch.rand(2, 3, 8, 8),)),
    "transformer": lambda: (SmallTransformer(), (torch.randint(0, 50, (2, 6)),)),
    "products": lambda: (
        Products(),
        (torch.rand(2, 3, 4), torch.rand(2, 4, 5), torch.rand(5)),
    ),
    "convolutions": lambda: (Convolutions(), (torch.rand(2, 4, 9, 9),)),
}


@pytest.mark.parametrize("name", CASES)
def test_forward_graph_counts_what_the_flop_counter_counts_at_run_time(name):
    model, args = CASES[name]()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*args)
    assert counter.get_total_flops() > 0
    assert graph_flops(exported(model, *args)) == counter.get_total_flops()


@pytest.mark.parametrize("make", [cnn, transformer])
def test_joint_graph_counts_forward_and_backward(make):
    model, args = make()
    with FlopCounterMode(display=False) as counter:
        model(*args).sum().backward()
    assert graph_flops(joint_graph(model, args).graph) == counter.get_total_flops()


def lstm_flops(rows, sizes, hidden, gates):
    return sum(2 * rows * gates * hidden * (width + hidden) for width in sizes)


@pytest.mark.parametrize(
    ("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)], ids=["lstm", "gru", "rnn"]
)
def test_recurrent_layers_by_hand(kind, gates):
    layer, x = kind(5, 7, num_layers=2, bidirectional=True), torch.rand(3, 4, 5)
    expected = lstm_flops(12, [5, 5, 14, 14], 7, gates)
    assert graph_flops(exported(layer, x)) == expected
    with torch.no_grad(), FlopCounter() as counter:
        layer(x)
    assert counter.total == expected
    with FlopCounter() as counter:
        layer(x.requires_grad_())[0].sum().backward()
    # Two products in backward for each in forward; unless fused, no gradient of the first state.
    first_state = 0 if kind is nn.LSTM else 4 * 2 * 4 * gates * 7 * 7
    assert counter.total == 3 * expected - first_state


def test_recurrent_cell_by_hand():
    cell, x, state = nn.LSTMCell(5, 7), torch.rand(3, 5), (torch.rand(3, 7), torch.rand(3, 7))
    assert graph_flops(exported(cell, x, state)) == lstm_flops(3, [5], 7, 4)


def test_fused_attention_on_the_cpu_by_hand():
    q = torch.rand(2, 3, 10, 8, requires_grad=True)
    k = torch.rand(2, 3, 12, 8, requires_grad=True)
    one = 2 * 2 * 3 * 10 * 12 * 8
    with FlopCounter() as counter:
        F.scaled_dot_product_attention(q, k, k).sum().backward()
    assert counter.total == 2 * one + 5 * one

    class Attention(nn.Module):
        def forward(self, q, k):
            return F.scaled_dot_product_attention(q, k, k)

    assert graph_flops(exported(Attention(), q.detach(), k.detach())) == 2 * one


def test_graph_modules_inside_an_autograd_function_are_counted():
    inner = torch.fx.symbolic_trace(nn.Linear(4, 4))

    class Planned(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return inner(x)

        @staticmethod
        def backward(ctx, grad):
            return inner(grad)

    with FlopCounter() as counter:
        Planned.apply(torch.rand(3, 4, requires_grad=True)).sum().backward()
    assert counter.total == 2 * (2 * 3 * 4 * 4)


def test_conditional_counts_the_dearer_branch_in_a_graph_and_the_taken_one_when_run():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.big, self.small = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return torch.cond(
                x.sum() > 0, lambda x: self.big(self.big(x)), lambda x: self.small(x), (x,)
            )

    model, x = Branches(), torch.rand(2, 4)
    assert graph_flops(exported(model, x)) == 2 * (2 * 2 * 4 * 4)
    graph_module = torch.export.export(model, (x,), strict=False).module(check_guards=False)
    with torch.no_grad(), FlopCounter() as counter:
        graph_module(-x)
    assert counter.total == 2 * 2 * 4 * 4


def test_regions_without_gradient_are_counted():
    class Region(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            with torch.no_grad():
                y = self.layer(x)
            return self.layer(x + y)

    model, x = Region(), torch.rand(2, 4)
    graph = exported(model, x)
    assert graph_flops(graph) == 2 * (2 * 2 * 4 * 4)
    with FlopCounter() as counter:
        graph.owning_module(x).sum().backward()
    assert counter.total == 3 * (2 * 2 * 4 * 4)


def test_a_free_batch_gives_expressions():
    model, x = SmallCnn(blocks=1), torch.rand(4, 3, 8, 8)
    graph = exported(model, x, shapes=({0: Dim.AUTO},))
    batch = next(iter(graph.find_nodes(op="placeholder"))).meta["val"].shape[0].node.expr
    total = sum(symbolic_flops(node) for node in graph.nodes)
    per_sample = 2 * 64 * 8 * 9 * (3 + 8 + 8) + 2 * 8 * 10
    assert sympy.expand(total - per_sample * batch) == 0
    node = only(graph, "conv2d")
    for size in (4, 6):
        given = {batch: size}
        assert graph_flops(graph, given) == per_sample * size
        assert bytes_moved(node, given) == 4 * (size * 64 * (3 + 8) + 8 * 3 * 9 + 8)
        assert output_bytes(node, given) == [size * 8 * 64 * 4]


def test_views_and_elementwise_ops():
    class Plain(nn.Module):
        def forward(self, x):
            return (x.view(-1) + 1).view(4, 3)

    graph = exported(Plain(), torch.rand(3, 4))
    assert graph_flops(graph) == 0
    view, add = only(graph, "view"), only(graph, "add")
    assert (bytes_moved(view), output_bytes(view)) == (0, [0])
    assert (bytes_moved(add), output_bytes(add), flops(add)) == (96, [48], 0)
