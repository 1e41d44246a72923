"""What training loops do to a planned module besides `loss.backward()`."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.runtime.execute import BudgetWarning
from tests.passes.rematerialize.models import TwoHeads, convnet
from tests.passes.rematerialize.test_planned_step import peak, planned


def chain() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layers = [part for _ in range(8) for part in (nn.Linear(64, 64), nn.Tanh())]
    return nn.Sequential(*layers), torch.randn(64, 64)


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach() - want.detach()).norm() / want.detach().norm())


@pytest.mark.parametrize("budget", ["memory=64GiB", "memory=75%"])
def test_an_optimizer_may_step_in_a_hook(budget: str) -> None:
    """A weight changes as soon as its gradient is there: nothing may read the weight after that."""
    model, x = chain()
    module = planned(model, x, budget=budget)

    def step(p: Tensor) -> None:
        assert p.grad is not None
        with torch.no_grad():
            p.add_(p.grad, alpha=-10.0)
        p.grad = None

    for part in (model, module):
        for parameter in part.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        part(x).square().sum().backward()
    for got, want in zip(module.parameters(), model.parameters(), strict=True):
        assert relative(got, want) < 1e-5


def test_a_backward_for_one_layer_leaves_the_rest_for_later() -> None:
    model, x = convnet()
    module = planned(model, x)
    found = []
    for part in (module, model):
        loss = part(x).square().sum()
        first = torch.autograd.grad(loss, [part.head.weight], retain_graph=True)
        loss.backward()
        found.append([*first, *(p.grad for p in part.parameters())])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


class Energy(nn.Module):
    """Its second output has an infinite derivative where its input is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8, bias=False), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {"logits": self.head(h), "energy": h.square().sum(-1).sqrt()}


def test_an_output_that_the_loss_leaves_out_gives_no_zeros() -> None:
    """Neither a gradient of zeros for what only it uses, nor 0 x infinity."""
    torch.manual_seed(0)
    model, x = Energy(), torch.randn(6, 8)
    x[0] = 0
    module = planned(model, x, budget="memory=1GB", loss=lambda out: out["logits"].sum())
    everything = planned(TwoHeads(), torch.randn(8, 16), budget="memory=1GB")
    both = planned(model, torch.randn(6, 8), budget="memory=1GB")
    for part in (module, both, model):
        if part is both:
            with pytest.warns(BudgetWarning, match="budget does not hold"):
                part(x)["logits"].sum().backward()
        else:
            part(x)["logits"].sum().backward()
    torch.testing.assert_close(both.body.weight.grad, model.body.weight.grad)
    torch.testing.assert_close(module.body.weight.grad, model.body.weight.grad)
    with pytest.warns(BudgetWarning):
        everything(torch.randn(8, 16))["one"].sum().backward()
    assert everything.two.weight.grad is None


def test_another_loss_is_planned_for_when_it_comes_again() -> None:
    module, x = planned(TwoHeads(), torch.randn(8, 16), budget="memory=1GB"), torch.randn(8, 16)
    for _ in range(2):
        with pytest.warns(BudgetWarning):
            module(x)["one"].sum().backward()
    module(x)["one"].sum().backward()  # a warning would be an error
    assert module.two.weight.grad is None


def test_inputs_of_any_layout() -> None:
    """A graph traced for one layout has views that others don't allow."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4))
    x = torch.randn(4, 3, 8, 8)
    module = planned(model, x, budget="memory=1GB")
    layouts = [x.to(memory_format=torch.channels_last), x.transpose(2, 3), x[:, :1].expand_as(x)]
    for given in layouts:
        torch.testing.assert_close(module(given), model(given))
    module.to(memory_format=torch.channels_last)
    torch.testing.assert_close(module(x), model(x))


def test_a_frozen_norm_is_planned_anew() -> None:
    model, x = convnet()
    module = planned(model, x)
    for part in (model, module):
        for norm in part.norms:
            norm.eval()
    assert peak(module, x) <= 0.6 * peak(copy.deepcopy(model), x) * 1.1
    module.zero_grad()
    model.zero_grad()
    torch.testing.assert_close(module(x), model(x))


def test_new_weights_count_and_old_ones_go() -> None:
    torch.manual_seed(0)
    model, x = TwoHeads(), torch.randn(8, 16)
    module = planned(model, x, budget="memory=1GB", loss=lambda out: out["one"].sum())
    old = weakref.ref(module.body.weight)
    state = {name: value + 1 for name, value in model.state_dict().items()}
    for part in (module, model):
        part.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)
    gc.collect()
    assert old() is None

    def step(part: nn.Module) -> None:
        torch.manual_seed(1)
        part(x)["two"].square().sum().backward()

    step(model)
    with pytest.warns(BudgetWarning):
        step(module)
    torch.testing.assert_close(module.body.weight.grad, model.body.weight.grad)


def test_a_loaded_module_runs_its_plan_at_once(tmp_path: Any, caplog: Any) -> None:
    """A loss given as a function isn't saved; which outputs it used is."""
    x = torch.randn(8, 16)
    module = planned(TwoHeads(), x, budget="memory=1GB", loss=lambda out: out["one"].sum())
    module.save(tmp_path / "module.gopt")
    loaded = graphopt.load(tmp_path / "module.gopt")
    with torch.profiler.profile(profile_memory=True):  # the first step is not measured
        loaded(x)["one"].sum().backward()
    assert "planning" not in caplog.text


def test_the_step_scope_speaks_in_its_own_bytes() -> None:
    model, x = chain()
    fixed = 2 * sum(p.nbytes for p in model.parameters())
    with pytest.raises(graphopt.BudgetInfeasible) as caught:
        planned(model, x, budget="memory=100kB", memory_scope="step")
    assert caught.value.requested == 100_000
    assert caught.value.smallest is not None
    assert caught.value.smallest > fixed
    module = planned(model, x, budget=f"memory={int(caught.value.smallest)}", memory_scope="step")
    assert module.report.to_dict()["memory"]["measured_peak"] <= caught.value.smallest


def test_a_budget_of_all_that_the_model_takes_is_always_met() -> None:
    x = torch.randn(128, 32)
    for model in (nn.Sequential(nn.Linear(32, 64), nn.Tanh()), nn.Linear(32, 8)):
        memory = planned(model, x, budget="memory=100%").report.to_dict()["memory"]
        assert memory["measured_peak"] <= memory["eager_peak"]


def test_a_batch_of_one_is_planned_as_one() -> None:
    """It is traced as two, since export takes a size of one for a constant."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Mish(), nn.Conv2d(8, 8, 3), nn.Mish())
    memory = planned(model, torch.randn(1, 3, 16, 16), budget="memory=1GB").report.to_dict()[
        "memory"
    ]
    assert memory["predicted_peak"] == pytest.approx(memory["measured_peak"], rel=0.01)
