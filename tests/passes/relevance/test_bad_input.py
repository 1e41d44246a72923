"""What `explain` does with inputs and models that it can't, or can hardly, explain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import GraphoptError, InputMismatch, UnsupportedError, UsageError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def residual(explanation: Any) -> float:
    ledger = dict(explanation.ledger)
    return float((ledger.pop("output") - sum(ledger.values())).abs().max())


@pytest.mark.parametrize("target", [3, -4, [0, 1, 2, 3, 0]])
def test_a_class_that_does_not_exist(target: Any) -> None:
    with pytest.raises(UsageError, match="out of range"):
        graphopt.explain(Net(), (X,), target=target)(X)


def test_an_index_from_the_end() -> None:
    explained: Any = graphopt.explain(Net(), (X,), target=-1)
    found = explained(X)
    torch.testing.assert_close(found.ledger["output"], found.output[:, -1])
    torch.testing.assert_close(
        explained.at([[0] * 5, [-2] * 5])(X).ledger["output"][1], found.output[:, 1]
    )


def test_a_target_function_that_fails() -> None:
    with pytest.raises(UsageError, match=r"target fails on the output: .*logits"):
        graphopt.explain(Net(), (X,), target=lambda output: output.logits[:, 0])


def test_no_target_at_all() -> None:
    with pytest.raises(UsageError, match=r"a target of shape \(0,\)"):
        graphopt.explain(Net(), (X,), target=[])


def test_a_composite_of_another_type() -> None:
    with pytest.raises(UsageError, match="composite=None isn't known"):
        graphopt.explain(Net(), (X,), composite=None)


def test_a_composite_in_a_file() -> None:
    with pytest.raises(UsageError, match=r"Path\('mine.toml'\).read_text"):
        graphopt.explain(Net(), (X,), composite="mine.toml")


@pytest.mark.parametrize("composite", ["epsilon", "epsilon-plus", "epsilon-gamma"])
@pytest.mark.parametrize("scale", [2.0**70, 2.0**100])
def test_squares_that_overflow(composite: str, scale: float) -> None:
    """Without biases relevance is as large as the input: the ledger adds up at any scale."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    explained: Any = graphopt.explain(model, (X,), composite=composite)
    small, large = explained(X), explained(X * scale)
    assert residual(large) < 1e-4 * float(large.ledger["output"].abs().max())
    found = large.relevance["input_1"] / scale
    torch.testing.assert_close(found, small.relevance["input_1"], rtol=1e-4, atol=1e-5)


def test_one_attribute_as_text() -> None:
    explained: Any = graphopt.explain(Net(), (X,), attribute="one.weight")
    assert explained(X).relevance.keys() == {"x", "one.weight"}


@pytest.mark.parametrize(
    "options",
    [
        {"attribute": None},
        {"attribute": (3,)},
        {"emitter": "fast"},
        {"composite": "pattern-net", "data": 5},
    ],
)
def test_options_that_there_are_not(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"isn't known|there is no emitter"):
        graphopt.explain(Net(), (X,), **options)


def test_data_that_does_not_fit() -> None:
    with pytest.raises(InputMismatch, match="has to be 4, got 3"):
        graphopt.explain(Net(), (X,), composite="pattern-net", data=[X[:, :3]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_an_input_of_another_type(dtype: torch.dtype) -> None:
    explained: Any = graphopt.explain(Net(), (X,))
    with pytest.raises(InputMismatch, match=f"of {dtype}, the model takes torch.float32"):
        explained(X.to(dtype))


def test_autocast_changes_nothing() -> None:
    explained: Any = graphopt.explain(Net(), (X,))
    expected = explained(X)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = explained(X)
    assert torch.equal(found.relevance["x"], expected.relevance["x"])


class Filled(Net):
    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.one(x))
        h[:, 1] = 2.0
        return self.two(h)


def test_values_that_are_overwritten_by_a_constant() -> None:
    torch.manual_seed(0)
    model = Filled().double()
    x = X.double()
    found: Any = graphopt.explain(model, (x,), target=0)(x)
    lost = found.ledger["output"] - found.ledger["inputs"] - found.ledger["bias"]
    expected = torch.full((5,), 2.0, dtype=torch.float64) * model.two.weight[0, 1]
    torch.testing.assert_close(lost, expected)
    torch.testing.assert_close(found.ledger["constants"], expected)


def test_a_target_for_another_number_of_samples() -> None:
    with pytest.raises(UsageError, match="2 targets for a batch of 5"):
        graphopt.explain(Net(), (X,), target=[0, 1])(X)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_other_batches(batch: int) -> None:
    explained: Any = graphopt.explain(Net(), (X,))
    found = explained(torch.randn(batch, 4))
    assert found.ledger["output"].shape == (batch,)
    assert residual(found) < 1e-6


def test_all_inputs_zero() -> None:
    explained: Any = graphopt.explain(Net(), (X,))
    found = explained(torch.zeros(2, 4))
    assert float(found.relevance["x"].abs().max()) == 0
    assert residual(found) < 1e-6


@pytest.mark.parametrize("composite", ["cp-lrp", "epsilon", "epsilon-plus", "epsilon-gamma-box"])
@pytest.mark.parametrize("emitter", ["auto", "explicit"])
def test_all_activations_zero(composite: str, emitter: str) -> None:
    model = Net()
    with torch.no_grad():
        model.one.bias.fill_(-100)
    explained: Any = graphopt.explain(model, (X,), composite=composite, emitter=emitter)
    found = explained(X)
    assert bool(torch.isfinite(found.relevance["x"]).all())
    assert residual(found) < 1e-6


class Detached(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(x.shape[0], 3) + (x > 0).sum(1, keepdim=True)


def test_an_output_that_does_not_depend_on_the_input() -> None:
    with pytest.raises(UnsupportedError, match="depends on what shall be explained"):
        graphopt.explain(Detached(), (X,))


class Masked(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.qkv, self.out = fused, nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        if self.fused:
            y = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], keep[:, None])[
                :, 0
            ]
        else:
            scores = q @ k.transpose(1, 2) / 2
            y = scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num() @ v
        return self.out(y).sum(1)


@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp"])
@pytest.mark.parametrize("fused", [True, False])
def test_rows_of_attention_that_are_masked_altogether(fused: bool, composite: str) -> None:
    x = torch.randn(2, 5, 4)
    keep = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    keep[:, 2] = False
    explained: Any = graphopt.explain(Masked(fused), (x, keep), composite=composite)
    found = explained(x, keep)
    assert bool(torch.isfinite(found.relevance["x"]).all())
    assert residual(found) < 1e-5


@torch.library.custom_op("relevance_test::twist", mutates_args=())
def twist(x: Tensor) -> Tensor:
    return x.sin() * 2


@twist.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


class Custom(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return twist(x) + x


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(UnsupportedError) as caught:
        graphopt.explain(Custom(), (X,))
    text = str(caught.value)
    assert "twist" in text
    assert "test_bad_input.py" in text
    assert "hint" in text


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x, dim=1)
        return torch.fft.irfft(spectrum * spectrum + spectrum, n=x.shape[1], dim=1)


def test_sums_of_complex_numbers_and_their_products_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="complex"):
        graphopt.explain(Complex(), (X,))


