"""What an explanation module promises as an `nn.Module`."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import NonFiniteError, UsageError
from graphopt.passes.relevance.module import ExplainedModule, Explanation
from tests.zoo import ZOO


class Net(nn.Module):
    """Convolutions, attention and an activation in between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.place = nn.Parameter(torch.randn(1, 16, 8) / 4)
        self.qkv = nn.Linear(8, 24)
        self.head = nn.Linear(8, 5)

    def forward(self, image: Tensor) -> Tensor:
        """Scores of five classes."""
        x = nn.functional.gelu(self.norm(self.conv(image))).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(x).chunk(3, -1)
        x = x + nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x.mean(1))


def _net(*, biases: bool = True) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = Net()
    nn.init.normal_(net.norm.bias if biases else net.norm.weight, 1.0)
    if not biases:
        for name, parameter in net.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
    return net.eval(), torch.randn(4, 3, 8, 8)


def _explained(model: nn.Module, x: Tensor, **options: object) -> ExplainedModule:
    found = graphopt.explain(model, (x,), **options)  # type: ignore[arg-type]
    assert isinstance(found, ExplainedModule)
    return found


def _close(first: Explanation, second: Explanation, tolerance: float = 0.0) -> None:
    assert first.relevance.keys() == second.relevance.keys()
    for name, wanted in second.relevance.items():
        torch.testing.assert_close(first.relevance[name], wanted, rtol=tolerance, atol=tolerance)
    for name, wanted in second.ledger.items():
        torch.testing.assert_close(first.ledger[name], wanted, rtol=tolerance, atol=tolerance)


def test_the_output_is_the_model_s_at_every_batch_size() -> None:
    model, x = _net()
    module = _explained(model, x)
    for batch in (x, torch.randn(7, 3, 8, 8), torch.randn(1, 3, 8, 8)):
        found = module(batch)
        torch.testing.assert_close(found.output, model(batch), rtol=1e-6, atol=1e-6)
        assert found.relevance["image"].shape == batch.shape
        assert found.ledger["output"].shape == batch.shape[:1]


def test_several_targets_are_those_one_by_one() -> None:
    model, x = _net()
    targets = torch.tensor([[0, 1, 2, 3], [4, 4, 0, 0]])
    found = _explained(model, x, target=targets)(x)
    torch.testing.assert_close(found.output, model(x), rtol=1e-6, atol=1e-6)
    for place, target in enumerate(targets):
        single = _explained(model, x, target=target)(x)
        for name, wanted in single.relevance.items():
            torch.testing.assert_close(found.relevance[name][place], wanted, rtol=1e-5, atol=1e-6)
        for name, wanted in single.ledger.items():
            torch.testing.assert_close(found.ledger[name][place], wanted, rtol=1e-5, atol=1e-6)


def test_a_user_may_map_over_targets() -> None:
    model, x = _net()
    module = _explained(model, x, target=0)
    found = torch.vmap(lambda t: module.at(t)(x).relevance["image"])(torch.arange(5))
    for index in range(5):
        wanted = module.at(index)(x).relevance["image"]
        torch.testing.assert_close(found[index], wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0], found[1])


def test_at_changes_the_kind_of_target_too() -> None:
    model, x = _net()
    module = _explained(model, x)
    best = model(x).argmax(-1)
    _close(module.at(best)(x), module(x), 1e-6)
    _close(module.at(lambda scores: scores.amax(-1))(x), module(x), 1e-6)


def test_copies_and_files() -> None:
    model, x = _net()
    module = _explained(model, x, attribute=("inputs", "node:gelu*"))
    wanted = module(x)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for twin in (
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ):
        _close(twin(x), wanted)
        with torch.no_grad():
            twin.model.get_parameter("head.weight").zero_()
        assert not twin(x).relevance["image"].any()
    _close(module(x), wanted)


