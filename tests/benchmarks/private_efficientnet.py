"""EfficientNet-Lite0 with its trained weights under CrypTen, dense and linearized."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import graphopt
from graphopt.private import PrivateReport, private_cost
from tests.benchmarks.photos import crops, photos

_SHARE = "25%"
_CALIBRATION, _HELD = 6, 5  # crops of each photo
_PART = 9


def compare(side: int, replacement: str) -> tuple[list[dict[str, Any]], list[str]]:
    """One row for the dense network and one for the linearized, and the bars that are missed.

    Args:
        side: Pixels of the images; 224 is what the network was trained on.
        replacement: Option of `linearize`.
    """
    from tests.zoo.pretrained import efficientnet_lite0

    model = efficientnet_lite0().eval()
    images = photos()
    shown, held = crops(images, _CALIBRATION, 0, side), crops(images, _HELD, 1, side)
    module, seconds = linearized(model, shown, replacement)
    expected, got = scores(model, held), scores(module, held)
    agreement = float((expected.argmax(1) == got.argmax(1)).double().mean())
    counted = module.report.to_dict()["linearize"]
    rows = [
        row("dense", counted["relus_before"], private(model, held[:1]), expected[:1]),
        row("linearized", counted["relus_after"], private(module, held[:1]), got[:1]),
    ]
    escaped = int((~got.isfinite().all(1)).sum())
    rows[0] |= {"agreement": 1.0, "escaped": 0, "optimize_seconds": 0.0}
    rows[1] |= {"agreement": agreement, "escaped": escaped, "optimize_seconds": seconds}
    for key in ("bytes", "rounds", "seconds"):
        saved = 1 - rows[1][key] / rows[0][key]
        print(f"  {key} saved: {saved:.1%}", file=sys.stderr, flush=True)
    return rows, missed_by(rows)


def linearized(model: nn.Module, shown: Tensor, replacement: str) -> tuple[Any, float]:
    """The network with a quarter of its ReLU6 kept, and the seconds that took."""
    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(0))
    batches = [shown[rows] for rows in order.split(_PART)]
    began = time.perf_counter()
    module = graphopt.optimize(
        model,
        passes=f"canonicalize,linearize{{relus={_SHARE},replacement={replacement}}}",
        example_inputs=(batches[0],),
        data=batches,
        time_limit=300.0,
    )
    return module.eval(), time.perf_counter() - began


@torch.no_grad()
def scores(module: nn.Module, images: Tensor) -> Tensor:
    """Logits ``(images, classes)``."""
    return torch.cat([module(part) for part in images.split(_PART)])


def private(module: nn.Module, image: Tensor) -> PrivateReport:
    """A run between two processes."""
    return private_cost(
        module, (image,), engine="crypten", network_name="wan", timeout=3600.0,
        progress=lambda *_: None,
    )  # fmt: skip


def row(name: str, relus: float, report: PrivateReport, plain: Tensor) -> dict[str, Any]:
    """What a run took and gave."""
    assert report.bytes is not None
    return {
        "network": name,
        "relus": round(relus),
        "predicted_bytes": round(report.predicted.bytes),
        "bytes": round(report.bytes),
        "predicted_rounds": report.predicted.rounds,
        "rounds": report.rounds,
        "seconds": report.seconds,
        "wan_seconds": report.network_seconds,
        "error": report.max_error,
        "same_class": bool(report.outputs[0].argmax() == plain.argmax()),
    }


def missed_by(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The bars that are missed."""
    dense, small = rows
    missed = []
    for each in rows:
        if each["rounds"] != each["predicted_rounds"]:
            missed.append(f"{each['network']}: rounds aren't those predicted")
        if abs(each["bytes"] / each["predicted_bytes"] - 1) > 0.01:
            missed.append(f"{each['network']}: bytes aren't those predicted")
        if not each["same_class"]:
            missed.append(f"{each['network']}: the encrypted run says another class")
    if small["bytes"] >= dense["bytes"] or small["seconds"] >= dense["seconds"]:
        missed.append("nothing is saved")
    if small["escaped"]:
        missed.append(f"activations escape on {small['escaped']} crops")
    return missed
