"""A linearized module is an ordinary one: state, modes, copies, files, training, budgets."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.ir.interpret import interpret
from graphopt.passes.linearize import sweep
from graphopt.passes.linearize.calibration import Reference
from graphopt.private import comparisons
from tests.passes.linearize.nets import Net, cnn, drawn, linearized, mlp, section

images, vectors = drawn(12, 3, 8, 8), drawn(40, 6)


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, Any]:
    """A source and its linearized module; tests copy what they change."""
    torch.manual_seed(0)
    model = cnn(nn.ReLU(), nn.ReLU(inplace=True))
    return model, linearized(model, images, spec="relus=25%,rounds=2")


def outputs(module: Any, x: Tensor = images) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(x)
    return result


def test_keys_of_the_state(pair: tuple[nn.Module, Any]) -> None:
    model, module = pair
    keys, own = set(model.state_dict()), set(module.state_dict())
    assert own > keys
    assert own - keys == {f"_graphopt.{s['node']}.coefficients" for s in section(module)["sites"]}
    assert set(dict(module.named_parameters())) > set(dict(model.named_parameters()))


def test_weights_are_the_source_s(pair: tuple[nn.Module, Any]) -> None:
    model, module = pair
    own = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, own[name])
        assert parameter.data_ptr() != own[name].data_ptr()


def test_statistics_move_only_where_values_changed(pair: tuple[nn.Module, Any]) -> None:
    model, module = pair
    own, state = module.state_dict(), model.state_dict()
    assert torch.equal(own["1.running_mean"], state["1.running_mean"])
    assert not torch.equal(own["5.running_var"], state["5.running_var"])
    still = linearized(model, images, spec="relus=25%,rounds=1,norms=false").state_dict()
    assert all(torch.equal(still[key], state[key]) for key in state)


def test_modes(pair: tuple[nn.Module, Any]) -> None:
    module = copy.deepcopy(pair[1])
    assert not module.training
    want = outputs(module)
    module.train()
    assert all(m.training for m in module.modules())
    before = module.state_dict()["1.running_mean"].clone()
    trained = outputs(module)
    assert not torch.equal(trained, want)
    assert not torch.equal(module.state_dict()["1.running_mean"], before)
    assert torch.equal(outputs(copy.deepcopy(pair[1]).eval()), want)


def test_a_model_in_train_mode_stays_in_it() -> None:
    model = cnn().train()
    state = copy.deepcopy(model.state_dict())
    module = linearized(model, images, spec="relus=25%,rounds=1")
    assert module.training
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert bool(outputs(module.eval()).isfinite().all())


def test_gradients_reach_weights_and_coefficients(pair: tuple[nn.Module, Any]) -> None:
    """Steps of an optimizer bring the outputs nearer to the source's."""
    model, module = pair[0], copy.deepcopy(pair[1]).train()
    target = outputs(model)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (module.eval()(images) - target).square().mean()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all())
                   for p in module.parameters())  # fmt: skip
        optimizer.step()
        losses.append(float(loss.detach()))
    coefficients = [p for n, p in module.named_parameters() if "coefficients" in n]
    assert coefficients
    assert all(float(p.grad.abs().sum()) > 0 for p in coefficients)
    assert losses[-1] < losses[0]


def test_gradients_against_finite_differences() -> None:
    torch.manual_seed(0)
    x = drawn(3, 6).double()
    module = linearized(mlp(nn.GELU(), nn.Tanh()).double(), x, spec="relus=50%,rounds=1")
    assert torch.autograd.gradcheck(module, (x.requires_grad_(),))


