"""Brief training: closed forms, by-hand steps, and everything else left as it was."""

from __future__ import annotations

import copy
import os
import random
import signal
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt import errors
from graphopt.batches import Batch
from graphopt.training import (
    accuracy_of,
    class_scores,
    distillation_loss,
    recalibrate,
    train,
)
from graphopt.training.objective import GroupWeights

Pairs = list[tuple[Tensor, Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
    )


def pairs() -> Pairs:
    torch.manual_seed(1)
    x = torch.randn(96, 4)
    return list(zip(x.split(32), x[:, :3].argmax(1).split(32), strict=True))


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_gradient_of_distillation_is_the_difference_of_softened_softmaxes() -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64)
    temperature = 3.0
    (found,) = torch.autograd.grad(distillation_loss(student, teacher, temperature), student)
    by_hand = (student / temperature).softmax(1) - (teacher / temperature).softmax(1)
    torch.testing.assert_close(found, temperature * by_hand / 5)
    assert float(distillation_loss(teacher, teacher, temperature)) == pytest.approx(0, abs=1e-12)


def test_distillation_averages_over_positions_and_pixels() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    flat = distillation_loss(a.flatten(0, 1), b.flatten(0, 1), 2.0)
    torch.testing.assert_close(distillation_loss(a, b, 2.0), flat)
    images = [t.permute(0, 2, 1)[..., None] for t in (a, b)]  # (N, C, L, 1)
    torch.testing.assert_close(distillation_loss(*images, 2.0), flat)
    with pytest.raises(errors.InputMismatch, match="shape"):
        distillation_loss(a, b[:1])


def test_multipliers_of_two_groups_by_hand() -> None:
    weights = GroupWeights(0.5)
    mean, losses = torch.tensor(1.5), {0: torch.tensor(2.0), 7: torch.tensor(1.0)}
    assert float(weights.lagrangian(mean, losses)) == 1.5
    weights.ascend(mean, losses)
    assert weights.weights == {0: 0.25, 7: 0.0}  # 0.5 (2 - 1.5); 0.5 (1 - 1.5) is below zero
    assert float(weights.lagrangian(mean, losses)) == 1.5 + 0.25 * 0.5
    weights.ascend(torch.tensor(1.0), {0: torch.tensor(0.6), 7: torch.tensor(1.2)})
    assert weights.weights == pytest.approx({0: 0.05, 7: 0.1})


