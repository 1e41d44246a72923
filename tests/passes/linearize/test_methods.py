"""Ways to select what is kept: budgets, what they see of a network, and what they leave alone."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import NonFiniteError, UsageError
from graphopt.passes.linearize.distillation import distance
from graphopt.passes.linearize.linearize import Linearize
from graphopt.passes.linearize.methods.autorep import Indicators
from graphopt.private import comparisons, predict
from graphopt.registry import parse
from tests.passes.linearize.nets import Net, cnn, drawn, linearized, mlp, section

METHODS = ("snl", "autorep", "bcd", "deepreduce")
every = pytest.mark.parametrize("method", METHODS)
images, vectors = drawn(24, 3, 8, 8), drawn(40, 6)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return cnn()


def by(method: str, spec: str) -> str:
    return f"{spec},select={method},steps=40,trials=3"


@every
@pytest.mark.parametrize(
    ("spec", "kept"),
    [
        ("relus=25%", 120),
        ("relus=77,replacement=affine", 77),
        ("relus=0", 0),
        ("relus=50%,granularity=channel", 240),
        ("relus=120,granularity=site", 96),
        ("relus=100,relu_sites=1", 100),
    ],
)
def test_budgets_of_elements(model: nn.Module, method: str, spec: str, kept: int) -> None:
    """Sites of 384 and 96 elements, channels of 64 and 16."""
    module = linearized(model, images, spec=by(method, spec))
    counted = comparisons(module, images)
    assert sum(counted.values()) == section(module)["relus_after"] == kept
    assert section(module)["select"] == method
    assert len(counted) <= (1 if "relu_sites" in spec else 2)


@every
@pytest.mark.parametrize("calls", [0, 1, 2])
def test_budgets_of_sites(method: str, calls: int) -> None:
    module = linearized(
        mlp(nn.ReLU(), nn.ReLU(), nn.ReLU()), vectors, spec=by(method, f"relu_sites={calls}")
    )
    assert len(comparisons(module, vectors)) == calls
    assert [s["kept"] for s in section(module)["sites"] if s["kept"]] == [8] * calls


@every
def test_budgets_of_seconds(model: nn.Module, method: str) -> None:
    protocol, x = "crypten", images[:1]
    limit = 0.8 * predict(model, protocol, "lan", (x,)).seconds
    module = graphopt.optimize(
        model, None, (x,), data=[images], time_limit=10.0,
        passes=f"canonicalize,linearize{{{by(method, 'pi_latency=80%')},protocol={protocol}}}",
    )  # fmt: skip
    got = predict(module, protocol, "lan", (x,), public=("_graphopt.*",)).seconds
    assert 0 < got <= limit


def bypassed(place: int) -> nn.Module:
    """Three sites in a row of other sizes; one never meets a negative value, so it does nothing."""

    def forward(s: Any, x: Tensor) -> Tensor:
        for index, layer in enumerate((s.a, s.b, s.c)):
            x = layer(x) / 2
            x = F.relu(x + 50) - 50 if index == place else F.relu(x)
            x = F.avg_pool2d(x, 2) if index < 2 else x
        return s.d(x.flatten(1))

    torch.manual_seed(1)
    layers = {n: nn.Conv2d(i, 4, 3, padding=1) for n, i in (("a", 3), ("b", 4), ("c", 4))}
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.mul_(4)
    return Net(forward, **layers, d=nn.Linear(16, 5)).eval()


@every
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("limit", ["relu_sites=2", "relus"])
def test_a_useless_site_goes_first(method: str, place: int, limit: str) -> None:
    want = [0 if index == place else size for index, size in enumerate((256, 64, 16))]
    asked = limit if limit == "relu_sites=2" else f"relus={sum(want)},granularity=site"
    spec = f"{asked},replacement=affine,select={method},steps=150,trials=3"
    module = linearized(bypassed(place), images, spec=spec)
    assert [s["kept"] for s in section(module)["sites"]] == want
    assert section(module)["output_error"] < 1e-3


@every
def test_useless_elements_go_first(method: str) -> None:
    """Of 336 elements 256 do nothing; the budget is what is left, give or take one."""
    spec = f"relus=80,replacement=affine,select={method},trials=4"
    module = linearized(bypassed(0), images, spec=spec)
    assert section(module)["sites"][0]["kept"] <= 1
    assert section(module)["output_error"] < 1e-3


@every
def test_a_useless_site_among_equals_goes_first(method: str) -> None:
    """Vectors have no resolution by which to tell stages; the second layer does nothing."""
    torch.manual_seed(0)
    model = Net(
        lambda s, x: s.d(F.relu(s.c(F.relu(s.b(F.relu(s.a(x))) + 50) - 50))),
        a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 8), d=nn.Linear(8, 3),
    ).eval()  # fmt: skip
    for limit in ("relu_sites=2", "relus=16,granularity=site"):
        spec = f"{limit},replacement=affine,select={method},steps=150"
        module = linearized(model, vectors, spec=spec)
        assert [s["kept"] for s in section(module)["sites"]] == [8, 0, 8]


def halves() -> nn.Module:
    """Half of the last channels hardly reach the output."""
    torch.manual_seed(0)
    model = cnn()
    with torch.no_grad():
        weight: Tensor = model[8].weight  # type: ignore[assignment, index]
        weight.view(5, 6, 16)[:, ::2] *= 0.02
        weight.mul_(10)
    return model


def error(method: str, seed: int = 0) -> float:
    """Of the outputs, with half of the elements kept."""
    spec = f"relus=240,replacement=affine,select={method},steps=150"
    found: float = section(linearized(halves(), images, spec=spec, seed=seed))["output_error"]
    return found


@pytest.fixture(scope="module")
def chance() -> float:
    """The best of three random choices."""
    return min(error("random", seed) for seed in range(3))


@every
def test_better_than_chance(method: str, chance: float) -> None:
    assert error(method) < 0.8 * chance


@every
def test_the_same_seed_gives_the_same(model: nn.Module, method: str) -> None:
    first, second = (linearized(model, images, spec=by(method, "relus=20%")) for _ in range(2))
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])
    assert torch.equal(first(images), second(images))


@every
def test_the_user_s_model_stays_as_it_was(method: str) -> None:
    torch.manual_seed(0)
    source = cnn(nn.ReLU(inplace=True), nn.ReLU())
    source[0].weight.requires_grad_(False)  # type: ignore[index, union-attr, operator]
    state, x = copy.deepcopy(source.state_dict()), images.clone()
    random = torch.get_rng_state()
    with torch.no_grad():
        module = linearized(source, x, spec=by(method, "relus=20%"), data=[x])
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, images)
    assert all(torch.equal(value, state[key]) for key, value in source.state_dict().items())
    assert all(p.grad is None for p in source.parameters())
    assert not source[0].weight.requires_grad  # type: ignore[index, union-attr]
    for name, parameter in source.named_parameters():
        assert torch.equal(dict(module.named_parameters())[name], parameter)


@every
def test_labels_are_not_looked_at(model: nn.Module, method: str) -> None:
    def loss(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(y, t)

    zeros, mixed = (
        linearized(model, images, spec=by(method, "relus=20%"), data=[(images, each)], loss=loss)
        for each in (torch.zeros(24, dtype=torch.int64), torch.arange(24) % 5)
    )
    for key, value in zeros.state_dict().items():
        assert torch.equal(value, mixed.state_dict()[key])


@every
def test_several_outputs_of_any_kind(method: str) -> None:
    torch.manual_seed(0)
    model = Net(
        lambda s, x, y: {"a": s.b(F.relu(s.a(x))), "n": (9 * x).long(), "t": (s.c(F.gelu(y)),)},
        a=nn.Linear(6, 8), b=nn.Linear(8, 1), c=nn.Linear(6, 4),
    ).eval()  # fmt: skip
    x, y = vectors, drawn(40, 5, 6)
    module = linearized(model, x, y, spec=by(method, "relus=19,replacement=poly2"))
    assert section(module)["relus_before"] == 8 + 30
    assert section(module)["relus_after"] == 19
    with torch.no_grad():
        want, got = model(x, y), module(x, y)
    assert torch.equal(want["n"], got["n"])
    assert float((want["a"] - got["a"]).norm() / want["a"].norm()) < 0.5


@every
def test_pools_batches_and_several_replacements(method: str) -> None:
    """A pooling is replaced whole; batches differ in size; the solver may choose per site."""
    torch.manual_seed(0)
    net = cnn(nn.ReLU(), nn.ReLU(inplace=True), pool=nn.MaxPool2d(2))
    data = [images[:5].clone(), images[5:].clone()]
    module = linearized(net, images, spec=by(method, "relus=30%,replacement=auto"), data=data)
    assert sum(comparisons(module, images).values()) <= 0.3 * section(module)["relus_before"]
    assert all(torch.equal(a, b) for a, b in zip(data, (images[:5], images[5:]), strict=True))


@every
def test_without_data(model: nn.Module, method: str) -> None:
    module = linearized(model, images, spec=by(method, "relus=25%"), data=None)
    assert sum(comparisons(module, images).values()) == 120


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_models_of_other_types(method: str, dtype: torch.dtype) -> None:
    x = vectors.to(dtype)
    module = linearized(mlp().to(dtype), x, spec=by(method, "relus=50%"))
    assert section(module)["relus_after"] == 8
    assert {p.dtype for p in module.parameters()} == {dtype}


@pytest.mark.parametrize("method", ["snl", "autorep"])
def test_training_that_gives_nan_is_told(method: str) -> None:
    """The square root has no slope at 0, where a ReLU puts half of what it gets."""
    torch.manual_seed(0)
    model = Net(
        lambda s, x: s.b(F.relu(s.a(x)).sqrt()), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
    ).eval()
    with pytest.raises(NonFiniteError, match="training"):
        linearized(model, vectors, spec=by(method, "relus=25%"))


@every
def test_an_interrupt_leaves_the_model_whole(model: nn.Module, method: str) -> None:
    said: list[str] = []

    def progress(message: str, fraction: float | None = None) -> None:
        said.append(message)
        assert fraction is None or 0 <= fraction <= 1
        if fraction is not None and len(said) > 6:
            raise KeyboardInterrupt

    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        linearized(model, images, spec=by(method, "relus=20%"), progress=progress)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("option", ["steps", "trials", "rounds"])
def test_numbers_below_one(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}=0"):
        linearized(mlp(), vectors, spec=f"relus=25%,select=bcd,{option}=0")


def test_steps_are_a_limit(model: nn.Module) -> None:
    """Each step is told, and there are no more."""
    said: list[float] = []

    def progress(message: str, fraction: float | None = None) -> None:
        if message.startswith("training") and fraction is not None:
            said.append(fraction)

    spec = "relus=1%,replacement=affine,select=snl,steps=7"
    linearized(model, images, spec=spec, progress=progress)
    assert said == pytest.approx([step / 7 for step in range(7)])


def test_advice_tells_where_non_linearities_sit() -> None:
    """Of 336, 256 sit at 8x8, in a site that does nothing."""
    module = linearized(bypassed(0), images, spec="relus=50%,replacement=affine,select=deepreduce")
    least, most = section(module)["advice"]
    assert least.startswith("76 % of the non-linearities sit in the least critical stage")
    assert "8x8" in least
    assert "most critical" in most
    assert section(linearized(mlp(), vectors, spec="relus=50%"))["advice"] == []


def test_options_as_text() -> None:
    text = "linearize{relus=10%,select=bcd,steps=50,trials=12}"
    (found,) = parse(text).passes
    assert isinstance(found, Linearize)
    assert (found.select, found.steps, found.trials) == ("bcd", 50, 12)


def test_indicators_have_hysteresis() -> None:
    state = Indicators(torch.ones(4))
    for row, want in (
        ([0.1, 0.002, -0.002, -0.1], [1, 1, 1, 0]),
        ([-0.1, -0.002, 0.002, 0.002], [0, 1, 1, 0]),
        ([0.1, 0.002, -0.1, -0.002], [1, 1, 0, 0]),
    ):
        numbers = torch.tensor(row, requires_grad=True)
        kept = state.turned(numbers)
        assert kept.tolist() == want
        (gradient,) = torch.autograd.grad((kept * torch.arange(4.0)).sum(), numbers)
        exact = [place * math.log1p(math.exp(each)) for place, each in enumerate(row)]
        assert gradient.tolist() == pytest.approx(exact, rel=1e-5)


def test_distance_of_class_scores() -> None:
    """``T^2 sum p log(p / q)``, the mean over samples."""
    student, teacher = drawn(7, 4, seed=1), drawn(7, 4, seed=2)
    p, q = ((each.double() / 4).softmax(1) for each in (teacher, student))
    want = 16 * (p * (p / q).log()).sum(1).mean()
    assert float(distance([student], [teacher], 4.0)) == pytest.approx(float(want), rel=1e-5)
    assert float(distance([teacher], [teacher], 4.0)) == pytest.approx(0.0, abs=1e-6)


def test_distance_of_other_outputs() -> None:
    """Half the squared error by the mean square: scales don't count, and outputs add up."""
    a, b = drawn(7, 3, 2, seed=1), 100 * drawn(7, 1, seed=2)
    assert float(distance([a * 1.1, b], [a, b], 4.0)) == pytest.approx(0.005, rel=1e-4)
    assert float(distance([a * 1.1, b * 1.2], [a, b], 4.0)) == pytest.approx(0.025, rel=1e-4)
    assert float(distance([], [], 4.0)) == 0.0
