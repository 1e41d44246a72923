"""Canonicalization: before and after on tiny graphs, and that nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import expecttest
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graphopt
from graphopt.comparison import differences, observe
from graphopt.graphcheck import check_metadata, check_structure
from graphopt.passes.canonicalize import Canonicalize, CanonicalizeReport
from graphopt.pipeline import PassContext


class Body(nn.Module):
    """Runs a function of an input, with a linear layer, a scale and a buffer at hand."""

    def __init__(self, body: Callable[[Body, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Any:
        return self.body(self, x)


def canonical(
    body: Callable[[Body, Tensor], Any], x: Tensor | None = None
) -> tuple[graphopt.Program, graphopt.Program, CanonicalizeReport]:
    """A captured body, what canonicalization makes of it, and its report; both verified equal."""
    model, x = Body(body), torch.randn(3, 4) if x is None else x
    before = graphopt.capture(model, (x,))
    result = Canonicalize().run(before, PassContext())
    for program in (before, result.program):
        check_structure(program.module)
        check_metadata(program.module)
    for training in (True, False):
        expected = observe(model, (x,), {}, training=training)
        got = observe(result.program.emit(), (x,), {}, training=training)
        assert expected.structure == got.structure
        for worst in differences(expected, got):
            assert worst.kind == "gradients", worst
            assert worst.error < 1e-6, worst
    return before, result.program, result.report["canonicalize"]


def ops(program: graphopt.Program) -> list[str]:
    """Names of the ops in order, without namespace and overload."""
    calls = [n for n in program.module.graph.nodes if n.op == "call_function"]
    return [getattr(n.target, "_opname", getattr(n.target, "__name__", "")) for n in calls]


def code(program: graphopt.Program) -> str:
    return program.emit().code.strip()


class Golden(expecttest.TestCase):
    def test_in_place_ops_become_functional_and_views_are_derived_anew(self) -> None:
        def body(m: Body, x: Tensor) -> Any:
            y = m.linear(x)
            flat = y.view(-1)
            y.relu_()
            return flat + 1

        before, after, _ = canonical(body)
        self.assertExpectedInline(
            code(before),
            """\
def forward(self, x):
    # linear: Linear
    linear = torch.ops.aten.linear.default(x, self.linear.weight, self.linear.bias); del x
    # root: Body
    view = torch.ops.aten.view.default(linear, [-1])
    torch.ops.aten.relu_.default(linear); del linear
    add = torch.ops.aten.add.Tensor(view, 1); del view
    return (add,)""",
        )
        self.assertExpectedInline(
            code(after),
            """\
def forward(self, x):
    # linear: Linear
    linear = torch.ops.aten.linear.default(x, self.linear.weight, self.linear.bias); del x
    # root: Body
    relu = torch.ops.aten.relu.default(linear); del linear
    view_1 = torch.ops.aten.view.default(relu, [-1]); del relu
    add = torch.ops.aten.add.Tensor(view_1, 1); del view_1
    return (add,)""",
        )

    def test_a_no_grad_region_is_spliced_in_with_its_inputs_detached(self) -> None:
        def body(m: Body, x: Tensor) -> Any:
            y = m.linear(x)
            with torch.no_grad():
                center = y.mean(0)
                m.mean.mul_(0.9).add_(center, alpha=0.1)
            return y - center

        before, after, _ = canonical(body)
        self.assertExpectedInline(
            code(before),
            """\
def forward(self, x):
    # linear: Linear
    linear = torch.ops.aten.linear.default(x, self.linear.weight, self.linear.bias); del x
    with torch.set_grad_enabled(False):
        # root: Body
        mean = torch.ops.aten.mean.dim(linear, [0])
        mul_ = torch.ops.aten.mul_.Tensor(self.mean, 0.9)
        torch.ops.aten.add_.Tensor(mul_, mean, alpha=0.1); del mul_
    # root: Body
    sub = torch.ops.aten.sub.Tensor(linear, mean); del linear, mean
    return (sub,)""",
        )
        self.assertExpectedInline(
            code(after),
            """\
def forward(self, x):
    # linear: Linear
    linear = torch.ops.aten.linear.default(x, self.linear.weight, self.linear.bias); del x
    # root: Body
    detach = torch.ops.aten.detach.default(linear)
    mean_2 = torch.ops.aten.mean.dim(detach, [0]); del detach
    mul_ = torch.ops.aten.mul_.Tensor(self.mean, 0.9)
    torch.ops.aten.add_.Tensor(mul_, mean_2, alpha=0.1); del mul_
    sub = torch.ops.aten.sub.Tensor(linear, mean_2); del linear, mean_2
    return (sub,)""",
        )

    def test_dead_code_goes_and_draws_stay(self) -> None:
        def body(m: Body, x: Tensor) -> Any:
            m.linear(x).exp()  # dead
            torch.rand_like(x)  # dead, but later draws depend on it
            return F.dropout(m.linear(x), 0.5, m.training)

        _, after, _ = canonical(body)
        self.assertExpectedInline(
            code(after),
            """\