def test_a_step_with_groups_is_the_lagrangians_gradient_step() -> None:
    """Plain descent on a linear model, two steps: the second with the multipliers of the first."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(8, 3).double(), torch.tensor([0, 1, 1, 1, 1, 1, 1, 1])
    by_hand = copy.deepcopy(model)
    weights = torch.zeros(2, dtype=torch.float64)
    for step in range(2):
        each = F.cross_entropy(by_hand(x), y, reduction="none")
        groups = torch.stack([each[y == g].mean() for g in (0, 1)])
        total = each.mean() + (weights * (groups - each.mean())).sum()
        rate = 0.3 * (1 + np.cos(np.pi * step / 2)) / 2
        gradients = torch.autograd.grad(total, list(by_hand.parameters()))
        with torch.no_grad():
            for p, g in zip(by_hand.parameters(), gradients, strict=True):
                p -= rate * g
        weights = (weights + 0.9 * (groups - each.mean()).detach()).clamp_min(0)
    report = train(
        model, [(x, y)], loss=F.cross_entropy, epochs=2, lr=0.3, optimizer=torch.optim.SGD,
        groups=lambda targets: targets, group_rate=0.9,
    )  # fmt: skip
    for p, q in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert list(report.group_weights.values()) == pytest.approx(weights.tolist())
    assert float(weights.max()) > 0


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    results = []
    for seed in (3, 3, 4):
        model = network()
        torch.manual_seed(len(results))  # what went before doesn't matter
        train(model, pairs(), loss=F.cross_entropy, epochs=2, seed=seed)
        results.append(state(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_only_what_is_asked_for_changes_and_everything_around_stays() -> None:
    model, teacher = network(), network()
    model.eval()
    model[1].train()
    model[0].weight.requires_grad_(False)
    model[4].weight.grad = torch.ones(3, 8)
    before, data = state(model), pairs()
    torch.manual_seed(5)
    random.seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    with torch.no_grad():
        report = train(
            model, data, teacher=teacher, parameters=["0.weight", "4.bias"], epochs=2, lr=0.1
        )
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    changed = {name for name, value in model.named_parameters() if not value.equal(before[name])}
    assert changed == {"0.weight", "4.bias"} == set(report.trained)
    assert (report.trained_count, report.total_count) == (32 + 3, 83)
    assert [part.training for part in model] == [False, True, False, False, False]
    assert teacher.training
    assert not model[0].weight.requires_grad
    assert model[4].weight.grad.equal(torch.ones(3, 8))
    assert model[4].bias.grad is None
    assert same(state(teacher), state(network()))


def test_the_best_weights_on_validation_data_are_kept() -> None:
    """A rate so large that every epoch is worse than the start."""
    model, data = network(), pairs()
    train(model, data, loss=F.cross_entropy, epochs=20, lr=0.02)
    before = state(model)
    report = train(
        model, data, loss=F.cross_entropy, epochs=3, lr=100.0, validation=data,
        optimizer=torch.optim.SGD,
    )  # fmt: skip
    assert report.kept_epoch == 0
    assert same(before, state(model))
    assert len(report.validation_losses) == 4
    assert min(report.validation_losses) == report.validation_losses[0]
    assert report.accuracy_before == report.accuracy_after


def test_accuracy_by_class_against_a_count() -> None:
    model, data = network().eval(), pairs()
    report = train(
        copy.deepcopy(model), data, loss=F.cross_entropy, epochs=15, lr=0.02, validation=data
    )
    x, y = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    with torch.no_grad():
        right = model(x).argmax(1) == y
    found = accuracy_of(model, data)
    assert found is not None
    assert found == report.accuracy_before
    assert found.classes == tuple(
        (c, int(right[y == c].sum()), int((y == c).sum())) for c in range(3)
    )
    assert found.mean == pytest.approx(float(right.double().mean()))
    assert found.worst[1] == min(float(right[y == c].double().mean()) for c in range(3))
    assert report.accuracy_after is not None
    assert report.accuracy_after.mean > found.mean
    assert report.to_dict()["accuracy_after"]["worst"] == list(report.accuracy_after.worst)


def test_after_a_nan_the_weights_are_what_they_were() -> None:
    model, data = network(), pairs()
    before = state(model)
    data[2] = (data[2][0] * float("nan"), data[2][1])
    with pytest.raises(errors.NonFiniteError, match="step 2"):
        train(model, data, loss=F.cross_entropy)
    assert same(before, state(model))
    assert model.training
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.skipif(os.name != "posix", reason="sends a signal")
def test_ctrl_c_ends_after_the_step_at_hand() -> None:
    def interrupted(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for index, pair in enumerate(pairs()):
            if index == count:
                os.kill(os.getpid(), signal.SIGINT)
            yield pair

    model, other = network(), network()
    handler = signal.getsignal(signal.SIGINT)
    report = train(model, interrupted(1), loss=F.cross_entropy, steps=3, lr=0.01)
    assert (report.status, report.steps) == ("interrupted", 2)
    assert signal.getsignal(signal.SIGINT) is handler
    full = train(other, pairs()[:2], loss=F.cross_entropy, steps=3, lr=0.01)
    assert full.steps == 3
    assert not same(state(model), state(network()))


def test_data_that_ends_early_is_said_to() -> None:
    report = train(network(), iter(pairs()), loss=F.cross_entropy, steps=9)
    assert (report.status, report.steps) == ("out of data", 3)


def test_recalibration_is_the_mean_over_batches_in_closed_form() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.03), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(6, 5), nn.BatchNorm1d(5), nn.BatchNorm1d(5, track_running_stats=False),
    ).double()  # fmt: skip
    data = [torch.randn(32, 4).double() * 50 for _ in range(3)]
    before = state(model)
    names = recalibrate(model.eval(), data)
    inner = [model[0](x).detach() for x in data]
    means = torch.stack([x.mean(0) for x in inner]).mean(0)
    variances = torch.stack([x.var(0) for x in inner]).mean(0)
    torch.testing.assert_close(model[1].running_mean, means)
    torch.testing.assert_close(model[1].running_var, variances)
    assert set(names) == {f"{i}.running_{kind}" for i in (1, 5) for kind in ("mean", "var")}
    after = state(model)
    untouched = [name for name in after if name not in names]
    assert all(after[name].equal(before[name]) for name in untouched)
    assert not model.training


def test_class_scores_of_structured_outputs() -> None:
    logits, hidden = torch.zeros(2, 3), torch.zeros(2, 8)
    assert class_scores({"logits": logits, "hidden": hidden}) is logits
    assert class_scores((logits, torch.zeros(2, dtype=torch.int64))) is logits
    with pytest.raises(errors.UsageError, match="2 floating"):
        class_scores((logits, hidden))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "nothing to learn from"),
        ({"loss": F.cross_entropy, "epochs": 0}, "epochs=0"),
        ({"loss": F.cross_entropy, "lr": 0.0}, "lr=0"),
        ({"loss": F.cross_entropy, "parameters": ["9.weight"]}, "9.weight"),
        ({"loss": lambda outputs, _: outputs.sum().detach()}, "depends on none"),
        ({"loss": F.cross_entropy, "data": []}, "no batch"),
        ({"loss": F.cross_entropy, "data": iter([]), "epochs": 2}, "read only once"),
        ({"loss": F.cross_entropy, "data": [(torch.zeros(2, 5), torch.zeros(2))]}, "fails on"),
        ({"loss": F.cross_entropy, "groups": lambda y: y.float()}, "one whole number"),
    ],
)
def test_bad_input_is_refused(options: dict[str, object], match: str) -> None:
    model = network()
    before = state(model)
    data = options.pop("data", [(torch.zeros(4, 4), torch.tensor([0, 1, 2, 0]))])
    with pytest.raises(errors.GraphoptError, match=match):
        train(model, data, **options)  # type: ignore[arg-type]
    assert same(before, state(model))


def test_a_model_is_not_its_own_teacher() -> None:
    model = network()
    with pytest.raises(errors.UsageError, match="own teacher"):
        train(model, pairs(), teacher=model)


def test_groups_without_targets_are_refused() -> None:
    from graphopt.training.objective import read_groups

    with pytest.raises(errors.UsageError, match="targets"):
        read_groups(lambda y: y, Batch((torch.zeros(1),), {}))


def test_a_clipped_step_has_the_norm_it_may_have() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    before = state(model)
    x, y = 100 * torch.randn(8, 3), torch.zeros(8, dtype=torch.int64)
    train(
        model, [(x, y)], loss=F.cross_entropy, lr=1.0, optimizer=torch.optim.SGD, clip=0.5
    )  # fmt: skip
    moved = torch.cat([(model.state_dict()[n] - before[n]).flatten() for n in before])
    assert float(moved.norm()) == pytest.approx(0.5, rel=1e-4)
    with pytest.raises(errors.UsageError, match="clip"):
        train(model, [(x, y)], loss=F.cross_entropy, clip=0.0)