def test_it_moves_to_another_type_and_back() -> None:
    model, x = _net()
    module = _explained(model, x)
    wanted = module(x)
    double = copy.deepcopy(module).to(torch.float64)(x.double())
    assert double.relevance["image"].dtype == torch.float64
    exact = _explained(copy.deepcopy(model).double(), x.double())(x.double())
    _close(double, exact, 1e-12)
    torch.testing.assert_close(double.relevance["image"].float(), wanted.relevance["image"])
    half = copy.deepcopy(module).bfloat16()(x.bfloat16())
    assert half.relevance["image"].dtype == torch.bfloat16
    _close(copy.deepcopy(module).double().float()(x), wanted, 1e-6)


def test_it_can_be_exported_and_compiled() -> None:
    model, x = _net()
    module = _explained(model, x)
    wanted = module(x)
    exported = torch.export.export(module, (x,))
    _close(exported.module()(x), wanted, 1e-6)
    _close(torch.compile(module, backend="eager")(x), wanted)
    fresh = copy.deepcopy(module).double()
    found = torch.export.export(fresh, (x.double(),)).module()(x.double())
    torch.testing.assert_close(found.relevance["image"].float(), wanted.relevance["image"])


def test_the_model_and_the_world_stay_as_they_were() -> None:
    model, x = _net()
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)  # type: ignore[union-attr, operator]
    state = copy.deepcopy(model.state_dict())
    random, grad = torch.get_rng_state(), torch.is_grad_enabled()
    functions = {name: getattr(nn.functional, name) for name in ("gelu", "linear", "softmax")}
    module = _explained(model, x)
    module(x.clone().requires_grad_())
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.is_grad_enabled() == grad
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert bool((model.head.weight.grad == 1).all())  # type: ignore[union-attr]
    assert all(p.grad is None for n, p in model.named_parameters() if n != "head.weight")
    assert all(p.requires_grad for p in model.parameters())
    assert all(getattr(nn.functional, name) is f for name, f in functions.items())


def test_another_state_gives_other_explanations() -> None:
    model, x = _net()
    module = _explained(model, x)
    torch.manual_seed(1)
    other = Net().eval()
    module.model.load_state_dict(other.state_dict())
    _close(module(x), _explained(other, x)(x), 1e-6)


def test_parameters_and_values_by_name() -> None:
    model, x = _net()
    found = _explained(model, x, attribute=("inputs", "place", "gelu*"))(x)
    assert found.relevance.keys() == {"image", "place", "gelu"}
    assert found.relevance["place"].shape == (1, 16, 8)
    assert found.relevance["gelu"].shape == (4, 8, 4, 4)
    every = _explained(model, x, attribute=("parameters",))(x)
    assert every.relevance.keys() >= {n for n, _ in model.named_parameters()}
    # what all of a linear layer's weights get is what passes through it without its bias
    whole = _explained(model, x)(x)
    weights, bias = every.relevance["head.weight"].sum(), every.relevance["head.bias"].sum()
    torch.testing.assert_close(weights + bias, whole.ledger["output"].sum(), rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="plaice"):
        _explained(model, x, attribute=("plaice",))


def test_a_glob_finds_inputs_and_all_else() -> None:
    model, x = _net()
    every = _explained(model, x, attribute=("*",))(x)
    assert every.relevance.keys() >= {"image", "gelu", *dict(model.named_parameters())}
    assert _explained(model, x, attribute=("im*",))(x).relevance.keys() == {"image"}
    with pytest.raises(UsageError, match="nothing that carries relevance is called 'chunk'"):
        _explained(model, x, attribute=("chunk",))


@pytest.mark.parametrize("target", ["argmax", [[0, 1, 2], [2, 2, 0]]])
def test_a_table_gets_what_its_rows_get(target: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(16, 3))
    ids = torch.tensor([[1, 4, 4, 0], [6, 1, 2, 1], [4, 4, 4, 4]])
    module: Any = graphopt.explain(model, (ids,), target=target, attribute=("inputs", "0.weight"))
    found = module(ids).relevance
    rows, of_ids = found["0.weight"].sum(-1), found["input_1"]
    for i in range(7):
        expected = torch.where(ids == i, of_ids, 0).sum((-1, -2))
        torch.testing.assert_close(rows[..., i], expected, rtol=1e-5, atol=1e-6)
    assert float(rows.abs().max()) > 0.01


