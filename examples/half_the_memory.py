"""A training step in half the memory, measured, with the same gradients."""

import torch
from torch import nn

import graphopt
from graphopt.measure import measure_step


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A small convolutional network with dropout, and a batch for it."""
    torch.manual_seed(0)
    blocks: list[nn.Module] = []
    for inputs in (3, *[32] * 7):
        blocks += [nn.Conv2d(inputs, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10)]
    return nn.Sequential(*blocks, *head), (torch.randn(8, 3, 32, 32),)


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of one step; the same seed draws the same dropout."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(1)
    model(x).logsumexp(1).sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def main() -> None:
    model, (x,) = build()
    before = measure_step(model, (x,)).peak
    small = graphopt.optimize(model, "memory=50%", example_inputs=(x,), time_limit=20)
    after = measure_step(small, (x,)).peak
    plan = small.report["plan"]
    print(f"peak {before / 1e6:.2f} MB -> {after / 1e6:.2f} MB")
    print(f"overhead {100 * plan['overhead']:.2f} % ({plan['status']})")
    assert after <= before / 2

    for expected, got in zip(gradients(model, x), gradients(small, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    print("the gradients are those of the source model")


if __name__ == "__main__":
    main()
