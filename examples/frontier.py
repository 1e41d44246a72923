"""What every memory budget would cost, as a curve of text."""

import torch
from torch import nn

import graphopt


def build() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A small transformer encoder and a batch for it."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    return encoder, (torch.randn(4, 32, 64),)


def main() -> None:
    model, inputs = build()
    points = graphopt.frontier(model, inputs, budgets=6, time_limit=30)
    print("peak (MB)   added duration   proven at least")
    for peak, overhead, bound in points:
        bar = "#" * round(40 * overhead)
        print(f"{peak / 1e6:9.3f}   {100 * overhead:12.2f} %   {100 * bound:13.2f} %  {bar}")


if __name__ == "__main__":
    main()