def test_without_biases_the_ledger_is_the_sum_of_the_relevances() -> None:
    model, x = _net(biases=False)
    with torch.no_grad():
        model.norm.running_mean.zero_()  # type: ignore[union-attr, operator]
    found = _explained(model.double(), x.double(), attribute=("inputs", "place"))(x.double())
    inputs = found.relevance["image"].flatten(1).sum(1)
    torch.testing.assert_close(found.ledger["inputs"], inputs, rtol=1e-12, atol=1e-12)
    place = found.relevance["place"].sum()
    torch.testing.assert_close(found.ledger["parameters"].sum(), place, rtol=1e-12, atol=1e-12)
    both = found.ledger["inputs"] + found.ledger["parameters"]
    torch.testing.assert_close(both, found.ledger["output"], rtol=1e-12, atol=1e-12)


def test_both_emitters_agree() -> None:
    model, x = _net()
    first, second = (_explained(model, x, emitter=e)(x) for e in ("auto", "explicit"))
    scale = float(first.relevance["image"].abs().max())
    error = (first.relevance["image"] - second.relevance["image"]).abs().max()
    assert float(error) <= 1e-5 * scale


def test_nan_is_refused_when_it_comes() -> None:
    model, x = _net()
    module = _explained(model, x)
    bad = x.clone()
    bad[2, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        module(bad)
    module(x)


def test_a_target_out_of_range_is_refused_when_it_comes() -> None:
    model, x = _net()
    with pytest.raises(UsageError, match="out of range"):
        _explained(model, x, target=5)(x)


def test_coverage_and_rules_name_every_operation() -> None:
    model, x = _net()
    module = _explained(model, x)
    rules, coverage = module.rules(), module.coverage()
    assert coverage["operations"] == len(rules) > 10
    assert coverage["named"] == 1.0
    for table in (coverage["families"], coverage["rules"]):
        assert sum(entry["count"] for entry in table.values()) == len(rules)
        assert sum(entry["share"] for entry in table.values()) == pytest.approx(1)
    by_node = {entry["node"]: entry for entry in rules}
    assert by_node["conv2d"]["rule"] == "epsilon"
    assert by_node["conv2d"]["path"] == "conv"
    assert by_node["gelu"]["family"] == "activation"


def test_conservation_adds_up_to_the_ledger() -> None:
    model, x = _net()
    module = _explained(model.double(), x.double())
    entries = module.conservation()
    assert max(entry["residual"] for entry in entries) < 1e-12
    ledger = module(x.double()).ledger
    for sink in ("bias", "softmax", "epsilon", "parameters", "constants"):
        booked = sum(entry["sinks"].get(sink, 0.0) for entry in entries)
        assert booked == pytest.approx(float(ledger[sink].sum()), rel=1e-9, abs=1e-12)
    other = module.conservation(torch.randn(3, 3, 8, 8, dtype=torch.float64))
    assert [e["node"] for e in other] == [e["node"] for e in entries]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_transformers_are_explained_alike_in_copies_and_exports(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    kwargs = {k: v for k, v in kwargs.items() if k != "labels"}
    module = graphopt.explain(entry.model().eval(), args, example_kwargs=kwargs)
    wanted = module(*args, **kwargs)
    exported = torch.export.export(module, args, kwargs)
    _close(exported.module()(*args, **kwargs), wanted, 1e-6)
    _close(copy.deepcopy(module)(*args, **kwargs), wanted)


def test_an_exported_explanation_in_a_file() -> None:
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), torch.randn(2, 4)
    explained: Any = graphopt.explain(model, (x,))
    file = io.BytesIO()
    torch.export.save(torch.export.export(explained, (x,)), file)
    file.seek(0)
    found = torch.export.load(file).module()(x)
    assert isinstance(found, Explanation)
    (name,) = found.relevance
    torch.testing.assert_close(found.relevance[name], explained(x).relevance[name])