def test_other_batch_sizes(pair: tuple[nn.Module, Any]) -> None:
    module = pair[1]
    whole = outputs(module)
    for size in (1, 5):
        assert torch.allclose(outputs(module, images[:size]), whole[:size], atol=1e-5)
    assert outputs(module, images[:0]).shape == (0, 5)


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def torch_saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("way", [copy.deepcopy, pickled, torch_saved])
def test_copies(pair: tuple[nn.Module, Any], way: Any) -> None:
    module = pair[1]
    other = way(module)
    assert torch.equal(outputs(other), outputs(module))
    assert section(other) == section(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert bool(outputs(module).abs().sum() > 0)


def test_files(pair: tuple[nn.Module, Any], tmp_path: Path) -> None:
    module = pair[1]
    module.save(tmp_path / "module.gopt")
    other = graphopt.load(tmp_path / "module.gopt")
    assert torch.equal(outputs(other), outputs(module))
    assert section(other) == section(module)
    assert list(other.state_dict()) == list(module.state_dict())


def test_captured_again(pair: tuple[nn.Module, Any]) -> None:
    module = pair[1]
    again = graphopt.capture(module, (images,)).emit()
    assert torch.equal(outputs(again), outputs(module))
    assert list(again.state_dict()) == list(module.state_dict())
    assert sum(comparisons(again, images).values()) == section(module)["relus_after"]


def test_linearized_again(pair: tuple[nn.Module, Any]) -> None:
    module = pair[1]
    half = section(module)["relus_after"] // 2
    again = linearized(module, images, spec=f"relus={half},rounds=1")
    assert sum(comparisons(again, images).values()) == half
    assert set(again.state_dict()) > set(module.state_dict())
    assert bool(outputs(again).isfinite().all())


def test_exported_by_torch(pair: tuple[nn.Module, Any]) -> None:
    module = pair[1]
    exported = torch.export.export(module, (images,)).module()
    assert torch.allclose(exported(images), outputs(module), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.double])
def test_other_types(pair: tuple[nn.Module, Any], dtype: torch.dtype) -> None:
    want = outputs(pair[1])
    module = copy.deepcopy(pair[1]).to(dtype)
    got = outputs(module, images.to(dtype))
    assert got.dtype == dtype
    assert float((got - want).abs().max()) < 0.1 * float(want.abs().max())


def test_a_model_of_doubles() -> None:
    x = vectors.double()
    module = linearized(mlp().double(), x, spec="relus=50%,rounds=1")
    assert {p.dtype for p in module.parameters()} == {torch.float64}
    assert outputs(module, x).dtype == torch.float64


def test_a_model_of_halves() -> None:
    x = vectors.to(torch.bfloat16)
    module = linearized(mlp().to(torch.bfloat16), x, spec="relus=50%,rounds=1")
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert bool(outputs(module, x).isfinite().all())