def forward(self, x):
    # root: Body
    torch.ops.aten.rand_like.default(x, pin_memory=False)
    # linear: Linear
    linear_1 = torch.ops.aten.linear.default(x, self.linear.weight, self.linear.bias); del x
    # root: Body
    dropout = torch.ops.aten.dropout.default(linear_1, 0.5, self.training); del linear_1
    return (dropout,)""",
        )


def kept(report: CanonicalizeReport) -> str:
    return "; ".join(entry["reason"] for entry in report.kept)


def test_a_write_to_an_input_stays() -> None:
    def body(m: Body, x: Tensor) -> Any:
        x.add_(1)
        return m.linear(x)

    _, after, report = canonical(body)
    assert "add_" in ops(after)
    assert report.updates == 1


def test_a_write_to_a_view_of_an_input_stays() -> None:
    def body(m: Body, x: Tensor) -> Any:
        x.view(-1)[2:].mul_(2)
        return x + 1

    _, after, report = canonical(body)
    assert "mul_" in ops(after)
    assert report.updates == 1


def test_what_may_be_the_input_counts_as_the_input() -> None:
    """In eval mode `dropout` returns its input, so writing to its result writes to the input."""

    def body(m: Body, x: Tensor) -> Any:
        y = F.dropout(x, 0.5, m.training)
        y += 1
        return m.linear(y) + x.sum()

    _, after, _ = canonical(body)
    assert "add_" in ops(after)


def test_a_buffer_update_stays() -> None:
    def body(m: Body, x: Tensor) -> Any:
        m.mean.copy_(x.mean(0).detach())
        return x + m.mean

    _, after, report = canonical(body)
    assert "copy_" in ops(after)
    assert report.updates == 1


def test_a_base_that_is_read_after_a_write_to_its_view_keeps_the_write() -> None:
    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        y[:, 0].mul_(3)
        return y * 2

    _, after, report = canonical(body)
    assert "mul_" in ops(after)
    assert "read later" in kept(report)


def test_a_base_that_nobody_reads_again_lets_the_write_go() -> None:
    def body(m: Body, x: Tensor) -> Any:
        turned = m.linear(x).t()
        turned.mul_(3)
        return turned.exp()

    _, after, report = canonical(body)
    assert "mul_" not in ops(after)
    assert report.functionalized == 1


def test_a_write_to_a_part_stays_since_the_functional_result_has_another_layout() -> None:
    def body(m: Body, x: Tensor) -> Any:
        half = m.linear(x)[:, :2]
        half.mul_(3)
        return half.exp()

    _, after, report = canonical(body)
    assert "mul_" in ops(after)
    assert "layout" in kept(report)


def test_a_copy_that_only_may_be_a_view_is_not_derived_anew() -> None:
    """`reshape` of a transposed tensor copies: what it read before the write is what it holds."""

    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        early = y.t().reshape(-1)
        y.mul_(2)
        return early.sum() + y.sum()

    canonical(body)


def test_a_shape_changing_op_leaves_views_alone() -> None:
    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        rows = y.view(-1, 2)
        y.unsqueeze_(0)
        y.transpose_(0, 1)
        return y.sum(0), rows

    _, after, report = canonical(body)
    assert report.functionalized == 2
    assert not [name for name in ops(after) if name.endswith("_")]


def test_another_type_stays_in_place() -> None:
    """half += float keeps half; the functional op would promote."""

    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x).half()
        y.add_(x)
        return y

    _, after, report = canonical(body)
    assert "add_" in ops(after)
    assert "another shape, type or layout" in kept(report)


def test_ops_that_autocast_treats_otherwise_stay_in_place() -> None:
    """Under autocast exp() runs in float32, exp_() doesn't."""

    def body(m: Body, x: Tensor) -> Any:
        return m.linear(x).exp_()

    _, after, report = canonical(body)
    assert "exp_" in ops(after)
    assert "autocast" in kept(report)


def test_ops_whose_functional_twin_has_no_derivative_stay_in_place() -> None:
    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        y.copy_(m.scale.expand_as(y))
        return y

    _, after, report = canonical(body)
    assert "copy_" in ops(after)
    assert "no derivative" in kept(report)


def test_draws_stay_in_place_and_dropout_does_not() -> None:
    def body(m: Body, x: Tensor) -> Any:
        noise = torch.empty_like(x).uniform_()
        return F.dropout(m.linear(x) * noise, 0.5, m.training, inplace=True)

    _, after, _ = canonical(body)
    assert "uniform_" in ops(after)
    assert "dropout_" not in ops(after)


def test_a_region_that_returns_its_input_stays() -> None:
    """Inside `no_grad` an input returned as it is keeps its gradient; a detached one would not."""

    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        with torch.no_grad():
            z = y.view(-1)
            y = y.contiguous()
        return y + z.sum()

    canonical(body)


def test_gradients_switched_on_inside_are_left_alone() -> None:
    def body(m: Body, x: Tensor) -> Any:
        with torch.no_grad():
            y = m.linear(x)
            with torch.enable_grad():
                z = m.scale * 2
        return y, z

    canonical(body)


