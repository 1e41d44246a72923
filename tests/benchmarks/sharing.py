"""Bytes saved for the backward pass: eager against `share`, on full training and LoRA.

    python -m tests.benchmarks.sharing [--models vit bert ...] [--repeats 9]

The models are those of transformers, of two layers, built from their configs with random weights:
ViT (width 384, batch 4, 197 tokens), BERT (width 384, batch 8, 128 tokens, dropout .1) and Llama
(width 256, batch 4, 128 tokens). `+qv` and `+all` freeze the model and add LoRA of rank 8 to the
projections of query and value, or to every linear layer of the blocks.

Bytes are the allocator's, live after forward and loss above the start of a warmed-up step. With
`--repeats`, the time of a step is the median of paired runs, as a ratio to eager's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import graphopt
from graphopt.measure import measure_step

Inputs = dict[str, Any]

# What `share` has to save, as a share of eager's bytes (exact rewrites alone).
BARS = {"vit": 0.33, "vit+all": 0.33, "bert": 0.31, "llama": 0.378, "llama+qv": 0.18}


def vit() -> tuple[nn.Module, Inputs]:
    """ViT for classification."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=10,
    )  # fmt: skip
    images = torch.randn(4, 3, 224, 224)
    return ViTForImageClassification(config), {"pixel_values": images, "labels": torch.arange(4)}


def bert() -> tuple[nn.Module, Inputs]:
    """BERT for classification, with its dropout of .1."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536,
        vocab_size=1000,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (8, 128))
    return BertForSequenceClassification(config), {
        "input_ids": ids,
        "labels": torch.zeros(8).long(),
    }


def llama() -> tuple[nn.Module, Inputs]:
    """Llama for language modelling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=688,
        vocab_size=1000,
    )  # fmt: skip
    ids = torch.randint(0, 1000, (4, 128))
    return LlamaForCausalLM(config), {"input_ids": ids, "labels": ids}


class LoRA(nn.Module):
    """A frozen linear layer and a trainable product of rank 8 beside it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down = nn.Linear(linear.in_features, 8, bias=False)
        self.up = nn.Linear(8, linear.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.up(self.down(x))


def with_lora(model: nn.Module, wanted: Callable[[str], bool]) -> nn.Module:
    """Freezes a model but for its classifier, and adapts the wanted linear layers of its blocks."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("classifier"))
    for path, part in list(model.named_modules()):
        for name, child in list(part.named_children()):
            if "layer" in path and isinstance(child, nn.Linear) and wanted(name):
                setattr(part, name, LoRA(child))
    return model


FAMILIES: Mapping[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "vit": vit, "bert": bert, "llama": llama,
}  # fmt: skip
VARIANTS: Mapping[str, Callable[[str], bool]] = {
    "qv": lambda name: name in ("query", "value", "q_proj", "v_proj"),
    "all": lambda _: True,
}
MODELS = [f"{family}{variant}" for family in FAMILIES for variant in ("", "+qv", "+all")]


def build(name: str) -> tuple[nn.Module, Inputs]:
    """A model by its name, in training mode, and its inputs."""
    family, _, variant = name.partition("+")
    torch.manual_seed(0)
    model, inputs = FAMILIES[family]()
    if variant:
        model = with_lora(model, VARIANTS[variant])
    return model.train(), inputs


def step_time(module: nn.Module, inputs: Inputs) -> float:
    """Seconds of one training step."""
    began = time.perf_counter()
    module(**inputs).loss.backward()
    return time.perf_counter() - began


def compare(name: str, repeats: int) -> dict[str, Any]:
    """Bytes, FLOPs, gradient error and time of one model."""
    model, inputs = build(name)
    shared = graphopt.optimize(model, passes="canonicalize,share", example_kwargs=inputs)
    before, after = measure_step(model, (), inputs), measure_step(shared, (), inputs)
    ratios = []
    for _ in range(repeats):
        eager = step_time(model, inputs)
        ratios.append(step_time(shared, inputs) / eager)
    return {
        "model": name,
        "before": before.saved,
        "after": after.saved,
        "less": 1 - after.saved / before.saved,
        "bar": BARS.get(name),
        "peak": after.peak / before.peak,
        "error": gradient_error(shared, model, inputs),
        "time": statistics.median(ratios) if ratios else None,
    }


def gradient_error(module: nn.Module, source: nn.Module, inputs: Inputs) -> float:
    """Distance of all gradients together, relative to the source's, with the same seed."""
    both = []
    for each in (module, source):
        each.zero_grad()
        torch.manual_seed(0)
        each(**inputs).loss.backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        both.append(torch.cat([grads[name].flatten() for name in sorted(grads)]))
    return float((both[0] - both[1]).norm() / both[1].norm())


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows as a table."""
    found = Table(title="saved for backward")
    for column in ("model", "eager", "share", "less", "bar", "peak", "gradient error", "time"):
        found.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        found.add_row(
            row["model"],
            f"{row['before']:,}",
            f"{row['after']:,}",
            f"{100 * row['less']:.1f} %",
            "" if row["bar"] is None else f"{100 * row['bar']:.1f} %",
            f"{row['peak']:.3f}",
            f"{row['error']:.1e}",
            "" if row["time"] is None else f"{row['time']:.3f}",
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--repeats", type=int, default=0, help="timed pairs of steps")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.models:
        print(f"{name} ...", file=sys.stderr)
        rows.append(compare(name, options.repeats))
    Console(width=110).print(table(rows))
    return int(any(row["bar"] is not None and row["less"] < row["bar"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
