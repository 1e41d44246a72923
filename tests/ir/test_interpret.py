"""The interpreter: what a graph gives, what it keeps alive, and what it says where a call fails."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from graphopt.errors import InputMismatch, NonFiniteError, RunError, UnsupportedError
from graphopt.ir.capture import capture
from graphopt.ir.interpret import Value, call, fill, held_by, held_in, interpret, placed
from graphopt.ir.regions import region

aten = torch.ops.aten


class Modes(nn.Module):
    """Sub-graphs of every kind that calls refer to, and more than one output."""

    shift: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("shift", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.fc(x)
        with torch.no_grad():
            frozen = y.sin()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = x @ self.fc.weight
        z = torch.cond(x.sum() > 0, lambda t: t.cos(), lambda t: t * 2, (y,))
        return y + frozen * z, cast + self.shift.to(cast.dtype)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 2)

    def forward(self, index: Tensor) -> Tensor:
        return self.table(index) * 2


def captured(model: nn.Module, *inputs: Tensor) -> fx.GraphModule:
    return capture(model.eval(), inputs).specialize(False)


def chain(*targets: Any) -> fx.Graph:
    """Calls of one argument in a row, from a placeholder to the output."""
    graph = fx.Graph()
    node = graph.placeholder("x")
    for target in targets:
        node = graph.call_function(target, (node,))
    graph.output((node,))
    return graph


def nothing(node: fx.Node) -> Any:
    raise AssertionError(f"nobody asks for {node}")


def test_it_gives_what_the_model_gives_through_regions_of_every_kind() -> None:
    torch.manual_seed(0)
    model = Modes()
    module = captured(model, torch.rand(3, 4))
    kinds = {str(n.target) for n in module.graph.nodes if "higher_order" in str(type(n.target))}
    assert len(kinds) == 3, kinds
    for x in (torch.rand(3, 4), -torch.rand(3, 4) - 1):
        torch.testing.assert_close(
            tuple(interpret(module.graph, [x], held_by(module))), model(x), rtol=0, atol=0
        )


def test_gradients_flow_through_it_as_through_the_model() -> None:
    torch.manual_seed(0)
    model = Modes()
    module, x = captured(model, torch.rand(3, 4)), torch.rand(3, 4)
    found = torch.autograd.grad(
        interpret(module.graph, [x], held_by(module))[0].sum(), module.get_parameter("fc.weight")
    )
    want = torch.autograd.grad(model(x)[0].sum(), model.fc.weight)
    torch.testing.assert_close(found, want, rtol=0, atol=0)


def test_tensors_come_from_where_the_attributes_are_looked_up() -> None:
    graph = fx.Graph()
    graph.output((graph.call_function(aten.neg.default, (graph.get_attr("a.b"),)),))
    root = nn.Module()
    root.a = nn.Module()
    root.a.b = nn.Parameter(torch.tensor([1.0]))
    assert interpret(graph, [], held_in({"a.b": torch.tensor([2.0])}))[0].item() == -2
    assert interpret(graph, [], held_by(fx.GraphModule(root, graph)))[0].item() == -1


def test_a_value_dies_after_its_last_use_and_no_sooner() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    a = graph.call_function(aten.sin.default, (x,))
    b = graph.call_function(aten.cos.default, (a,))
    unread = graph.call_function(aten.exp.default, (a,))
    c = graph.call_function(aten.add.Tensor, (b, a))
    d = graph.call_function(aten.neg.default, (c,))
    graph.output((d, b))
    seen: dict[fx.Node, weakref.ref[Tensor]] = {}
    alive: dict[fx.Node, set[fx.Node]] = {}

    def watched(node: fx.Node, value: Value) -> Tensor:
        alive[node] = {n for n, reference in seen.items() if reference() is not None}
        result = call(node, value)
        seen[node] = weakref.ref(result)
        return result

    given = [torch.rand(2)]
    results = interpret(graph, given, nothing, watched)
    assert alive == {a: set(), b: {a}, unread: {a, b}, c: {a, b}, d: {b, c}}
    assert [n for n in (a, b, unread, c, d) if seen[n]() is not None] == [b, d]
    torch.testing.assert_close(results, (-(given[0].sin().cos() + given[0].sin()),
                                         given[0].sin().cos()))  # fmt: skip


def test_a_hook_does_a_call_otherwise_and_later_calls_read_what_it_gave() -> None:
    graph = chain(aten.relu.default, aten.neg.default, aten.relu.default)
    order: list[str] = []

    def hook(node: fx.Node, value: Value) -> Any:
        order.append(node.name)
        return value(node.args[0]) if "relu" in node.name else call(node, value)  # type: ignore[arg-type]

    (found,) = interpret(graph, [torch.tensor([-1.0, 2.0])], nothing, hook)
    assert found.tolist() == [1.0, -2.0]
    assert order == [n.name for n in graph.nodes if n.op == "call_function"]


def test_what_is_known_is_not_run_again_and_all_values_are_kept() -> None:
    graph = chain(aten.sin.default, aten.neg.default, aten.exp.default)
    x, first, second, third, _ = graph.nodes
    values: dict[fx.Node, Any] = placed(graph, [torch.zeros(1)])
    values[first] = torch.ones(1)
    run: list[fx.Node] = []

    def hook(node: fx.Node, value: Value) -> Any:
        run.append(node)
        return call(node, value)

    fill(values, graph.nodes, nothing, hook)
    assert run == [second, third]
    assert [values[n].item() for n in (x, first, second)] == [0, 1, -1]
    assert values[third].item() == pytest.approx(torch.e**-1)


def test_a_failing_call_is_named_with_the_users_line() -> None:
    module = captured(Lookup(), torch.tensor([0, 1]))
    with pytest.raises(RunError, match="index out of range") as caught:
        interpret(module.graph, [torch.tensor([0, 9])], held_by(module))
    error = caught.value
    assert error.node == "embedding"
    assert error.op == "aten.embedding.default"
    assert error.user_line is not None
    assert "test_interpret.py" in error.user_line
    assert "self.table(index)" in error.user_line
    assert isinstance(error.__cause__, IndexError)


def raising(error: BaseException) -> Callable[[Any], Any]:
    def fail(_: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize(
    "error",
    [NonFiniteError("NaN"), torch.OutOfMemoryError("all is full"), KeyboardInterrupt()],
    ids=lambda error: type(error).__name__,
)
def test_errors_that_say_it_themselves_pass_as_they_are(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        interpret(chain(raising(error)), [torch.zeros(1)], nothing)
    assert caught.value is error


def test_a_run_that_failed_is_a_runtime_error_to_others() -> None:
    with pytest.raises(RuntimeError, match="KeyError"):
        interpret(chain(raising(KeyError("k"))), [torch.zeros(1)], nothing)


@pytest.mark.parametrize("count", [0, 2])
def test_as_many_inputs_as_placeholders(count: int) -> None:
    with pytest.raises(InputMismatch, match=f"1 inputs was given {count}"):
        interpret(chain(aten.sin.default), [torch.zeros(1)] * count, nothing)


@pytest.mark.parametrize("kind", ["call_module", "call_method"])
def test_a_node_that_calls_no_function_is_refused_by_name(kind: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.create_node(kind, "relu", (x,), name="odd"),))
    with pytest.raises(UnsupportedError, match=kind) as caught:
        interpret(graph, [torch.zeros(1)], nothing)
    assert caught.value.node == "odd"


@pytest.mark.parametrize("viewed", [False, True])
def test_inputs_are_not_written_to_unless_that_is_asked_for(viewed: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    base = graph.call_function(aten.view.default, (x, [-1])) if viewed else x
    graph.output((graph.call_function(aten.add_.Tensor, (base, 1)), x))
    given = torch.zeros(2)
    results = interpret(graph, [given], nothing)
    assert [r.tolist() for r in results] == [[1, 1], [1, 1]]
    assert given.tolist() == [0, 0]
    interpret(graph, [given], nothing, copied=False)
    assert given.tolist() == [1, 1]


def test_inputs_are_not_copied_where_nothing_writes_to_them() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    given = torch.zeros(2)
    assert interpret(graph, [given], nothing)[0] is given


def test_regions_are_what_the_captured_calls_run() -> None:
    module = captured(Modes(), torch.rand(3, 4))
    found: dict[str, tuple[bool, bool]] = {}

    def hook(node: fx.Node, value: Value) -> Any:
        inner = region(node.target, fx.map_arg(node.args, value))  # type: ignore[arg-type]
        if inner is None:
            return call(node, value)
        mode, graph, inputs = inner
        before = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
        with mode():
            found[str(node.target)] = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
            result = interpret(graph.graph, inputs, held_by(graph))
        assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == before
        return result

    x = torch.rand(3, 4)
    results = interpret(module.graph, [x], held_by(module), hook)
    torch.testing.assert_close(results, interpret(module.graph, [x], held_by(module)))
    assert found == {
        "wrap_with_set_grad_enabled": (False, False),
        "wrap_with_autocast": (True, True),
    }
