"""Randomised parameters: which layers change, and what a method that ignores the model shows."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import GraphoptError, InputMismatch, ModelError, NonFiniteError, UsageError
from graphopt.passes.relevance.judging import randomisation_check

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
Inputs = tuple[Any, ...]


class Tower(nn.Module):
    """Defined in another order than it is called in; a free parameter; a layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(16, 3)
        self.first = nn.Linear(12, 16)
        self.shift = nn.Parameter(torch.ones(16))
        self.middle = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.LayerNorm(16))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(torch.relu(self.first(x) + self.shift)))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(1)
    return Tower()


def gradient(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
    x = inputs[0].clone().requires_grad_()
    chosen = module(x).gather(1, targets[:, None]).sum()
    return torch.autograd.grad(chosen, x)[0] * inputs[0]


def test_cascading_goes_from_the_outputs_down_and_keeps_what_is_random(model: nn.Module) -> None:
    states: list[dict[str, Tensor]] = []

    def watched(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        states.append({k: v.clone() for k, v in module.state_dict().items()})
        return gradient(module, inputs, targets)

    found = randomisation_check(model, X, watched)
    assert found.layers == ("last", "middle.2", "middle.0", "first", "", "unused")
    assert found.similarity.shape == (6, 5)
    trained = model.state_dict()
    for done in range(6):
        for name, value in states[done].items():
            owner = name.rpartition(".")[0]
            constant = name in ("middle.2.weight", "middle.2.bias", "shift")  # of deviation 0
            random = owner in found.layers[:done] and not constant
            assert torch.equal(value, trained[name]) != random, (done, name)


def test_independent_randomises_one_layer_at_a_time(model: nn.Module) -> None:
    changed: list[set[str]] = []
    trained = model.state_dict()

    def watched(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        now = module.state_dict().items()
        changed.append({k.rpartition(".")[0] for k, v in now if not torch.equal(v, trained[k])})
        return gradient(module, inputs, targets)

    layers = ["first", "middle", "last"]
    found = randomisation_check(model, X, watched, mode="independent", layers=layers)
    assert changed == [set(), {"first"}, {"middle.0"}, {"last"}]
    assert found.layers == tuple(layers)


def test_similarity_falls_for_a_gradient_and_not_for_an_edge_detector(model: nn.Module) -> None:
    x = torch.randn(60, 12, generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wide = nn.Sequential(nn.Linear(12, 64), nn.ReLU(), nn.Linear(64, 4))
    found = randomisation_check(wide, x, gradient)
    assert found.layers == ("2", "0")
    assert abs(found.final.mean) < 0.5
    blind = randomisation_check(wide, x, lambda _module, inputs, _targets: inputs[0])
    assert torch.equal(blind.similarity, torch.ones(2, 60, dtype=torch.float64))
    noise = randomisation_check(wide, x, lambda *_: torch.randn(60, 12))
    assert torch.equal(noise.similarity, torch.ones(2, 60, dtype=torch.float64))  # one seed


def test_scale_of_activations_is_kept(model: nn.Module) -> None:
    """Redrawn with its own mean and deviation."""
    big = nn.Linear(400, 300)
    nn.init.normal_(big.weight, 0.2, 0.03)
    seen: list[Tensor] = []

    def watched(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        seen.append(module.get_parameter("weight").detach().clone())
        return inputs[0]

    randomisation_check(big, torch.zeros(2, 400), watched)
    assert not torch.equal(seen[0], seen[1])
    assert float(seen[1].mean()) == pytest.approx(0.2, abs=1e-3)
    assert float(seen[1].std()) == pytest.approx(0.03, rel=0.02)


def test_the_class_explained_is_the_trained_models(model: nn.Module) -> None:
    seen: list[Tensor] = []

    def watched(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        seen.append(targets)
        return gradient(module, inputs, targets)

    randomisation_check(model, X, watched)
    assert all(torch.equal(t, model(X).argmax(1)) for t in seen)
    randomisation_check(model, X, watched, targets=2)
    assert seen[-1].tolist() == [2] * 5


def test_the_model_and_the_random_state_stay_as_they_were(model: nn.Module) -> None:
    model.train()
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    first, second = (
        randomisation_check(model, X, lambda m, i, t: gradient(m, i, t) + torch.rand(5, 12))
        for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(first.similarity, second.similarity)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_tied_parameters_are_randomised_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(12, 12, bias=False)
            self.head = nn.Linear(12, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.embed(x)))

    same: list[bool] = []

    def watched(module: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
        parameters = dict(module.named_parameters(remove_duplicate=False))
        same.append(parameters["embed.weight"] is parameters["head.weight"])
        return gradient(module, inputs, targets)

    found = randomisation_check(Tied(), X, watched)
    assert found.layers == ("head", "embed")
    assert all(same)


def test_the_report_is_json(model: nn.Module) -> None:
    found = randomisation_check(model, X, gradient, layers=["last"], absolute=True)
    data = json.loads(json.dumps(found.to_dict()))
    assert data["layers"]["last"]["mean"] == pytest.approx(float(found.similarity.mean()))


@pytest.mark.parametrize(
    ("error", "match", "options"),
    [
        (UsageError, "cascading", {"mode": "cascade"}),
        (UsageError, "last", {"layers": ["lats"]}),
        (UsageError, "middle.1", {"layers": ["middle.1"]}),
        (UsageError, "no layers", {"layers": []}),
        (ModelError, "Module", {"model": torch.relu}),
        (ModelError, "parameters", {"model": nn.ReLU()}),
        (InputMismatch, "5 samples", {"attribute": lambda *_: torch.ones(4, 12)}),
        (InputMismatch, "NoneType", {"attribute": lambda *_: None}),
        (NonFiniteError, "NaN", {"attribute": lambda *_: torch.full((5, 12), torch.nan)}),
    ],
)
def test_what_makes_no_sense_is_refused(
    model: nn.Module, error: type[GraphoptError], match: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=match):
        randomisation_check(**{"model": model, "inputs": X, "attribute": gradient, **options})
