"""Predicted costs against closed forms and the engines' published structure."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from graphopt.errors import UnsupportedError, UsageError
from graphopt.private import LAN, WAN, Cost, lower, network, predict, protocol, protocols
from graphopt.private.points import Points
from graphopt.private.products import Packing, Product, TriplePool, blocks
from tests.private.nets import build


def test_crypten_opens_what_beavers_protocol_opens() -> None:
    """Both parties send 8 bytes for each opened element: x - a and y - b of a product."""
    conv = nn.Conv2d(2, 3, 3, bias=False)
    x = torch.randn(1, 2, 6, 6)
    cost = predict(conv, "crypten", "lan", (x,)).by_node()["conv2d"]
    assert cost.bytes == 2 * 8 * (x.numel() + conv.weight.numel())
    assert cost.rounds == 1


def test_a_relu_is_a_comparison_and_a_product() -> None:
    table = protocol("crypten")
    relu, compare = table.nonlinearity("relu", 100), table.nonlinearity("negative", 100)
    # the product of a value with a bit opens both
    assert relu == compare + table.nonlinearity("multiply", 100)


def test_rounds_depend_on_sites_and_bytes_on_elements() -> None:
    plain, x = build("plain")
    gathered, _ = build("gathered")
    full, tenth = (predict(m, "crypten", "wan", (x,)) for m in (plain, gathered))
    assert full.rounds == tenth.rounds == 3 + 2 * 9 + 1
    relus = [sum(s.bytes for s in c.sites if "relu" in s.op) for c in (full, tenth)]
    assert relus[1] / relus[0] == pytest.approx((14 + 3) / (144 + 36))


def test_depth_counts_the_longest_path_alone() -> None:
    class Two(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) + torch.relu(-x)

    cost = predict(Two(), "crypten", "lan", (torch.randn(4),))
    assert (cost.rounds, cost.depth) == (2 * 9 + 1, 9 + 1)


def test_seconds_are_bytes_over_bandwidth_and_rounds_times_the_latency() -> None:
    cost = Cost(25e6, 10)
    assert WAN.seconds(cost) == pytest.approx(1 + 10 * 0.04)
    assert LAN.seconds(cost, trips=1) == pytest.approx(25e6 * 8 / 3e9 + 10 * 0.0004)
    assert network("1e8,0.02") == dataclasses.replace(network((1e8, 0.02)))
    for wrong in ("fast", "1e8", (0, 0.1), (1e8, -1), (1e8, float("nan"))):
        with pytest.raises(UsageError):
            network(wrong)


@pytest.mark.parametrize("name", protocols())
def test_every_table_prices_a_square_network_and_says_where_it_comes_from(name: str) -> None:
    model, x = build("polynomial")
    cost = predict(model, name, "lan", (x,))
    assert cost.seconds >= 0
    assert cost.bytes > 0
    assert all(unit.source for unit in protocol(name).units.values())
    assert protocol(name).polynomial(1, 100) == Cost()
    degrees = [protocol(name).polynomial(d, 100).bytes for d in range(2, 5)]
    assert degrees == sorted(degrees)


def test_ckks_refuses_comparisons_by_node_and_counts_levels() -> None:
    model, x = build("plain")
    with pytest.raises(UnsupportedError, match="relu_1"):
        predict(model, "ckks", "lan", (x,))
    squared, x = build("polynomial")
    cost = predict(squared, "ckks", "lan", (x,))
    # convolution, scaling by a2, square, twice, and the last linear map
    assert (cost.levels, cost.rounds) == (2 * 3 + 1, 1)


def test_what_has_no_figures_is_named() -> None:
    model, x = build("attention")
    with pytest.raises(UnsupportedError, match="gelu"):
        predict(model, "gc", "lan", (x,))
    with pytest.raises(UsageError, match="crypten"):
        protocol("cryptenn")
    with pytest.raises(UnsupportedError, match="relu"):
        protocol("crypten").nonlinearity("rellu", 3)


def test_nonlinearities_price_what_circuits_pay() -> None:
    """The per-element figures and the walk over a network are one table."""
    x = torch.randn(3, 50)
    for name in ("crypten", "semi2k", "aby3"):
        for kind, model in (("relu", nn.ReLU()), ("relu6", nn.ReLU6()), ("silu", nn.SiLU())):
            walked = sum(protocol(name).steps(lower(model, (x,))).values(), Cost())
            assert walked == protocol(name).nonlinearity(kind, x.numel())


def brute_force(m: int, k: int, n: int, degree: int) -> int:
    """Fewest ciphertexts over all block sizes."""
    best = 10**9
    for a in range(1, m + 1):
        for b in (1, 2, 4, 8, 16, 32):
            for c in range(1, n + 1):
                if b > k or a * b * c > degree:
                    continue
                rows, deep, columns = -(-m // a), -(-k // b), -(-n // c)
                best = min(best, min(rows, columns) * deep + -(-rows * columns // b))
    return best


@pytest.mark.parametrize("size", [(1, 1, 1), (5, 8, 3), (9, 7, 12), (20, 16, 6)])
def test_blocks_send_the_fewest_ciphertexts(size: tuple[int, int, int]) -> None:
    sent, received, _ = blocks(*size, 64)
    assert sent + received == brute_force(*size, 64)


def test_packing_prices_both_cross_terms() -> None:
    packing = Packing(degree=8192, sent=10.0, response=7.0, single=3.0, element=1.0)
    assert packing.bytes(Product(1, 4, 8, 2)) == 2 * (10 + 3 + 8)
    assert packing.bytes(Product(3, 4, 8, 2)) == 3 * packing.bytes(Product(1, 4, 8, 2))


def test_triples_left_over_are_used_before_more_are_made() -> None:
    pool = TriplePool(batch=10, bytes=100.0, tiles=2, direct=25, direct_bytes=1000.0)
    assert pool.take(0, 12) == (8, 200.0)
    assert pool.take(8, 8) == (0, 0.0)
    assert pool.take(3, 49) == (4, 500.0)
    assert pool.take(3, 50) == (3, 2 * 1000.0)
    assert pool.take(3, 51) == (3, 3 * 1000.0)  # 26 and 25


def test_measured_points_are_hit_and_blocks_repeat() -> None:
    points = Points.read([[1, 24], [4, 32], [8, 40]])
    assert [points.at(n) for n in (0, 1, 4, 8)] == [0.0, 24.0, 32.0, 40.0]
    assert points.at(3) == pytest.approx(24 + 8 * 2 / 3)
    assert points.at(2 * 8 + 1) == 2 * 40 + 24
    sizes = [points.at(n) for n in range(40)]
    assert sizes == sorted(sizes)


# python -m tests.benchmarks.private_protocols --protocol cheetah, another run than the table's
MEASURED = {
    "relu": {14: 1584, 20: 2160, 40: 4064, 129: 13008, 200: 19904, 1000: 98608, 8192: 806912},
    "negative": {14: 1328, 48: 4064, 127: 10464, 257: 21408, 500: 41200, 2000: 164656},
    "scale": {14: 56, 33: 120, 50: 168, 127: 392, 129: 424, 1000: 3128, 8192: 25600},
}


@pytest.mark.parametrize("kind", MEASURED)
def test_few_elements_cost_more_under_cheetah(kind: str) -> None:
    unit = protocol("cheetah").unit(kind)
    for n, bytes_ in MEASURED[kind].items():
        assert unit.cost(n, n).bytes == pytest.approx(bytes_, rel=0.03, abs=8)
