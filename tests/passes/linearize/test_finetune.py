"""Fine-tuning: it imitates, with and without labels, tells each class's change, and is fair."""

from __future__ import annotations

import copy
import os
import signal
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import InputMismatch, ModelError, NonFiniteError, UsageError
from graphopt.passes.linearize import finetune
from graphopt.passes.linearize.impact import impact
from graphopt.training import Accuracy, matching_loss, recalibrate, train
from graphopt.training.objective import GroupWeights
from tests.passes.linearize.nets import cnn, drawn, linearized, mlp, section

IMAGES = [drawn(16, 3, 8, 8, seed=seed) for seed in range(6)]


@pytest.fixture(scope="module")
def source() -> nn.Module:
    torch.manual_seed(0)
    model = cnn()
    recalibrate(model, IMAGES)  # norms that know the data, as a trained one's do
    return model


@pytest.fixture(scope="module")
def small(source: nn.Module) -> nn.Module:
    return linearized(source, IMAGES[0], spec="relus=10%,replacement=affine")


def labels(source: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Right for the most part, by the source itself."""
    with torch.no_grad():
        return [(x, source(x).argmax(1).roll(int(i == 0), 0)) for i, x in enumerate(IMAGES)]


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def distance(module: nn.Module, source: nn.Module, batches: list[Tensor]) -> float:
    return sum(float(matching_loss(module(x), source(x))) for x in batches)


def by_class(module: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> dict[int, float]:
    found: dict[int, list[bool]] = {}
    with torch.no_grad():
        for x, y in pairs:
            for guess, truth in zip(module(x).argmax(1).tolist(), y.tolist(), strict=True):
                found.setdefault(truth, []).append(guess == truth)
    return {label: sum(rights) / len(rights) for label, rights in sorted(found.items())}


def quiet(*args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return finetune(*args, **options)


def test_without_labels_weights_and_coefficients_go_towards_the_source() -> None:
    torch.manual_seed(0)
    head = nn.Linear(32, 4)
    source = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), head).eval()
    with torch.no_grad():
        head.weight *= 10.0  # sure of its classes, as a trained one is
    batches = [drawn(32, 6, seed=seed) for seed in range(40)]
    small = linearized(source, batches[0], spec="relus=20%,replacement=affine")
    student, teacher = copy.deepcopy(small), state(source)
    random_state, mode = torch.get_rng_state(), student.training
    report = quiet(student, batches[:30], teacher=source, epochs=12)
    assert report.imitated == "scores"
    distances = [distance(each, source, batches[30:]) for each in (small, student)]
    assert distances[1] < 0.75 * distances[0]
    changed = {n for n, p in student.named_parameters() if not p.equal(small.get_parameter(n))}
    assert changed == set(report.training.trained)
    assert any(name.startswith("_graphopt.") for name in changed)
    assert any(not name.startswith("_graphopt.") for name in changed)
    assert all(torch.equal(value, teacher[name]) for name, value in source.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert student.training is mode is False
    assert all(p.grad is None for p in (*student.parameters(), *source.parameters()))


def test_the_changes_by_class_are_those_counted_by_hand(
    source: nn.Module, small: nn.Module
) -> None:
    pairs, student = labels(source), copy.deepcopy(small)
    before, taught = by_class(small, pairs[4:]), by_class(source, pairs[4:])
    report = quiet(student, pairs[:4], teacher=source, loss=F.cross_entropy, validation=pairs[4:])
    after = by_class(student, pairs[4:])
    assert report.measured_on == "validation"
    for found, first in ((report.change, before), (report.against_teacher, taught)):
        assert found.truth == "labels"
        assert {c.label: c.before for c in found.classes} == first
        assert {c.label: c.after for c in found.classes} == after
        changes = {label: after[label] - first[label] for label in first}
        assert found.worst_change == min(changes.values()) == changes[found.worst]
    told = report.to_dict()
    assert told["against_teacher"]["worst"] == report.against_teacher.worst
    assert "worst class" in report.summary()


def test_without_labels_a_class_is_what_the_source_says(
    source: nn.Module, small: nn.Module
) -> None:
    report = quiet(copy.deepcopy(small), IMAGES, teacher=source)
    assert report.measured_on == "held out"
    assert report.change.truth == "source"
    assert report.against_teacher.before == 1.0
    assert sum(c.examples for c in report.change.classes) == 16  # one batch of six


@pytest.mark.parametrize("count", [6, 3])
def test_a_list_is_split_where_it_is_long_enough(
    source: nn.Module, small: nn.Module, count: int
) -> None:
    report = quiet(copy.deepcopy(small), IMAGES[:count], teacher=source, epochs=2)
    steps, place = {6: (10, "held out"), 3: (6, "training")}[count]
    assert (report.training.steps, report.measured_on) == (steps, place)


def test_an_iterator_that_can_be_read_once(source: nn.Module, small: nn.Module) -> None:
    report = quiet(copy.deepcopy(small), iter(IMAGES), teacher=source, steps=5)
    assert (report.training.steps, report.measured_on) == (5, "held out")


def test_the_same_seed_gives_the_same_weights(source: nn.Module, small: nn.Module) -> None:
    found = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        student = copy.deepcopy(small)
        quiet(student, IMAGES, teacher=source, epochs=1, seed=3)
        found.append(state(student))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_values_that_are_no_classes() -> None:
    """A regression, and embeddings in a tuple: no labels, no classes."""
    torch.manual_seed(0)
    head = nn.Linear(32, 1)
    source = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), head)
    with torch.no_grad():
        head.bias += 50.0  # far from zero: the spread counts, not the size
    batches = [drawn(32, 6, seed=seed) for seed in range(24)]
    student = linearized(source, batches[0], spec="relus=25%,replacement=affine")
    first = distance(student, source, batches[20:])
    report = quiet(student, batches[:20], teacher=source, epochs=20)
    assert report.imitated == "values"
    assert report.change is None
    assert distance(student, source, batches[20:]) < 0.7 * first
    losses = report.training.validation_losses
    assert min(losses) < losses[0]


def test_floating_targets_are_values_and_a_word_makes_embeddings_so() -> None:
    torch.manual_seed(0)
    source = mlp()
    batches = [drawn(16, 6, seed=seed) for seed in range(5)]
    student = linearized(source, batches[0])
    pairs = [(x, source(x).detach()) for x in batches]
    quiet_report = quiet(copy.deepcopy(student), pairs, teacher=source, loss=F.mse_loss)
    assert (quiet_report.imitated, quiet_report.change) == ("values", None)
    told = quiet(copy.deepcopy(student), batches, teacher=source, imitated="values")
    assert (told.imitated, told.change) == ("values", None)


def test_two_inputs_without_labels() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.head(torch.relu(self.layer(a) + b))

    torch.manual_seed(0)
    source = Two()
    batches = [(drawn(16, 4, seed=s), drawn(16, 8, seed=9 + s)) for s in range(5)]
    report = quiet(linearized(source, *batches[0]), batches, teacher=source)
    assert report.change.truth == "source"
    assert sum(c.examples for c in report.change.classes) == 16


def test_a_teacher_that_counts_its_calls_is_left_as_it_is() -> None:
    class Counting(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.head(torch.relu(self.layer(x)))

    torch.manual_seed(0)
    source = Counting()
    batches = [drawn(16, 4, seed=s) for s in range(3)]
    module = linearized(source, batches[0])
    quiet(module, batches, teacher=source, steps=2)
    assert float(source.calls) == 0
    assert float(module.get_buffer("calls")) == 2


def test_an_error_leaves_the_weights(source: nn.Module, small: nn.Module) -> None:
    student = copy.deepcopy(small)
    before = state(student)
    bad = [*IMAGES[:3], torch.full_like(IMAGES[0], float("nan"))]
    with pytest.raises(NonFiniteError):
        quiet(student, bad, teacher=source)
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_ctrl_c_keeps_what_was_reached(source: nn.Module, small: nn.Module) -> None:
    def interrupted() -> Iterator[Tensor]:
        for index, x in enumerate(IMAGES):
            if index == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield x

    student = copy.deepcopy(small)
    report = quiet(student, interrupted(), teacher=source, steps=50)
    assert report.training.status == "interrupted"
    assert 0 < report.training.steps < 50


def test_progress_is_told(source: nn.Module, small: nn.Module) -> None:
    told: list[str] = []

    def progress(message: str, fraction: float | None = None) -> None:
        told.append(message)

    quiet(copy.deepcopy(small), IMAGES, teacher=source, epochs=1, progress=progress)
    assert any("loss" in text for text in told)


def test_what_makes_no_sense_is_refused(source: nn.Module, small: nn.Module) -> None:
    sharing = graphopt.optimize(
        source, "relus=50%", (IMAGES[0],), data=IMAGES[:1], inplace=True, time_limit=5.0
    )
    for error, word, arguments in (
        (UsageError, "share", {"module": sharing}),
        (ModelError, "teacher", {"teacher": None, "loss": F.cross_entropy}),
        (UsageError, "fair", {"imitated": "values", "fair": True}),
        (UsageError, "fair=-1", {"fair": -1.0}),
        (UsageError, "held_out", {"held_out": 1.0}),
        (UsageError, "no batch", {"data": []}),
        (UsageError, "no pair", {"loss": F.cross_entropy}),
        (InputMismatch, "fails", {"data": [drawn(4, 2, 8, 8)]}),
    ):  # fmt: skip
        given = {"module": copy.deepcopy(small), "data": IMAGES, "teacher": source, **arguments}
        before = state(given["module"])
        with pytest.raises(error, match=word):
            finetune(**given)  # type: ignore[arg-type]
        assert all(torch.equal(v, before[n]) for n, v in given["module"].state_dict().items())


def test_the_squared_error_is_relative_to_the_spread() -> None:
    teacher = drawn(64, 3) * 7 + 100
    student = teacher + 7 * drawn(64, 3, seed=1)
    expected = float((student - teacher).square().mean() / teacher.var(correction=0))
    assert float(matching_loss(student, teacher)) == pytest.approx(expected, rel=1e-5)
    both = matching_loss((student, {"a": teacher}), (teacher, {"a": teacher}))
    assert float(both) == pytest.approx(expected / 2, rel=1e-5)
    constant = torch.full((4, 1), 2.0)  # no spread: relative to the size
    assert float(matching_loss(constant + 1, constant)) == pytest.approx(0.25)
    with pytest.raises(InputMismatch):
        matching_loss(student, teacher[:1])


def test_multipliers_are_projected_onto_their_limit() -> None:
    """Against the nearest point of a fine grid of those allowed."""
    weights = GroupWeights(1.0, limit=1.0)
    losses = {g: torch.tensor(v) for g, v in enumerate((1.9, 1.3, 1.05))}
    weights.ascend(torch.tensor(1.0), losses)
    moved = torch.tensor([0.9, 0.3, 0.05])
    grid = torch.cartesian_prod(*[torch.linspace(0, 1, 101)] * 3)
    grid = grid[grid.sum(1) <= 1 + 1e-6]
    nearest = grid[(grid - moved).square().sum(1).argmin()]
    assert list(weights.weights.values()) == pytest.approx(nearest.tolist(), abs=0.01)
    assert sum(weights.weights.values()) == pytest.approx(1.0)


def test_groups_by_the_teacher_are_those_of_its_labels(source: nn.Module, small: nn.Module) -> None:
    with torch.no_grad():
        pairs = [(x, source(x).argmax(1)) for x in IMAGES]
    by_label, by_teacher = copy.deepcopy(small), copy.deepcopy(small)
    options: dict[str, Any] = {"teacher": source, "group_rate": 0.01, "group_limit": 1.0}
    first = train(by_label, pairs, groups=lambda targets: targets, **options)
    second = train(by_teacher, IMAGES, groups="taught", **options)
    assert first.group_weights == second.group_weights
    assert max(first.group_weights.values()) > 0
    pairs_ = zip(by_label.parameters(), by_teacher.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs_)


def test_a_class_that_pays_for_all_is_warned_of() -> None:
    before = Accuracy(((0, 95, 100), (1, 95, 100), (2, 38, 40)))
    even = Accuracy(((0, 85, 100), (1, 84, 100), (2, 33, 40)))
    paid = Accuracy(((0, 94, 100), (1, 95, 100), (2, 20, 40)))
    lucky = Accuracy(((0, 94, 100), (1, 95, 100), (2, 1, 2)))
    assert impact(before, even, "labels").uneven() is None
    text = impact(before, paid, "labels").uneven()
    assert text is not None
    assert "class 2 lost 45.0" in text
    two = Accuracy(((0, 95, 100), (1, 95, 100), (2, 2, 2)))
    assert impact(two, lucky, "labels").uneven() is None  # one of two says nothing


def spirals(counts: list[int], seed: int) -> tuple[Tensor, Tensor]:
    """Arms of a spiral, one for each class: no line between them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = [], []
    for label, count in enumerate(counts):
        radius = 0.1 + 0.9 * torch.rand(count, generator=generator)
        noise = 0.12 * torch.randn(count, generator=generator)
        angle = 2 * torch.pi * label / len(counts) + 3.5 * radius + noise
        x.append(2 * torch.stack([radius * angle.cos(), radius * angle.sin()], 1))
        y.append(torch.full((count,), label))
    order = torch.randperm(sum(counts), generator=generator)
    return torch.cat(x)[order], torch.cat(y)[order]


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_rare_class_loses_less_where_it_is_fair(seed: int, labelled: bool) -> None:
    """One class of four has a twentieth of the others' examples; the test set has as many."""
    x, y = spirals([800, 800, 800, 40], seed)
    test = [spirals([500] * 4, seed + 100)]
    torch.manual_seed(seed)
    source = nn.Sequential(
        nn.Linear(2, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 4)
    )
    optimizer = torch.optim.Adam(source.parameters(), 5e-3)
    for _ in range(40):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(source(x[rows]), y[rows]).backward()
            optimizer.step()
    small = linearized(source, x[:512], spec="relus=10%,replacement=affine", time_limit=5.0)
    data = list(zip(x.split(64), y.split(64), strict=True)) if labelled else list(x.split(64))
    loss = F.cross_entropy if labelled else None
    worst = {}
    for fair in (False, True):
        student = copy.deepcopy(small)
        report = quiet(
            student, data, teacher=source, loss=loss, epochs=6, fair=fair, validation=test
        )
        first, after = by_class(source, test), by_class(student, test)
        worst[fair] = max(first[label] - after[label] for label in first)
        assert report.against_teacher.worst_change == pytest.approx(-worst[fair])
    assert worst[True] < worst[False] - 0.15


def test_the_pass_tells_the_change_of_each_class(source: nn.Module) -> None:
    pairs = labels(source)
    for data, truth in ((pairs, "labels"), (IMAGES, "source")):
        module = linearized(source, IMAGES[0], spec="relus=10%,replacement=affine", data=data)
        told = section(module)["impact"]
        counted = pairs if truth == "labels" else [(x, source(x).argmax(1)) for x in IMAGES]
        first, after = by_class(source, counted), by_class(module, counted)
        assert told["truth"] == truth
        assert {c["label"]: c["before"] for c in told["classes"]} == pytest.approx(first)
        assert {c["label"]: c["after"] for c in told["classes"]} == pytest.approx(after)
        assert told["worst_change"] == pytest.approx(min(after[c] - first[c] for c in first))
    for spec, options in (("relus=10%", {"data": None}), ("relus=10%,select=datafree", {})):
        assert section(linearized(source, IMAGES[0], spec=spec, **options))["impact"] is None