def test_an_original_checkpoint_warns_and_loads(pair: tuple[nn.Module, Any]) -> None:
    model, module = pair[0], copy.deepcopy(pair[1])
    checkpoint = {k: v + 0.1 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    with pytest.warns(UserWarning, match="replaced non-linearities"):
        module.load_state_dict(checkpoint)
    state = module.state_dict()
    assert all(torch.equal(state[key], value) for key, value in checkpoint.items())
    assert bool(outputs(module).isfinite().all())


def test_its_own_checkpoint_loads_silently(pair: tuple[nn.Module, Any]) -> None:
    module, want = copy.deepcopy(pair[1]), outputs(pair[1])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.load_state_dict(pair[1].state_dict())
    assert torch.equal(outputs(module), want)


def test_the_user_s_model_stays_as_it_was() -> None:
    torch.manual_seed(0)
    model = cnn(nn.ReLU(inplace=True))
    model[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    state, x = copy.deepcopy(model.state_dict()), images.clone()
    forwards = {id(m): m.forward for m in model.modules()}
    random = torch.get_rng_state()
    module = linearized(model, x, spec="relus=25%,rounds=2", data=[x, images[:3].clone()])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, images)
    assert not model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert forwards == {id(m): m.forward for m in model.modules()}
    requires = {n: p.requires_grad for n, p in model.named_parameters()}
    own = {n: p.requires_grad for n, p in module.named_parameters()}
    assert requires.items() <= own.items()


class Counting(nn.Module):
    """Writes to its buffer through a view."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = cnn(nn.ReLU())
        self.register_buffer("seen", torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0].add_(1)
        return self.net(x) + self.seen.sum()


def test_a_buffer_that_forward_writes_to_through_a_view_stays_as_it_was() -> None:
    model = Counting().eval()
    program = graphopt.capture(model, (images,))
    found = Reference(program.specialize(False), [[images], [images]])
    for _ in range(2):
        (output,) = interpret(found.module.graph, [images], found.attribute, found.run)
        torch.testing.assert_close(output, model.net(images) + 3)
    assert not model.seen.any()


def test_the_same_seed_gives_the_same(pair: tuple[nn.Module, Any]) -> None:
    again = linearized(pair[0], images, spec="relus=25%,rounds=2")
    for key, value in pair[1].state_dict().items():
        assert torch.equal(value, again.state_dict()[key])
    assert torch.equal(outputs(again), outputs(pair[1]))


def _noisy(net: Any, x: Tensor) -> Tensor:
    y = net.first(x)
    result: Tensor = net.last(torch.relu(y + 0.1 * torch.rand_like(y)))
    return result


@pytest.mark.parametrize("select", ["fisher", "bcd"])
def test_a_model_that_draws_numbers_draws_its_own(select: str) -> None:
    """Whatever the generator's state is: it comes out as it went in, and nothing depends on it."""

    model = Net(_noisy, first=nn.Linear(6, 8), last=nn.Linear(8, 3)).eval()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        module = linearized(model, vectors, spec=f"relus=50%,select={select}")
        assert torch.equal(torch.get_rng_state(), before)
        states.append(module.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_sweep_of_a_model_that_draws_numbers() -> None:
    model, points = Net(_noisy, first=nn.Linear(6, 8), last=nn.Linear(8, 3)).eval(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        found = sweep(model, (vectors,), data=[vectors], budgets=["50%"], options=[""])
        assert torch.equal(torch.get_rng_state(), before)
        points.append(found.points)
    assert points[0] == points[1]
    assert points[0][0].accuracy == 1.0


@pytest.mark.slow
def test_with_a_memory_budget() -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(64, 64), nn.ReLU(), nn.LayerNorm(64)]
    model, x = nn.Sequential(*layers, nn.Linear(64, 4)), drawn(64, 64)
    module = graphopt.optimize(
        model, "relus=25%,memory=60%", example_inputs=(x,), data=[x], time_limit=10.0
    )
    report = module.report.to_dict()
    assert report["linearize"]["relus_after"] == 6 * 64 // 4
    assert sum(comparisons(module, x).values()) == 6 * 64 // 4
    module(x).square().mean().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(
    ("budget", "kept"),
    [("0", 0), ("0%", 0), ("1", 1), ("7", 7), ("12.6%", 2), ("15", 15)],
)
def test_budgets(budget: str, kept: int) -> None:
    module = linearized(mlp(), vectors, spec=f"relus={budget},rounds=2")
    assert section(module)["relus_after"] == kept
    assert sum(comparisons(module, vectors).values()) == kept


@pytest.mark.parametrize("budget", ["relus=100%", "relus=16", "relus=99", "relu_sites=2"])
def test_budgets_that_are_kept_already(budget: str) -> None:
    model = mlp()
    module = linearized(model, vectors, spec=budget)
    assert list(module.state_dict()) == list(model.state_dict())
    assert torch.equal(outputs(module, vectors), outputs(model, vectors))
    assert section(module)["relus_after"] == section(module)["relus_before"] == 16
    assert [site["choice"] for site in section(module)["sites"]] == ["keep", "keep"]


@pytest.mark.parametrize(("budget", "calls"), [("2", 2), ("0", 0), ("34%", 1)])
def test_budgets_of_sites(budget: str, calls: int) -> None:
    module = linearized(
        mlp(nn.ReLU(), nn.ReLU(), nn.ReLU()), vectors, spec=f"relu_sites={budget},rounds=2"
    )
    assert len(comparisons(module, vectors)) == calls
    assert [s["kept"] for s in section(module)["sites"] if s["kept"]] == [8] * calls


def test_budgets_of_both() -> None:
    module = linearized(
        mlp(nn.ReLU(), nn.ReLU(), nn.ReLU()), vectors, spec="relu_sites=2,relus=11,rounds=3"
    )
    counted = comparisons(module, vectors)
    assert sum(counted.values()) == 11
    assert len(counted) == 2


def test_the_budget_s_own_text() -> None:
    module = graphopt.optimize(
        mlp(), "relus=25%", example_inputs=(vectors,), data=[vectors], time_limit=10.0
    )
    assert sum(comparisons(module, vectors).values()) == 4


def test_less_is_lost_with_more_kept() -> None:
    torch.manual_seed(0)
    model = cnn()
    errors = [
        section(linearized(model, images, spec=f"relus={share}%,rounds=2"))["output_error"]
        for share in (0, 40, 90)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]
