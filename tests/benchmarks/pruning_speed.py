"""How much faster a pruned network runs, and how long its analysis takes."""

from __future__ import annotations

import itertools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.prune.analysis import analyse
from graphopt.pipeline import PassContext
from tests.zoo.vision import ResidualBlock

Row = dict[str, Any]
Inputs = dict[str, Any]

SPEED_BAR = 1.5
ANALYSIS_BAR = 5.0  # seconds


class WideResNet(nn.Module):
    """ResNet-18 (11 million parameters) with a stem for small images."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 64, 64, 128, 128, 256, 256, 512, 512)
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
        )
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(ResidualBlock(a, b, 1 + (a != b)) for a, b in pairs))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of a thousand classes."""
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


def resnet18() -> tuple[nn.Module, Inputs]:
    """ResNet-18 on 64x64 images."""
    return WideResNet().eval(), {"x": torch.randn(8, 3, 64, 64)}


def bert() -> tuple[nn.Module, Inputs]:
    """BERT of 4 layers and width 256 on 128 tokens."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=1000,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=1024,
        max_position_embeddings=128,
    )
    model = BertModel(config, add_pooling_layer=False).eval()
    return model, {"input_ids": torch.randint(0, 1000, (8, 128))}


def gpt2() -> tuple[nn.Module, Inputs]:
    """GPT-2 of 4 layers and width 256."""
    from tests.zoo.pretrained import gpt2_model

    ids = torch.randint(1, 1000, (4, 128))
    return gpt2_model(4, 256, 8).eval(), {"input_ids": ids}


def efficientnet() -> tuple[nn.Module, Inputs]:
    """EfficientNet-Lite0."""
    from tests.zoo.pretrained import efficientnet_lite0

    return efficientnet_lite0().eval(), {"inputs": torch.randn(2, 3, 224, 224)}


TIMED: Mapping[str, Callable[[], tuple[nn.Module, Inputs]]] = {"resnet18": resnet18, "bert": bert}
ANALYSED = {"efficientnet": efficientnet, "gpt2": gpt2, **TIMED}


def compare_speed(repeats: int, share: float = 0.5) -> list[Row]:
    """Time of the dense and the pruned module, in turn."""
    rows = []
    for name, make in TIMED.items():
        torch.manual_seed(0)
        model, inputs = make()
        for step in ("none", "1", "8"):  # none: as by default
            text = f"canonicalize,prune{{flops={share:%},criterion=l2,round_to={step}}}"
            began = time.perf_counter()
            small = graphopt.optimize(model, passes=text, example_kwargs=inputs)
            seconds = time.perf_counter() - began
            report = small.report.to_dict()["prune"]
            for threads in (1, 2):
                torch.set_num_threads(threads)
                dense, pruned = _paired(model, small, inputs, repeats)
                ratios = [a / b for a, b in zip(dense, pruned, strict=True)]
                row = {
                    "model": name,
                    "round_to": step,
                    "threads": threads,
                    "flops": report["flops_after"] / report["flops_before"],
                    "dense": statistics.median(dense),
                    "pruned": statistics.median(pruned),
                    "faster": statistics.median(ratios),
                    "faster_quartiles": statistics.quantiles(ratios, n=4)[::2],
                    "faster_best": min(dense) / min(pruned),  # where other jobs run beside
                    "pass_seconds": seconds,
                }
                rows.append(row)
                print(f"  {row}", file=sys.stderr, flush=True)
    return rows


def missed_by_speed(rows: Sequence[Row]) -> list[str]:
    """The rows below the bar."""
    return [
        f"{row['model']}, round_to={row['round_to']}, {row['threads']} threads: "
        f"{row['faster']:.2f} times faster, not {SPEED_BAR}"
        for row in rows
        if row["faster"] < SPEED_BAR
    ]


@torch.no_grad()
def _paired(
    one: nn.Module, other: nn.Module, inputs: Inputs, repeats: int
) -> tuple[list[float], list[float]]:
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(repeats + 2):
        for module, found in zip((one, other), times, strict=True):
            began = time.perf_counter()
            module(**inputs)
            if index > 1:  # after two to warm up
                found.append(time.perf_counter() - began)
    return times


def time_analysis() -> list[Row]:
    """Seconds of `analyse` on canonicalised programs."""
    rows = []
    for name, make in ANALYSED.items():
        model, inputs = make()
        program = graphopt.capture(model, kwargs=inputs)
        program = Canonicalize().run(program, PassContext()).program
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            analyse(program)
            seconds.append(time.perf_counter() - began)
        rows.append({
            "model": name,
            "params": sum(p.numel() for p in model.parameters()),
            "nodes": len(program.module.graph.nodes),
            "seconds": statistics.median(seconds),
        })  # fmt: skip
    return rows


def missed_by_analysis(rows: Sequence[Row]) -> list[str]:
    """The rows above the bar."""
    return [
        f"analysis of {row['model']} takes {row['seconds']:.1f} s, not {ANALYSIS_BAR}"
        for row in rows
        if row["seconds"] > ANALYSIS_BAR
    ]
