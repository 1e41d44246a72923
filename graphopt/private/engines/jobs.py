"""A circuit and its values in a folder, without pickle, for the processes that run it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.private.circuit import Circuit
from graphopt.private.engines.run import Measured, Run


def write_job(
    folder: Path, circuit: Circuit, values: Mapping[str, torch.Tensor], **settings: Any
) -> None:
    """Write a job.

    Args:
        folder: Where to; it exists.
        circuit: What shall run.
        values: What this process knows: inputs and constants by name.
        settings: JSON-able settings of the engine.
    """
    secret = {name: c.secret for name, c in circuit.constants.items()}
    document = {
        "settings": settings,
        "inputs": list(circuit.inputs),
        "constants": secret,
        "shapes": {name: circuit.shape(name) for name in (*circuit.inputs, *secret)},
        "steps": [
            {
                "name": s.name, "op": s.op, "inputs": s.inputs, "shape": s.shape,
                "attributes": dict(s.attributes),
            }
            for s in circuit.steps
        ],
        "outputs": circuit.outputs,
    }  # fmt: skip
    (folder / "circuit.json").write_text(json.dumps(document), encoding="utf-8")
    names = list(values)
    arrays = {f"a{i}": values[name].detach().numpy() for i, name in enumerate(names)}
    np.savez(folder / "values.npz", **arrays)  # type: ignore[arg-type]
    (folder / "names.json").write_text(json.dumps(names), encoding="utf-8")


def read_job(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The document and the values of a job."""
    document = json.loads((folder / "circuit.json").read_text(encoding="utf-8"))
    names = json.loads((folder / "names.json").read_text(encoding="utf-8"))
    with np.load(folder / "values.npz", allow_pickle=False) as arrays:
        return document, {name: arrays[f"a{i}"] for i, name in enumerate(names)}


def write_result(
    folder: Path, outputs: list[np.ndarray], steps: Mapping[str, tuple[float, int, float]]
) -> None:
    """Write what a run gave: outputs, and (bytes, rounds, seconds) by step."""
    np.savez(folder / "outputs.npz", **{f"a{i}": o for i, o in enumerate(outputs)})  # type: ignore[arg-type]
    (folder / "steps.json").write_text(json.dumps(dict(steps)), encoding="utf-8")


def read_result(folder: Path) -> Run:
    """What `write_result` wrote."""
    steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    with np.load(folder / "outputs.npz", allow_pickle=False) as arrays:
        outputs = [torch.from_numpy(arrays[f"a{i}"]).double() for i in range(len(arrays.files))]
    return Run(tuple(outputs), {name: Measured(*figures) for name, figures in steps.items()})
