"""The pass `prune`: what comes back is the masked network, within its budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt import errors


class Residual(nn.Module):
    """A residual stream with a norm, heads and a hidden layer."""

    def __init__(self, width: int = 24, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.inward = nn.Linear(10, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.transpose(-2, -1)) / math.sqrt(d // self.heads)).softmax(-1) @ v
        x = x + self.mix(mixed.transpose(1, 2).reshape(b, t, d))
        return self.last(x + self.down(F.gelu(self.up(x))))


def randomised(model: nn.Module) -> nn.Module:
    """No parameter is zero or one by initialisation."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return randomised(Residual())


@pytest.fixture(scope="module")
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 7, 10)


def prune(model: nn.Module, x: Tensor, text: str, **options: object) -> graphopt.OptimizedModule:
    passes = f"canonicalize,prune{{{text}}}"
    return graphopt.optimize(model, passes=passes, example_inputs=(x,), **options)  # type: ignore[arg-type]


def section(module: graphopt.OptimizedModule) -> dict[str, object]:
    return module.report.to_dict()["prune"]


def flops_of(module: nn.Module, x: Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    return counter.get_total_flops()


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return float((a - b).detach().norm() / b.detach().norm()) <= tolerance


@pytest.mark.parametrize("budget", ["flops=60%", "params=50%", "bytes=40%", "flops=70%,params=60%"])
def test_a_budget_is_kept_and_used(model: nn.Module, x: Tensor, budget: str) -> None:
    small = graphopt.optimize(model, budget, (x,))
    found = section(small)
    assert found["flops_after"] == flops_of(small, x)
    assert found["params_after"] == sum(p.numel() for p in small.parameters())
    used = []
    for part in budget.split(","):
        field, share = part.rstrip("%").split("=")
        left = found[f"{field}_after"] / found[f"{field}_before"]  # type: ignore[operator]
        used.append(left / (int(share) / 100))
    assert 0.98 <= max(used) <= 1.0


@pytest.mark.parametrize("criterion", ["l2", "taylor", "taylor2", "random", "bn_scale"])
def test_it_is_the_masked_network(model: nn.Module, x: Tensor, criterion: str) -> None:
    small = prune(model, x, f"flops=50%,criterion={criterion}")
    twin = small.report.masked_module()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    assert close(small(x), twin(x))
    more = torch.randn(5, 9, 10)
    with pytest.raises(errors.InputMismatch):
        small(more)  # the sequence is fixed
    assert close(small(more[:, :7]), twin(more[:, :7]))


def test_in_double_precision(model: nn.Module, x: Tensor) -> None:
    small = graphopt.optimize(copy.deepcopy(model).double(), "flops=50%", (x.double(),))
    assert close(small(x.double()), small.report.masked_module()(x.double()), 1e-10)


def test_the_masked_network_is_the_source_with_zeros(model: nn.Module, x: Tensor) -> None:
    """By hand: the source's own code, with zeros wherever the report says that nothing is kept."""
    small = prune(model, x, "flops=50%")
    by_hand = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in by_hand.named_parameters():
            for axis, kept in section(small)["kept"].get(name, {}).items():  # type: ignore[attr-defined]
                gone = sorted(set(range(parameter.shape[int(axis)])) - set(kept))
                parameter.index_fill_(int(axis), torch.tensor(gone), 0.0)
    assert close(small(x), by_hand(x))


def test_with_everything_kept_every_bit_stays(model: nn.Module, x: Tensor) -> None:
    small = prune(model, x, "flops=100%")
    assert torch.equal(small(x), model(x))
    assert section(small)["flops_after"] == section(small)["flops_before"]


def test_pruned_twice_is_pruned_once(model: nn.Module, x: Tensor) -> None:
    twice = prune(prune(model, x, "flops=80%"), x, "flops=60%")  # type: ignore[arg-type]
    assert close(twice(x), twice.report.masked_module()(x))
    again = copy.deepcopy(twice)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), twice(x))


