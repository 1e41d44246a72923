"""Gradual pruning around a user's loop: exact zeros, the exact budget, the model's own outputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt import errors
from graphopt.passes.prune import GradualPruning, gradually
from graphopt.passes.prune.analysis import analyse
from graphopt.passes.prune.decay import Decay

Optimizer = Callable[[Any], torch.optim.Optimizer]


class Network(nn.Module):
    """A residual stream, batch and layer norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.inward = nn.Linear(6, 16)
        self.norm = nn.BatchNorm1d(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.last = nn.Sequential(nn.LayerNorm(16), nn.Dropout(0.1), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.inward(x)))
        return self.last(x + self.down(F.relu(self.up(x))))


def network() -> nn.Module:
    torch.manual_seed(0)
    return Network().double()


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, 6).double()
    return x, x[:, :4].argmax(1)


def loop(
    model: nn.Module,
    pruning: GradualPruning | None,
    steps: int,
    make: Optimizer = lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    seen: Callable[[int], None] = lambda step: None,
) -> None:
    """A user's loop."""
    x, y = batch()
    optimizer = make(model.parameters())
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        schedule.step()
        if pruning is not None:
            pruning.step()
        seen(step + 1)


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).detach().norm() / b.detach().norm()) < 1e-10


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3), {}),
        (lambda p: torch.optim.Adam(p, lr=0.01), {"criterion": "hesso"}),
        (lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1), {"corrective": True}),
        (lambda p: torch.optim.SGD(p, lr=0.05), {"criterion": "l2", "round_to": 4}),
    ],
)
def test_what_comes_out_is_the_trained_model_within_the_budget(
    make: Optimizer, options: dict[str, Any]
) -> None:
    model, (x, _) = network(), batch()
    with gradually(
        model, "params=50%", (x[:8],), steps=40, periods=3, sampling=2, **options
    ) as pruning:
        loop(model, pruning, 44, make)
    small = pruning.module
    assert small.training
    model.eval(), small.eval()
    assert close(small(x), model(x))
    assert close(small.report.masked_module()(x), model(x))
    full = sum(p.numel() for p in model.parameters())
    left = sum(p.numel() for p in small.parameters())
    least = 0.8 if "round_to" in options else 0.95
    assert least <= left / (0.5 * full) <= 1
    found = small.report["prune"]
    assert (found["params_before"], found["params_after"]) == (full, left)
    for name, parameter in model.named_parameters():  # exactly zero wherever nothing is kept
        for axis, kept in found["kept"].get(name, {}).items():
            gone = sorted(set(range(parameter.shape[int(axis)])) - set(kept))
            assert gone
            assert not parameter.index_select(int(axis), torch.tensor(gone)).any()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert not close(small(x), model(x))  # nothing is shared


def test_weights_come_down_evenly_and_are_zero_at_the_end_of_each_period() -> None:
    """With a rate of zero the loop changes nothing but what the context does."""
    model, (x, _) = network(), batch()
    start = copy.deepcopy(model)
    shares: list[dict[str, Tensor]] = []

    def seen(step: int) -> None:
        named = dict(start.named_parameters())
        shares.append({n: (p / named[n]).detach() for n, p in model.named_parameters()})

    with gradually(model, "params=50%", (x[:8],), steps=12, periods=2, sampling=2) as pruning:
        loop(model, pruning, 14, lambda p: torch.optim.SGD(p, lr=0.0), seen)
    weight = [share["up.weight"] for share in shares]
    first, second = weight[6] == 0, weight[11] == 0  # steps 3..7 and 8..12
    assert 0 < int(first.sum()) < int(second.sum())
    for step, factor in enumerate([1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0]):
        torch.testing.assert_close(weight[step][first], torch.full_like(weight[0][first], factor))
        torch.testing.assert_close(weight[step][~first], torch.ones_like(weight[0][~first]))
    for step, factor in enumerate([4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0, 0]):
        later = second & ~first
        torch.testing.assert_close(
            weight[7 + step][later], torch.full_like(weight[0][later], factor)
        )
        assert not weight[7 + step][first].any()


def test_scores_on_data_do_not_need_the_loops_gradients() -> None:
    model, (x, y) = network(), batch()
    options: dict[str, Any] = {"data": [(x, y)], "loss": F.cross_entropy}
    with gradually(model, "params=60%", (x[:8],), steps=6, periods=2, **options) as pruning:
        for _ in range(6):
            pruning.step()
    model.eval()
    assert close(pruning.module.eval()(x), model(x))


