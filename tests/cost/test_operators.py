from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.cost import (
    OpMeasurement,
    measure_ops,
    operators,
    trace_memory,
)
from tests.cost.joint_graphs import (
    cnn,
    joint_graph,
    real_inputs,
    run_and_free,
    simulate,
    transformer,
)

aten = torch.ops.aten
MODELS = {"cnn": cnn, "transformer": transformer}


def measured_op(node: fx.Node) -> OpMeasurement:
    return measure_ops([node], seconds=True)[node]


def call(target, *tensors, extra=()) -> fx.Node:
    """One node that applies an op to placeholders like the given tensors."""
    graph = fx.Graph()
    nodes = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in tensors]
        for index, fake in enumerate(fakes):
            nodes.append(graph.placeholder(f"x{index}"))
            nodes[-1].meta["val"] = fake
        node = graph.call_function(target, (*nodes, *extra))
        node.meta["val"] = target(*fakes, *extra)
    graph.output(node)
    return node


@pytest.mark.parametrize("name", MODELS)
def test_simulated_peak_of_a_joint_graph_is_the_allocators(name):
    graph = joint_graph(*MODELS[name]()).graph
    measured = measure_ops(graph.nodes)
    assert all(found.measured for found in measured.values())
    inputs = real_inputs(graph)
    with torch.no_grad():
        run_and_free(graph, inputs)  # warm-up
        peak = trace_memory(lambda: run_and_free(graph, inputs)).peak
    assert simulate(graph, measured) == pytest.approx(peak, rel=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_other_batch_sizes_are_predicted_from_symbolic_sizes(name):
    graph = joint_graph(*MODELS[name](), free_batch=True).graph
    free = {
        size.node.expr
        for node in graph.find_nodes(op="placeholder")
        for size in node.meta["val"].shape
        if isinstance(size, torch.SymInt) and size.node.expr.is_symbol
    }
    assert len(free) == 1
    for batch in (3, 9):
        symbols = dict.fromkeys(free, batch)
        measured = measure_ops(graph.nodes, symbols=symbols)
        inputs = real_inputs(graph, symbols)
        with torch.no_grad():
            run_and_free(graph, inputs)
            peak = trace_memory(lambda given=inputs: run_and_free(graph, given)).peak
        assert simulate(graph, measured) == pytest.approx(peak, rel=0.01)


def test_views_and_in_place_ops_allocate_nothing():
    x = torch.rand(4, 6)
    for target, extra in [
        (aten.view.default, ([6, 4],)),
        (aten.t.default, ()),
        (aten._unsafe_view.default, ([24],)),  # its schema doesn't say that it aliases
        (aten.reshape.default, ([2, 12],)),
        (aten.relu_.default, ()),
    ]:
        found = measured_op(call(target, x, extra=extra))
        assert (found.output_bytes, found.workspace, found.aliases) == ((0,), 0, (0,)), target


def test_reshape_that_copies_allocates():
    node = call(aten.reshape.default, torch.rand(4, 6).t(), extra=([24],))
    found = measured_op(node)
    assert found.output_bytes == (96,)
    assert found.aliases == (None,)


def test_multiple_outputs_have_their_own_bytes():
    node = call(aten.native_dropout.default, torch.rand(64, 64), extra=(0.5, True))
    assert measured_op(node).output_bytes == (64 * 64 * 4, 64 * 64)


def test_workspace_of_a_convolution_backward_is_what_the_allocator_sees():
    x, w = torch.rand(4, 8, 16, 16), torch.rand(8, 8, 3, 3)
    grad = torch.rand(4, 8, 16, 16)
    args = ([8], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, True])
    node = call(aten.convolution_backward.default, grad, x, w, extra=args)

    def run():
        return aten.convolution_backward.default(grad, x, w, *args)

    run()
    trace = trace_memory(run)
    found = measured_op(node)
    assert sum(found.output_bytes) == trace.live
    assert found.workspace == trace.peak - trace.live > 0