def test_the_source_is_left_as_it_is(model: nn.Module, x: Tensor) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    graphopt.optimize(model, "flops=50%", (x,), data=[x], loss=lambda y: y.square().mean())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())


def test_checkpoints_go_both_ways(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    small = prune(model, x, "flops=50%")
    want = small(x)
    small.load_state_dict(model.state_dict())
    assert torch.equal(small(x), want)
    full = copy.deepcopy(model)
    full.load_state_dict(small.program.slices.widen(small.state_dict()))  # type: ignore[union-attr]
    assert close(full(x), want)
    small.save(tmp_path / "small.gopt")
    loaded = graphopt.load(tmp_path / "small.gopt")
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), want)
    assert loaded.report.to_dict()["prune"] == section(small)


def test_training_moves_the_pruned_model_as_its_twin(model: nn.Module, x: Tensor) -> None:
    small = prune(model, x, "flops=50%")
    twin = small.report.masked_module()
    for module in (small, twin):
        module(x).square().mean().backward()
    slices = small.program.slices
    assert slices is not None
    grads = dict(small.named_parameters())
    for name, parameter in twin.named_parameters():
        assert close(grads[name].grad, slices.narrow({name: parameter.grad})[name], 1e-4)  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in small.parameters():
            parameter -= 0.1 * parameter.grad  # type: ignore[operator]
    assert close(small(x), small.report.masked_module()(x)), "the twin has the present weights"


def test_it_exports_copies_and_pickles(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    small = prune(model, x, "flops=50%")
    torch.save(small, tmp_path / "small.pt")
    for again in (
        torch.export.export(small, (x,)).module(),
        copy.deepcopy(small),
        torch.load(tmp_path / "small.pt", weights_only=False),
    ):
        assert torch.equal(again(x), small(x))
    assert close(copy.deepcopy(small).report.masked_module()(x), small(x))


def test_options(model: nn.Module, x: Tensor) -> None:
    rounded = section(prune(model, x, "flops=70%,round_to=4"))["dimensions"]
    assert all(kept % 4 == 0 or kept == full for _, full, kept in rounded)  # type: ignore[attr-defined]
    least = section(prune(model, x, "flops=60%,min_keep=0.5"))["dimensions"]
    assert all(kept >= full / 2 for _, full, kept in least)  # type: ignore[attr-defined]
    frozen = prune(model, x, "flops=80%,freeze=up.*")
    assert frozen.get_parameter("up.weight").shape == model.get_parameter("up.weight").shape
    assert "freeze=up.*" in str(section(frozen)["frozen"])
    plain = prune(model, x, "flops=80%,norm=freeze")
    assert plain.get_parameter("norm.weight").shape == (24,)
    assert not section(plain)["compensated"]


def test_a_compensated_norm_has_the_statistics_of_the_masked_one() -> None:
    """Closed form: of a vector with zeros, mean and variance over the full width."""
    norm = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8, elementwise_affine=True), nn.Linear(8, 2))
    small = prune(randomised(norm), torch.randn(3, 4), "params=70%")
    assert section(small)["compensated"] == ["1.weight"]
    x = torch.randn(3, 4)
    kept = list(section(small)["kept"]["1.weight"]["0"])  # type: ignore[index]
    hidden = norm[0](x)[:, kept]
    mean = hidden.sum(1, keepdim=True) / 8
    variance = hidden.square().sum(1, keepdim=True) / 8 - mean.square()
    normed = (hidden - mean) / (variance + 1e-5).sqrt() * norm[1].weight[kept] + norm[1].bias[kept]
    assert close(small(x), F.linear(normed, norm[2].weight[:, kept], norm[2].bias))