def test_trials_leave_the_weights_as_they_were() -> None:
    """CRIC with a rate of zero: after the cycles, before the periods, nothing has moved."""
    model, (x, _) = network(), batch()
    before = copy.deepcopy(model.state_dict())
    steps, moved = 2 + 10 * 3 + 2, []

    def seen(step: int) -> None:
        now = model.state_dict()
        moved.append(any(not now[n].equal(p) for n, p in before.items() if n.endswith("weight")))

    pruning = gradually(
        model, "params=50%", (x[:8],), steps=steps, periods=1, sampling=3, corrective=True
    )
    with pruning:
        loop(model, pruning, steps, lambda p: torch.optim.SGD(p, lr=0.0), seen)
    assert 1 <= pruning.cycles <= 10
    ends = [3 + 3 * cycle for cycle in range(1, pruning.cycles + 1)]  # of each trial
    assert [moved[step - 1] for step in (3, *ends)] == [False] * (1 + len(ends))
    assert moved[3]
    assert moved[-1]


def test_an_error_in_the_loop_leaves_the_model_usable() -> None:
    model, (x, y) = network(), batch()
    before = copy.deepcopy(dict(model.named_parameters()))
    pruning = gradually(
        model, "params=50%", (x[:8],), steps=40, periods=2, sampling=3, corrective=True
    )

    def fails(step: int) -> None:
        if step == 5:  # within a trial
            assert any(not p.equal(before[name]) for name, p in model.named_parameters())
            raise RuntimeError("of the user")

    with pytest.raises(RuntimeError, match="of the user"), pruning:
        loop(model, pruning, 40, lambda p: torch.optim.SGD(p, lr=0.0), fails)
    assert all(p.equal(before[name]) for name, p in model.named_parameters())  # the trial undone
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(errors.UsageError, match="no pruned module"):
        _ = pruning.module


def test_a_loop_that_ends_early_is_told_so_and_can_be_finished() -> None:
    model, (x, _) = network(), batch()
    pruning = gradually(model, "params=50%", (x[:8],), steps=40, sampling=2)
    with pytest.raises(errors.UsageError, match="5 of 40 steps"), pruning:
        loop(model, pruning, 5)
    small = pruning.finish()
    model.eval()
    assert close(small.eval()(x), model(x))
    assert small.report["prune"]["params_after"] <= 0.5 * small.report["prune"]["params_before"]


def test_a_pruned_model_is_pruned_on() -> None:
    model, (x, _) = network(), batch()
    once = graphopt.optimize(model, "params=70%", (x[:8],))
    with gradually(once, "params=70%", (x[:8],), steps=12, periods=2, sampling=2) as pruning:
        loop(once, pruning, 12)
    twice = pruning.module
    once.eval()
    assert close(twice.eval()(x), once(x))
    twin = twice.report.masked_module()
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    assert close(twin(x), once(x))


def test_an_element_on_two_axes_decays_once() -> None:
    model, (x, _) = network(), batch()
    program = graphopt.capture(model, (x,))
    analysis = analyse(program)
    start = model.down.weight.detach().clone()
    rows, columns = (next(s for s in analysis.slots.values() if s.path == "down.weight")).value.axes
    units = {*analysis.units.units_of(rows[:1]), *analysis.units.units_of(columns[:1])}
    decay = Decay(analysis, frozenset(units))
    decay.scale(0.5)
    expected = start.clone()
    expected[0] *= 0.5
    expected[1:, 0] *= 0.5
    assert model.down.weight.detach().equal(expected)
    with torch.no_grad():
        model.down.weight[0] = float("nan")
    decay.scale(0)
    assert not model.down.weight[0].any()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": 4}, "too few"),
        ({"budget": "memory=50%"}, "memory"),
        ({"criteria": "l2"}, "no option 'criteria'"),
        ({"criterion": "l2", "corrective": True, "steps": 200}, "trials"),
        ({"criterion": "fisher"}, "activations"),
        ({"refine": 2, "data": [batch()]}, "refine"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], match: str) -> None:
    settings = {"budget": "params=50%", "steps": 40, **options}
    with pytest.raises(errors.GraphoptError, match=match):
        gradually(network(), settings.pop("budget"), (batch()[0],), **settings)


def test_a_step_without_gradients_says_where_it_belongs() -> None:
    pruning = gradually(network(), "params=50%", (batch()[0],), steps=40)
    with pytest.raises(errors.UsageError, match=r"after optimizer\.step"), pruning:
        pruning.step()
