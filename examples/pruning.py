"""Half of the FLOPs of a digit classifier: pruned with data, then fine-tuned for one epoch.

    python examples/pruning.py

What comes back is an ordinary module with smaller operators; it computes what the full network
computes with the removed units' parameters set to zero, and trains as it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt


def network() -> nn.Module:
    """A small convolutional network for images of 8 x 8."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]], epochs: int) -> None:
    """Plain training."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of right answers."""
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    """Trains, prunes, and trains once more."""
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    x, y = x[order], y[order]
    batches = list(zip(x[:1400].split(50), y[:1400].split(50), strict=True))
    model = network()
    train(model, batches, epochs=4)
    small = graphopt.optimize(
        model, "flops=50%", (x[:50],), data=batches[:16], loss=F.cross_entropy
    )
    found = small.report["prune"]
    print(f"FLOPs {found['flops_before']:,} -> {found['flops_after']:,}")
    for name, full, kept in found["dimensions"]:
        print(f"  {name}: {kept} of {full}")
    print(f"accuracy of the full network:   {accuracy(model, x[1400:], y[1400:]):.3f}")
    print(f"pruned:                         {accuracy(small, x[1400:], y[1400:]):.3f}")
    twin = small.report.masked_module()
    print(f"full size with zeros, the same: {accuracy(twin, x[1400:], y[1400:]):.3f}")
    train(small, batches, epochs=1)
    print(f"pruned, one epoch later:        {accuracy(small, x[1400:], y[1400:]):.3f}")


if __name__ == "__main__":
    main()
