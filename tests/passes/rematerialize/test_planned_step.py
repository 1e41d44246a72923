"""What a planned module promises, against the source model and the allocator."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.runtime.execute import BudgetWarning
from tests.passes.rematerialize.models import TwoHeads, convnet, dropped
from tests.zoo.memory import allocate_gradients, footprint


def planned(model: nn.Module, *inputs: Tensor, budget: str = "memory=60%", **options: Any) -> Any:
    return graphopt.optimize(model, budget, inputs, time_limit=2.0, **options)


def peak(module: nn.Module, *inputs: Tensor) -> int:
    """Allocator peak of a warmed-up step."""

    def step() -> None:
        module(*inputs).sum().backward()

    allocate_gradients(module)
    step()
    return footprint(step).peak


def gradients(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    module.zero_grad()
    torch.manual_seed(7)
    loss(module).backward()
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    scale = 1e-2 * max(w.norm() for w in want.values())
    for name, expected in want.items():
        error = (got[name] - expected).norm() / torch.maximum(expected.norm(), scale)
        assert error < 1e-5, name


@pytest.fixture(scope="module")
def conv() -> tuple[nn.Module, Tensor, Any]:
    model, x = convnet()
    return model, x, planned(model, x)


def test_budget_holds_and_prediction_is_exact(conv):
    model, x, module = conv
    memory = module.report.to_dict()["memory"]
    measured = peak(copy.deepcopy(module), x)
    assert measured <= 0.6 * peak(copy.deepcopy(model), x)
    assert memory["predicted_peak"] == pytest.approx(measured, rel=0.01)
    assert module.report.to_dict()["plan"]["overhead"] > 0


def test_prediction_for_another_batch_size(conv):
    _, _, module = conv
    larger = torch.randn(11, 3, 16, 16)
    assert module.report.predict_peak(larger) == pytest.approx(
        peak(copy.deepcopy(module), larger), rel=0.01
    )


def test_batch_statistics_are_updated_once(conv):
    model, x, module = conv
    source, twin = copy.deepcopy(model), copy.deepcopy(module)
    for step in (source, twin):
        step(x).square().sum().backward()
    for name, want in source.named_buffers():
        assert torch.equal(dict(twin.named_buffers())[name], want), name


def test_dropout_masks_are_drawn_once():
    model, x = dropped()
    module = planned(model, x, budget="memory=70%")
    assert_close(
        gradients(module, lambda m: m(x).square().sum()),
        gradients(model, lambda m: m(x).square().sum()),
    )


def test_gradients_are_freed_one_by_one():
    layers = nn.Sequential(*(nn.Linear(256, 256) for _ in range(12)))
    x = torch.randn(16, 256)
    module = planned(layers, x, budget="memory=64GiB")
    one = 256 * 257 * 4
    assert peak(module, x) < peak(layers, x) + one


def test_accumulation_and_hooks(conv):
    model, x, module = conv
    source, twin = copy.deepcopy(model), copy.deepcopy(module)
    seen: dict[int, list[str]] = {}
    for key, step in enumerate((source, twin)):
        seen[key] = []
        for name, parameter in step.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda _, name=name, key=key: seen[key].append(name)
            )
        for part in x.split(3):
            step(part).square().sum().backward()
    assert_close(
        {n: p.grad for n, p in twin.named_parameters()},
        {n: p.grad for n, p in source.named_parameters()},
    )
    assert sorted(seen[0]) == sorted(seen[1])


def test_gradient_of_inputs(conv):
    model, x, module = conv
    found = []
    for step in (copy.deepcopy(model), copy.deepcopy(module)):
        leaf = x.clone().requires_grad_()
        step(leaf).square().sum().backward()
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_retain_graph_gives_the_same_gradients_twice(conv):
    _, x, module = conv
    twin = copy.deepcopy(module)
    loss = twin(x).square().sum()
    loss.backward(retain_graph=True)
    first = {n: p.grad.clone() for n, p in twin.named_parameters()}
    twin.zero_grad()
    loss.backward()
    assert all(torch.equal(p.grad, first[n]) for n, p in twin.named_parameters())


def test_a_second_backward_is_refused(conv):
    _, x, module = conv
    loss = copy.deepcopy(module)(x).square().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_double_backward_is_refused_by_name(conv):
    _, x, module = conv
    twin = copy.deepcopy(module)
    with pytest.raises(graphopt.UnsupportedError, match="create_graph"):
        torch.autograd.grad(twin(x).sum(), list(twin.parameters()), create_graph=True)


def test_a_parameter_written_between_forward_and_backward_is_noticed(conv):
    _, x, module = conv
    twin = copy.deepcopy(module)
    loss = twin(x).square().sum()
    with torch.no_grad():
        twin.head.weight.add_(1.0)
    with pytest.raises(graphopt.GraphoptError, match="modified in place"):
        loss.backward()


def test_an_output_without_planned_gradient_is_right_and_warns():
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(8, 16)
    module = planned(model, x, budget="memory=64GiB", loss=lambda out: out["one"].sum())

    def both(m: nn.Module) -> Tensor:
        out = m(x)
        return out["one"].square().sum() + out["two"].square().sum()

    with pytest.warns(BudgetWarning, match="budget does not hold"):
        got = gradients(module, both)
    assert_close(got, gradients(model, both))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradients(module, lambda m: m(x)["one"].sum())


def test_frozen_parameters_are_planned_anew(conv):
    model, x, module = conv
    source, twin = copy.deepcopy(model), copy.deepcopy(module)
    for step in (source, twin):
        step.stem.weight.requires_grad_(False)
    assert_close(
        gradients(twin, lambda m: m(x).square().sum()),
        gradients(source, lambda m: m(x).square().sum()),
    )
    assert twin.stem.weight.grad is None


def test_autocast_step(conv):
    model, x, module = conv
    found = []
    for step in (copy.deepcopy(model), copy.deepcopy(module)):
        with torch.autocast("cpu", torch.bfloat16):
            out = step(x)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in step.parameters()]))
    assert (found[0] - found[1]).norm() <= 0.02 * found[0].norm()


def test_eval_budget_is_on_the_forward_pass():
    model, x = convnet()
    module = planned(model.eval(), x, budget="memory=100%")
    memory = module.report.to_dict()["memory"]
    assert memory["mode"] == "eval"
    with torch.no_grad():
        assert torch.allclose(module(x), model(x), rtol=1e-5, atol=1e-6)
        assert footprint(lambda: module(x)).peak <= memory["budget"]


def test_eval_of_a_planned_training_module(conv):
    model, x, module = conv
    source, twin = copy.deepcopy(model).eval(), copy.deepcopy(module).eval()
    assert torch.allclose(twin(x), source(x), rtol=1e-5, atol=1e-6)


def test_infeasible_budget_names_one_that_can_be_met(conv):
    model, x, _ = conv
    with pytest.raises(graphopt.BudgetInfeasible) as error:
        planned(model, x, budget="memory=20kB")
    assert error.value.proven
    module = planned(model, x, budget=f"memory={int(error.value.smallest)}")
    assert peak(module, x) <= error.value.smallest


def test_nothing_to_train():
    model, x = convnet()
    model.requires_grad_(False)
    with pytest.raises(graphopt.NothingToTrainError):
        planned(model, x)


def test_nothing_is_kept_alive_after_a_step(conv):
    _, x, module = conv
    twin = copy.deepcopy(module)
    allocate_gradients(twin)

    def forward() -> None:
        twin(x)  # the result goes, and with it all that backward would have needed

    twin(x).sum().backward()
    assert footprint(lambda: twin(x).sum().backward()).live == 0
    assert footprint(forward).live == 0
