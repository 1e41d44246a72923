"""What emitted networks cost in real engines, beside what was predicted.

    python -m tests.benchmarks.private_networks [--sections crypten spu efficientnet]
        [--protocols semi2k aby3 cheetah] [--side 224] [--replacement auto] [--json FILE]

`crypten`: networks that `linearize` has emitted run between two processes; rounds have to be those
predicted, bytes within 1 %.
`spu`: the same under SPU's protocols, bytes within 5 %; its environment is made when it is missing.
`efficientnet`: EfficientNet-Lite0 with its trained weights, dense and with a quarter of its ReLU6
kept, on a photo, between two processes of CrypTen; how often the linearized one says on crops of
photos what the dense one says, other crops having calibrated it.

The status is 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from graphopt.errors import UnsupportedError
from graphopt.private import private_cost
from graphopt.private.engines import crypten, spu
from tests.benchmarks import private_efficientnet
from tests.benchmarks.private_models import EMITTED, Inputs
from tests.benchmarks.pruning import table

SECTIONS = ("crypten", "spu", "efficientnet")
# Shares by which measured bytes may be off, and of the largest output an error.
_BYTES = {"crypten": 0.01, "spu": 0.05}
_ERROR = 0.05

Rows = list[dict[str, Any]]


def compare(engine: str, protocol: str, networks: dict[str, tuple[nn.Module, Inputs]]) -> Rows:
    """Predicted and measured costs of each network."""
    rows = []
    for name, (module, inputs) in networks.items():
        row: dict[str, Any] = {"network": name, "protocol": protocol}
        try:
            report = private_cost(
                module, (), inputs, engine=engine, protocol_name=protocol, timeout=1800.0
            )
        except UnsupportedError as error:
            rows.append({**row, "note": error.message.splitlines()[0]})
            continue
        assert report.bytes is not None
        rows.append(
            {
                **row,
                "predicted_rounds": report.predicted.rounds,
                "rounds": report.rounds,
                "predicted_bytes": round(report.predicted.bytes),
                "bytes": round(report.bytes),
                "off_%": 100 * (report.predicted.bytes / report.bytes - 1),
                "error": f"{report.max_error:.1e}",
                "relative_error": f"{report.relative_error:.1e}",
                "seconds": report.seconds,
                "note": "",
            }
        )
        print(f"  {rows[-1]}", file=sys.stderr, flush=True)
    return rows


def missed_by(engine: str, rows: Rows) -> list[str]:
    """The bars that networks miss."""
    missed = []
    for row in rows:
        where = f"{row['network']} under {row['protocol']}"
        if row["note"]:
            continue
        if abs(row["off_%"]) > 100 * _BYTES[engine]:
            missed.append(f"{where}: bytes are {row['off_%']:+.2f} % off")
        if engine == "crypten" and row["rounds"] != row["predicted_rounds"]:
            missed.append(f"{where}: {row['rounds']} rounds, not {row['predicted_rounds']}")
        if not float(row["relative_error"]) <= _ERROR:
            missed.append(f"{where}: an error of {row['relative_error']} of the largest output")
    return missed


def run(section: str, options: argparse.Namespace) -> tuple[Rows, list[str]]:
    """The rows of a section, and the bars that they miss."""
    if section == "efficientnet":
        return private_efficientnet.compare(options.side, options.replacement)
    protocols = options.protocols if section == "spu" else ["crypten"]
    if section == "spu" and not spu.is_set_up():
        spu.set_up(lambda text, *_: print(text, file=sys.stderr))
    networks = {each.name: each.made() for each in EMITTED}
    rows = [row for name in protocols for row in compare(section, name, networks)]
    return rows, missed_by(section, rows)


def main() -> int:
    """Measure the sections asked for and print their tables; 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--protocols", nargs="+", choices=spu.PROTOCOLS, default=spu.PROTOCOLS)
    parser.add_argument("--side", type=int, default=224, help="pixels of EfficientNet's images")
    parser.add_argument("--replacement", default="auto", help="for EfficientNet")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if {"crypten", "efficientnet"} & set(options.sections) and crypten.missing():
        parser.error(str(crypten.missing()))
    everything: dict[str, Rows] = {}
    missed: list[str] = []
    console = Console(width=150)
    for section in options.sections:
        everything[section], below = run(section, options)
        missed += below
        console.print(table(section, everything[section]))
    if options.json is not None:
        options.json.write_text(json.dumps(everything, indent=2))
    for text in missed:
        print(f"MISSED: {text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