def test_a_budget_below_what_is_frozen_names_it(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(graphopt.BudgetInfeasible, match=r"params.*\n.*in the way") as caught:
        graphopt.optimize(model, "params=30", (x,))
    assert caught.value.field == "params"
    smallest = caught.value.smallest
    assert smallest is not None
    small = graphopt.optimize(model, f"params={math.ceil(smallest)}", (x,))
    assert section(small)["params_after"] <= math.ceil(smallest)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("data", "loss", "error"),
    [
        ([torch.randn(2, 7, 11)], lambda y: y.sum(), errors.InputMismatch),
        ([torch.randn(2, 7, 10)], lambda y: y.sum() * math.nan, errors.NonFiniteError),
        ([torch.randn(2, 7, 10)], lambda y: y.detach().sum(), errors.GraphoptError),
        ([], lambda y: y.sum(), errors.GraphoptError),
    ],
)
def test_bad_data_is_refused(
    model: nn.Module, x: Tensor, data: list[Tensor], loss: Callable[..., Tensor], error: type
) -> None:
    with pytest.raises(error):
        graphopt.optimize(model, "flops=50%", (x,), data=data, loss=loss)


def test_an_operator_without_a_rule_freezes_what_it_touches() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(F.relu(self.b(torch.cdist(self.a(x), self.a(x)) @ self.a(x))))

    model = randomised(Odd())
    small = graphopt.optimize(model, "params=80%", (torch.randn(3, 4),), dynamic=None)
    reasons = {(f["parameter"], f["axis"]): f["reason"] for f in section(small)["frozen"]}  # type: ignore[attr-defined]
    assert "cdist" in reasons["a.weight", 0]
    assert small.get_parameter("b.weight").shape[0] < 8


def test_with_a_memory_budget(model: nn.Module, x: Tensor) -> None:
    both = graphopt.optimize(copy.deepcopy(model).train(), "flops=60%,memory=70%", (x,))
    report = both.report.to_dict()
    assert report["memory"]["measured_peak"] <= report["memory"]["budget"]
    assert report["prune"]["flops_after"] <= 0.6 * report["prune"]["flops_before"]


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("round_to=0", "round_to=0"),
        ("min_keep=1.5", r"min_keep=1\.5"),
        ("refine=-1", "refine=-1"),
        ("rounds=0", "rounds=0"),
        ("freeze=up.weigth", r"up\.weigth.*\n.*did you mean 'up\.weight'"),
        ("freeze=qkv", r"(?s)'qkv'.*freeze=qkv\.\*"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    model: nn.Module, x: Tensor, option: str, said: str
) -> None:
    with pytest.raises(errors.PipelineError, match=said):
        prune(model, x, f"flops=80%,{option}")


def test_any_name_of_a_tied_parameter_freezes_it() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)
            self.one, self.other = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.other(F.relu(self.one(F.relu(self.first(x)))))))

    model, x = randomised(Tied()), torch.randn(3, 6)
    assert prune(model, x, "params=70%").get_parameter("one.weight").shape != (16, 16)
    with pytest.raises(graphopt.BudgetInfeasible, match=r"freeze=other\.\*"):
        prune(model, x, "params=70%,freeze=other.*")


def test_a_model_without_flops_is_left_alone() -> None:
    norm = nn.LayerNorm(8)
    small = prune(norm, torch.randn(3, 8), "flops=50%,criterion=taylor2")
    assert section(small)["flops_after"] == 0
    assert small.get_parameter("weight").shape == (8,)


def test_flops_are_those_of_the_example_inputs_for_one_sample_too(
    model: nn.Module, x: Tensor
) -> None:
    one = x[:1]
    with FlopCounterMode(display=False) as dense:
        model(one)
    limit = 0.8 * dense.get_total_flops()
    small = graphopt.optimize(model, f"flops={limit:.0f}", (one,))
    with FlopCounterMode(display=False) as counter:
        small(one)
    report = small.report.to_dict()["prune"]
    assert report["flops_before"] == dense.get_total_flops()
    assert report["flops_after"] == counter.get_total_flops()
    assert 0.9 * limit <= report["flops_after"] <= limit
