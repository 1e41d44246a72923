"""Handwritten digits under noise, and a small residual network that reads them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

BATCH = 64
TRAINED_ON = 1200
NOISE = 0.25
"""Deviation of the noise on pixels in [0, 1], such that the dense network gets about 96 %."""
_DRAWS = 3

Data = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Data, Data]:
    """Scikit-learn's digits as images without noise for training, and with it for testing.

    Args:
        seed: Of the split and of the noise, of which each image for testing gets three draws.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
    targets = torch.from_numpy(labels).long()
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pixels), generator=generator)
    train, test = order[:TRAINED_ON], order[TRAINED_ON:].repeat(_DRAWS)
    return (pixels[train], targets[train]), (noisy(pixels[test], generator), targets[test])


def noisy(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with Gaussian noise."""
    return images + NOISE * torch.randn(images.shape, generator=generator)


def epoch(data: Data, generator: torch.Generator) -> Iterator[Data]:
    """The batches of one epoch, with fresh noise."""
    images, targets = data
    for rows in torch.randperm(len(images), generator=generator).split(BATCH):
        if len(rows) == BATCH:
            yield noisy(images[rows], generator), targets[rows]


class Block(nn.Module):
    """Two convolutions beside an identity, or beside a projection where the width changes."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        stride = 1 if c_in == c_out else 2
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1:
            projection = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """The block."""
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.skip(x))


class DigitNet(nn.Module):
    """A residual network of 5.7 million multiply-adds: two streams, five hidden widths."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(
            Block(32, 32), Block(32, 32), Block(32, 64), Block(64, 64), Block(64, 64)
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the ten digits."""
        x = self.blocks(torch.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


def train(
    module: nn.Module, data: Data, epochs: int, rate: float, generator: torch.Generator
) -> None:
    """Adam with a rate that falls to zero."""
    module.train()
    steps = epochs * (len(data[0]) // BATCH)
    optimizer = torch.optim.Adam(module.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for images, targets in epoch(data, generator):
            loss = nn.functional.cross_entropy(module(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    module.eval()


@torch.no_grad()
def accuracy(module: nn.Module, data: Data) -> float:
    """Share of images that are read rightly."""
    module.eval()
    images, targets = data
    found = torch.cat([module(part).argmax(1) for part in images.split(BATCH)])
    return float((found == targets).double().mean())


def trained(seed: int, data: Data, epochs: int = 10) -> nn.Module:
    """A trained network, in eval mode."""
    torch.manual_seed(seed)
    net = DigitNet()
    train(net, data, epochs, 3e-3, torch.Generator().manual_seed(seed))
    return net
