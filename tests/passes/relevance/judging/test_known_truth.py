"""The benchmark's networks with known truth: their data, and what they tell of attributions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from graphopt.passes.relevance.judging import localisation, perturbation_curves
from tests.benchmarks import glyphs, keytokens
from tests.benchmarks.attributions import METHODS
from tests.benchmarks.faithful_tasks import Task, glyph_task, token_task


def test_the_class_of_an_image_is_in_the_mask_alone() -> None:
    """The mask is one box; correlating it with the glyphs finds the class; nothing else has it."""
    pixels, classes, masks = glyphs.images(100, seed=5)
    assert torch.equal(masks.sum((1, 2)), torch.full((100,), glyphs.BOX**2))
    shapes = glyphs.glyphs() - glyphs.glyphs().mean((1, 2), keepdim=True)
    shapes = shapes / shapes.flatten(1).norm(dim=1)[:, None, None]
    boxes = pixels.mean(1)[masks].reshape(100, glyphs.BOX, glyphs.BOX)
    likeness = torch.einsum("nij,kij->nk", boxes, shapes)
    assert torch.equal(likeness.argmax(1), classes)
    elsewhere = (pixels.mean(1) * ~masks)[:, None]
    found = F.conv2d(elsewhere, shapes[:, None]).amax((2, 3))
    assert float(found.max()) < float(likeness.max(1).values.min())


def test_the_class_of_a_sequence_is_in_two_tokens_alone() -> None:
    ids, mask, classes, truth = keytokens.sequences(500, seed=5)
    assert torch.equal(truth.sum(1), torch.full((500,), 2))
    assert not (truth & (mask == 0)).any()
    keys = ids[truth].reshape(500, 2).sort(1).values
    assert torch.equal((keys[:, 0] - 2 + keys[:, 1] - 2 - keytokens.CLASSES) % 4, classes)
    rest = ids[~truth & (mask == 1)]
    assert not ((rest >= 2) & (rest < 2 + 2 * keytokens.CLASSES)).any()
    assert torch.equal(ids == keytokens.PAD, mask == 0)
    # Neither key alone tells the class.
    for column in range(2):
        table = torch.stack(
            [classes[keys[:, column] == k].bincount() for k in keys[:, column].unique()]
        )
        assert int(table.min()) > 10


def test_data_is_the_same_for_a_seed_and_other_for_another() -> None:
    for draw in (glyphs.images, keytokens.sequences):
        first, again, other = draw(5, 0), draw(5, 0), draw(5, 1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])


def _judged(task: Task, method: str) -> tuple[float, float, float]:
    """ABPC, its standard error, and the hit rate."""
    relevance = METHODS[method](task)
    curves = perturbation_curves(
        task.model, task.inputs, relevance, targets=task.targets, removal=task.removal,
        steps=task.steps,
    )  # fmt: skip
    places: Tensor = relevance.sum(1) if relevance.shape[1:] == (3, 40, 40) else relevance
    assert task.truth is not None
    located = localisation(places, task.truth, k=task.hits, allowed=task.removal.allowed)
    return curves.abpc.mean, curves.abpc.standard_error, located.hit_rate.mean


@pytest.mark.slow
@pytest.mark.parametrize("build", [glyph_task, token_task])
def test_trained_networks_tell_attributions_apart(build: type[Task]) -> None:
    task = build()
    assert task.accuracy is not None
    assert task.accuracy > 0.97
    chance, error, hits = _judged(task, "random")
    assert abs(chance) < 2 * error
    assert hits < 0.2
    good, error, hits = _judged(task, "integrated gradients")
    assert good > 10 * error
    assert hits > 0.6
