"""Circa's stochastic ReLU against real shares, and the search for its bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from graphopt.errors import InputMismatch, UnsupportedError, UsageError
from graphopt.private import fault_probability, search, simulate
from tests.private.nets import build

DRAWS = 200_000


def sign_by_shares(x: int, bits: int, truncated: int, mode: str, seed: int) -> Tensor:
    """Circa's comparison on shares of x modulo 2^bits: whether each of many draws says positive."""
    size = 1 << bits
    client = torch.randint(size, (DRAWS,), generator=torch.Generator().manual_seed(seed))
    server = (x - client) % size
    assert bool(((client + server) % size == x % size).all())
    t = (size - client) % size
    s, t = server >> truncated, t >> truncated
    return s > t if mode == "poszero" else s >= t


@pytest.mark.parametrize("mode", ["poszero", "negpass"])
@pytest.mark.parametrize(("bits", "truncated"), [(10, 0), (10, 6), (10, 9), (31, 14), (8, 7)])
def test_probabilities_are_those_of_shares(mode: str, bits: int, truncated: int) -> None:
    half = 1 << (bits - 1)
    step = 1 << truncated
    values = {1, step // 2 + 1, step - 1, step, 2 * step, half // 3, half - 1}
    for seed, size in enumerate(sorted(v for v in values if 0 < v < half)):
        for x in (size, -size):
            positive = sign_by_shares(x, bits, truncated, mode, seed)
            faults = float((positive != (x > 0)).double().mean())
            told = float(fault_probability(torch.tensor(x), truncated, mode, bits))  # type: ignore[arg-type]
            deviation = math.sqrt(max(told * (1 - told), 1e-9) / DRAWS)
            assert abs(faults - told) < 5 * deviation + 1e-5


@pytest.mark.parametrize("mode", ["poszero", "negpass"])
def test_probabilities_by_counting_every_share(mode: str) -> None:
    """All shares of all values of a small ring: the formula is exact."""
    bits = 6
    size = 1 << bits
    t = torch.arange(size)
    for truncated in range(bits):
        for x in range(-size // 2 + 1, size // 2):
            s = (x + t) % size
            upper, other = s >> truncated, t >> truncated
            positive = upper > other if mode == "poszero" else upper >= other
            faults = int((positive != (x > 0)).sum()) if x else 0
            told = float(fault_probability(torch.tensor(x), truncated, mode, bits))  # type: ignore[arg-type]
            assert told * size == pytest.approx(faults, abs=1e-9)


def test_published_approximation() -> None:
    """|x| / p + (2^k - |x|) / 2^k where p is large, as the paper states it."""
    x = torch.tensor([100.0, 1000.0, 5000.0, -100.0, -5000.0])
    p, step = 2.0**31, 4096.0
    ties = ((step - x.abs()) / step).clamp(min=0)
    poszero = x.abs() / p + torch.where(x > 0, ties, 0.0)
    negpass = x.abs() / p + torch.where(x < 0, ties, 0.0)
    assert torch.allclose(fault_probability(x, 12, "poszero").float(), poszero, atol=1e-5)
    assert torch.allclose(fault_probability(x, 12, "negpass").float(), negpass, atol=1e-5)


def test_faults_of_a_relu_are_as_likely_as_told() -> None:
    count = 100_000
    for mode, sign in (("poszero", 1.0), ("negpass", -1.0)):
        module = simulate(
            nn.ReLU(), (torch.zeros(4, 2),), truncated_bits=8, mode=mode,  # type: ignore[arg-type]
            fraction_bits=8, ring_bits=20,
        )  # fmt: skip
        x = torch.full((count, 2), 0.25 * sign)  # 64 of 256
        found = module(x)
        assert set(found.unique().tolist()) == {0.0, 0.25 * sign}
        faults = float((found != x.relu()).double().mean())
        assert faults == pytest.approx(0.75 + 64 / 2**20, abs=5 * math.sqrt(0.19 / (2 * count)))
        away = module(-x)  # the other sign is safe but for wrapping
        assert float((away != (-x).relu()).double().mean()) < 5e-4


REDUCIBLE: dict[str, nn.Module] = {
    "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-0.5, 0.7), "leaky": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(3, 0.3), "pool": nn.MaxPool2d(3, 2, 1), "pool1": nn.MaxPool2d(2),
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCIBLE)
def test_what_reduces_to_relus_is_exact_without_faults(name: str) -> None:
    """With a ring so large and fractions so fine that faults don't occur."""
    x = 4 * torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    model = REDUCIBLE[name]
    module = simulate(model, (x,), truncated_bits=0, fraction_bits=16, ring_bits=52)
    assert module.exact == ()
    assert torch.allclose(module(x), model(x), atol=1e-6)
    coarse = simulate(model, (x,), truncated_bits=17, fraction_bits=16, ring_bits=52)
    assert not torch.allclose(coarse(x), model(x), atol=1e-2)


def test_functions_that_reduce_and_ones_that_stay_exact() -> None:
    class Many(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            z = torch.maximum(x, y) + torch.minimum(x, 2 * y) + x.abs().clamp(min=0.1)
            return z.clamp(max=0.9), {"most": x.amax(1), "pooled": nn.MaxPool1d(2)(x)}

    x, y = torch.randn(4, 3, 6), torch.randn(4, 3, 6)
    module = simulate(Many(), (x, y), truncated_bits=0, fraction_bits=16, ring_bits=52)
    found, want = module(x[:3], y[:3]), Many()(x[:3], y[:3])
    assert torch.allclose(found[0], want[0], atol=1e-6)
    assert torch.allclose(found[1]["pooled"], want[1]["pooled"], atol=1e-6)
    assert torch.equal(found[1]["most"], want[1]["most"])
    assert [name.split("_")[0] for name in module.exact] == ["amax"]


def test_simulations_repeat_and_leave_everything_alone() -> None:
    model, x = build("residual", 4)
    model.train()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    module = simulate(model, (x,), truncated_bits=14, seed=3)
    first = module(x)
    again = module(x)
    assert not torch.equal(first, again)  # other faults
    module.restart()
    assert torch.equal(module(x), first)
    assert torch.equal(simulate(model, (x,), truncated_bits=14, seed=3)(x), first)
    assert not torch.equal(simulate(model, (x,), truncated_bits=14, seed=4)(x), first)
    assert module(x[:1]).shape == (1, 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert torch.allclose(module.exactly(x), model.eval()(x), atol=1e-6)


def classifier() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(),
                          nn.Linear(64, 5))  # fmt: skip
    return model, torch.randn(1000, 8)


@pytest.mark.parametrize("mode", ["poszero", "negpass"])
def test_search_finds_where_the_loss_passes_the_tolerance(mode: str) -> None:
    model, x = classifier()
    data = list(x.split(300))
    told = search(model, data, tolerance=0.02, mode=mode, fraction_bits=12)  # type: ignore[arg-type]
    assert told.metric == "agreement"
    assert told.samples == 1000
    assert told.truncated_bits is not None
    losses = dict(told.tried)
    assert losses[told.truncated_bits] == told.loss <= 0.02
    assert losses[told.truncated_bits + 1] > 0.02
    assert told == search(model, data, tolerance=0.02, mode=mode, fraction_bits=12)  # type: ignore[arg-type]
    # measured from outside
    module = simulate(
        model, (x[:2],), truncated_bits=told.truncated_bits, mode=mode, fraction_bits=12  # type: ignore[arg-type]
    )  # fmt: skip
    with torch.no_grad():
        found = torch.cat([module(part) for part in data]).argmax(1)
        assert float((found != model(x).argmax(1)).double().mean()) == pytest.approx(told.loss)


def test_search_by_targets_and_where_nothing_fits() -> None:
    model, x = classifier()
    with torch.no_grad():
        targets = model(x).argmax(1)
    told = search(model, [(x, targets)], tolerance=0.02, fraction_bits=12)
    same = search(model, [x], tolerance=0.02, fraction_bits=12)
    assert told.metric == "accuracy"
    assert (told.truncated_bits, told.tried) == (same.truncated_bits, same.tried)
    # a ring so small that signs are often wrong although no bit is left out
    none = search(model, [x], tolerance=0.0, fraction_bits=12, ring_bits=16)
    assert none.truncated_bits is None
    assert none.loss > 0
    everything = search(model, [x], tolerance=1.0, fraction_bits=12)
    assert everything.truncated_bits == 30


class Masked(nn.Module):
    """Two inputs, the second of whole numbers, as a tokenizer gives them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores: Tensor = self.inner(x * mask.view(-1, *[1] * (x.dim() - 1)))
        return scores


def test_two_inputs_are_no_targets() -> None:
    inner, x = classifier()
    model, mask = Masked(inner), torch.ones(len(x), dtype=torch.long)
    plain = search(inner, [x], tolerance=0.02, fraction_bits=12)
    told = search(model, [(x, mask)], tolerance=0.02, fraction_bits=12)
    assert told.metric == "agreement"
    assert told.tried == plain.tried
    targets = inner(x).argmax(1)
    paired = search(model, [((x, mask), targets)], tolerance=0.02, fraction_bits=12)
    assert (paired.metric, paired.tried) == ("accuracy", plain.tried)


def test_bad_input() -> None:
    model, x = classifier()
    for options in ({"truncated_bits": 31}, {"truncated_bits": -1},
                    {"truncated_bits": 3, "mode": "zeropos"},
                    {"truncated_bits": 3, "ring_bits": 64},
                    {"truncated_bits": 3, "fraction_bits": 31}):  # fmt: skip
        with pytest.raises(UsageError):
            simulate(model, (x,), **options)  # type: ignore[arg-type]
    module = simulate(model, (x,), truncated_bits=3, fraction_bits=15, ring_bits=16)
    with pytest.raises(UnsupportedError, match="doesn't fit 16 bits") as caught:
        module(100 * x)
    assert caught.value.node == "relu"
    with pytest.raises(UnsupportedError, match="nan"):
        module(x * math.nan)
    with pytest.raises(UsageError, match="tolerance"):
        search(model, [x], tolerance=2)
    with pytest.raises(InputMismatch, match="no batch"):
        search(model, [])
    with pytest.raises(InputMismatch, match="scores"):
        search(nn.Flatten(0), [x])
    with pytest.raises(InputMismatch, match="shape"):
        search(model, [(x, torch.zeros(3, dtype=torch.long))])