def test_integers_that_are_only_cast_are_the_inputs() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, counts: Tensor) -> Tensor:
            return self.head(counts.float())

    counts = torch.randint(0, 5, (3, 4))
    model = Counts()
    found: Any = graphopt.explain(model, (counts,), target=1)(counts)
    want = counts * model.head.weight[1].detach()
    torch.testing.assert_close(found.relevance["counts"], want)


def test_samples_that_are_mixed_have_one_total() -> None:
    class Mixing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    found: Any = graphopt.explain(Mixing(), (X,))(X)
    assert found.ledger["output"].shape == (1,)
    assert residual(found) < 1e-6


def test_nothing_of_the_users_changes() -> None:
    model = Net().train()
    model.two.weight.requires_grad_(False)
    model.one.weight.grad = torch.ones_like(model.one.weight)
    before, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    graphopt.explain(model, (X,))(X)
    assert model.training
    assert model.two.training
    assert not model.two.weight.requires_grad
    assert bool((model.one.weight.grad == 1).all())
    assert torch.equal(state, torch.random.get_rng_state())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("attribute", [("nothing",), ("x", "nothing")])
def test_names_that_nothing_has(attribute: tuple[str, ...]) -> None:
    with pytest.raises(GraphoptError, match="nothing"):
        graphopt.explain(Net(), (X,), attribute=attribute)


def test_nan_inputs_are_refused() -> None:
    explained: Any = graphopt.explain(Net(), (X,))
    with pytest.raises(graphopt.NonFiniteError):
        explained(torch.full((2, 4), float("nan")))


class Written(nn.Module):
    """Writes through windows, which no rewriting undoes, into what carries no relevance."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = torch.zeros(4), torch.zeros(4)
        before = first.sum()
        first.unfold(0, 2, 2)[1] = 1.0
        return x * (first + 3 * second + before - first.sum())


def test_what_a_write_changes_is_not_merged_with_what_it_does_not() -> None:
    explanation = graphopt.explain(Written(), (X,))(X)
    assert torch.equal(explanation.output, Written()(X))
    assert residual(explanation) < 1e-6


def test_a_schedule_of_writes_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="in place"):
        graphopt.explain(Written(), (X,), memory_budget="90%")


def test_the_last_class_counted_from_the_end() -> None:
    net = Net()
    last, counted = (graphopt.explain(net, (X,), target=t)(X) for t in (2, -1))
    assert torch.equal(last.relevance["x"], counted.relevance["x"])


def test_a_batch_norm_in_training_takes_the_statistics_of_the_batch() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mean, variance = torch.zeros(4), torch.full((4,), 9.0)
            return F.batch_norm(x, mean, variance, training=True)

    explainer = graphopt.explain(Model(), (X,), target=1)
    assert residual(explainer(X)) < 1e-6
    assert max(entry["residual"] for entry in explainer.conservation(X)) < 1e-6


def test_patterns_are_found_behind_regions_and_writes() -> None:
    """Patterns are of the same graph as explanations, in which these are gone."""

    class Frozen(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                hidden = self.one(x).relu_()
            return self.two(hidden)

    plain, frozen = Net(), Frozen()
    frozen.load_state_dict(plain.state_dict())
    found = [
        graphopt.explain(m, (X,), composite="pattern-attribution", data=[X])(X).relevance["x"]
        for m in (plain, frozen)
    ]
    torch.testing.assert_close(*found)