def test_both_branches_of_a_cond_are_canonicalized() -> None:
    def body(m: Body, x: Tensor) -> Any:
        def positive(v: Tensor) -> Tensor:
            return (v * 2).relu_()

        def negative(v: Tensor) -> Tensor:
            return (v - 1).sigmoid_()

        return torch.cond(x.sum() > 0, positive, negative, (m.linear(x),))

    _, after, report = canonical(body)
    assert report.functionalized == 2
    assert "cond" in ops(after)


def test_a_clean_graph_is_returned_as_it_is() -> None:
    program = graphopt.capture(nn.Linear(4, 4), (torch.randn(2, 4),))
    result = Canonicalize().run(program, PassContext())
    assert not result.changed
    assert result.program is program


def test_it_is_idempotent_and_leaves_its_input_alone() -> None:
    def body(m: Body, x: Tensor) -> Any:
        return m.linear(x).mul_(2).relu_()

    before, after, _ = canonical(body)
    assert ops(before) == ["linear", "mul_", "relu_"]
    assert ops(after) == ["linear", "mul", "relu"]
    assert not Canonicalize().run(after, PassContext()).changed


def test_options_switch_rewrites_off() -> None:
    def body(m: Body, x: Tensor) -> Any:
        m.linear(x).exp()
        return m.linear(x).relu_()

    program = graphopt.capture(Body(body), (torch.randn(3, 4),))
    off = Canonicalize(functionalize=False, inline=False, dead_code=False)
    assert not off.run(program, PassContext()).changed


@pytest.mark.parametrize("batch", [1, 5])
def test_another_batch_size_and_the_second_life_of_the_module(batch: int, tmp_path: Any) -> None:
    def body(m: Body, x: Tensor) -> Any:
        y = m.linear(x)
        flat = y.view(-1)
        y.relu_()
        return flat.sum(), y

    model, x = Body(body), torch.randn(3, 4)
    module = graphopt.optimize(model, example_inputs=(x,), passes="canonicalize")
    other = torch.randn(batch, 4)
    for got, expected in zip(module(other), model(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    module.save(tmp_path / "saved")
    loaded = graphopt.load(tmp_path / "saved")
    torch.testing.assert_close(loaded(other)[1], model(other)[1], rtol=0, atol=0)
    assert graphopt.capture(module).history[0].name == "canonicalize"


# Random programs over a pool of tensors that alias each other in all ways.

UNARY = ["relu", "sigmoid", "neg", "clone", "contiguous", "detach"]
IN_PLACE = ["relu_", "neg_", "sigmoid_", "add_one", "mul_two", "fill", "copy_first"]
VIEWS = ["flat", "transposed", "first_half", "row", "reshaped", "expanded", "unsqueezed"]
STEP = st.tuples(
    st.sampled_from([*UNARY, *IN_PLACE, *VIEWS, "add", "dropout", "linear"]),
    st.integers(0, 7),
    st.integers(0, 7),
)


def apply(m: Body, name: str, a: Tensor, b: Tensor) -> Tensor:
    """One step of a random program; always gives something of shape (n, 4) or a view of `a`."""
    table: dict[str, Callable[[], Tensor]] = {
        "add_one": lambda: a.add_(1),
        "mul_two": lambda: a.mul_(2),
        "fill": lambda: a.fill_(0.5),
        "copy_first": lambda: a.copy_(b.reshape(-1)[0].detach().expand_as(a)),
        "flat": lambda: a.flatten(),
        "transposed": lambda: a.transpose(0, -1),
        "first_half": lambda: a[..., : (a.shape[-1] + 1) // 2],
        "row": lambda: a[:1],
        "reshaped": lambda: a.reshape(-1),
        "expanded": lambda: a.unsqueeze(0).expand(2, *a.shape),
        "unsqueezed": lambda: a.unsqueeze(-1),
        "add": lambda: a + b.sum(),
        "dropout": lambda: F.dropout(a, 0.3, m.training),
        "linear": lambda: m.linear(a) if a.shape[-1] == 4 else a * m.scale.sum(),
    }
    return table[name]() if name in table else getattr(a, name)()


def program_of(steps: list[tuple[str, int, int]], outputs: list[int]) -> Callable[..., Any]:
    def body(m: Body, x: Tensor) -> Any:
        pool = [x, m.linear(x), m.mean, x * m.scale]
        for name, i, j in steps:
            pool.append(apply(m, name, pool[i % len(pool)], pool[j % len(pool)]))
        return tuple(pool[i % len(pool)] for i in outputs), pool[-1]

    return body


def runs(model: Body, x: Tensor) -> bool:
    """Whether the source itself can do a step (autograd forbids some in-place ops)."""
    try:
        for training in (True, False):
            observe(model, (x,), {}, training=training)
        graphopt.capture(model, (x,))
    except (RuntimeError, graphopt.GraphoptError):
        return False
    return True


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
@given(st.lists(STEP, min_size=1, max_size=7), st.lists(st.integers(0, 10), min_size=1, max_size=3))
def test_random_programs_do_the_same(steps: list[tuple[str, int, int]], outputs: list[int]) -> None:
    body = program_of(steps, outputs)
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    if runs(Body(body), x):
        canonical(body, x)