def test_inputs_keep_their_strides():
    # bmm copies an operand whose inner stride isn't 1; a contiguous stand-in would need no copy.
    plain = call(aten.bmm.default, torch.rand(4, 8, 16), torch.rand(4, 16, 8))
    strided = call(aten.bmm.default, torch.rand(4, 8, 32)[..., ::2], torch.rand(4, 16, 8))
    assert measured_op(plain).workspace == 0
    assert measured_op(strided).workspace > 0


def test_an_expanded_input_allocates_its_storage_only():
    node = call(aten.mul.Tensor, torch.rand(()).expand(1000), torch.rand(1000))
    assert measured_op(node).output_bytes == (4000,)


def test_equal_calls_run_once(monkeypatch):
    class Repeated(nn.Module):
        def forward(self, x):
            for _ in range(5):
                x = torch.tanh(x) * 0.123
            return x

    module = torch.export.export(Repeated(), (torch.rand(7, 11),)).module(check_guards=False)
    runs = []
    original = operators._run_marked

    def counted(call, index, mark):
        runs.append(str(call.target))
        return original(call, index, mark)

    monkeypatch.setattr(operators, "_run_marked", counted)
    seen = []
    measure_ops(module.graph.nodes, progress=lambda done, total: seen.append((done, total)))
    assert sorted(runs) == ["aten.mul.Tensor", "aten.tanh.default"]
    assert seen[-1] == (2, 2)
    measure_ops(module.graph.nodes)
    assert len(runs) == 2


def test_an_op_that_cannot_run_falls_back_to_the_graphs_sizes():
    def failing(x: torch.Tensor) -> torch.Tensor:
        if not isinstance(x, torch._subclasses.FakeTensor):
            raise RuntimeError("needs a licence\nand more")
        return x + 1

    node = call(failing, torch.rand(5))
    found = measure_ops([node])
    assert found[node].output_bytes == (20,)
    assert found[node].workspace == 0
    assert not found[node].measured
    assert found[node].reason == "RuntimeError: needs a licence"


def test_autocast_around_the_call_does_not_count():
    node = call(aten.mm.default, torch.rand(17, 19), torch.rand(19, 23))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = measured_op(node)
        assert torch.is_autocast_enabled("cpu")
    assert (found.output_bytes, found.workspace) == ((17 * 23 * 4,), 0)


def test_random_state_is_untouched():
    node = call(aten.rand_like.default, torch.rand(31))
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measured_op(node)
    assert torch.equal(torch.rand(4), expected)


def test_ints_are_valid_indices_and_floats_valid_probabilities():
    node = call(aten.embedding.default, torch.rand(10, 4), torch.zeros(3, dtype=torch.long))
    assert measured_op(node).measured
    node = call(aten.bernoulli.default, torch.rand(16))
    assert measured_op(node).measured


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_bytes_are_those_of_the_caching_allocator():
    x = torch.rand(300, 300, device="cuda")
    found = measured_op(call(aten.mul.Tensor, x, x))
    assert found.output_bytes[0] >= 300 * 300 * 4
    assert found.output_bytes[0] % 512 == 0


def test_the_backward_of_an_rnn_gets_a_real_workspace() -> None:
    """It crashed the process: what its forward op leaves can't be invented."""
    import graphopt

    model, x = torch.nn.LSTM(8, 8, 2, batch_first=True, dropout=0.3), torch.randn(4, 5, 8)
    planned = graphopt.optimize(model, "memory=1GB", (x,), time_limit=1)
    outputs = []
    for module in (model, planned):
        torch.manual_seed(0)
        out, (hidden, cell) = module(x)
        (out.sum() + hidden.square().sum() + cell.sum()).backward()
        outputs.append((out, hidden, cell, [p.grad for p in module.parameters()]))
    torch.testing.assert_close(outputs[1], outputs[0])
