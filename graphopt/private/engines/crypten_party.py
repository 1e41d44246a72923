"""One party of a computation: ``python -m graphopt.private.engines.crypten_party FOLDER``."""

from __future__ import annotations

import math
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from graphopt.private.engines.jobs import read_job, write_result


def _import_crypten() -> Any:
    """CrypTen 0.4.1 reads ONNX through a module of torch that is gone; it isn't needed here."""
    stub = types.ModuleType("crypten.nn.onnx_converter")
    names = ("from_onnx", "from_pytorch", "from_tensorflow")
    stub.__dict__.update(dict.fromkeys(names), TF_AND_TF2ONNX=False)
    sys.modules["crypten.nn.onnx_converter"] = stub
    import crypten  # pyright: ignore[reportMissingImports]

    return crypten


class Party:
    """Holds this party's share of every value."""

    def __init__(self, crypten: Any, rank: int) -> None:
        """Start; both parties do at the same time."""
        self.crypten = crypten
        self.rank = rank
        self.values: dict[str, Any] = {}

    def share(self, name: str, shape: list[int], owner: int, known: np.ndarray | None) -> None:
        """Share a value that its owner alone knows; no message: masks come from common seeds."""
        blank = np.zeros(shape) if known is None else known
        self.values[name] = self.crypten.cryptensor(torch.from_numpy(blank), src=owner)

    def run(self, step: dict[str, Any]) -> None:
        """Run one step."""
        if math.prod(step["shape"]) == 0:
            empty = torch.zeros(step["shape"], dtype=torch.double)
            self.values[step["name"]] = self.crypten.cryptensor(empty, src=0)
            return
        given = [self.values[name] for name in step["inputs"]]
        self.values[step["name"]] = _OPS[step["op"]](self, step, *given)

    def held(self, value: Any) -> torch.Tensor:
        """This party's share; of a public value, party 0 holds all of it."""
        if not isinstance(value, torch.Tensor):
            return value.share
        encoded = _encoder(self.crypten).encode(value)
        return encoded if self.rank == 0 else torch.zeros_like(encoded)

    def of(self, share: torch.Tensor) -> Any:
        """A shared value with the standard encoding."""
        return self.crypten.mpc.MPCTensor.from_shares(share)


def _encoder(crypten: Any) -> Any:
    return crypten.encoder.FixedPointEncoder()


def _truncated(share: torch.Tensor, divisor: int) -> torch.Tensor:
    """Division of a two-party sharing by a public integer, each party for itself."""
    return share.div(divisor, rounding_mode="trunc")


def _scale(party: Party, step: Any, x: Any, factor: torch.Tensor) -> Any:
    """Times a public constant, encoded with as many bits as small constants need."""
    largest = float(factor.abs().max())
    bits = 16 + min(14, max(0, -math.floor(math.log2(largest)))) if largest else 16
    encoded = (factor * 2**bits).round().long()
    return party.of(_truncated(x.share * encoded, 2**bits))


def _linear(party: Party, name: str, a: Any, b: Any, **options: Any) -> Any:
    """A product of two operands of which one may be public; then nobody talks."""
    public = [isinstance(v, torch.Tensor) for v in (a, b)]
    if not any(public):
        return getattr(a, name)(b, **options)
    encoder = _encoder(party.crypten)
    left, right = (encoder.encode(v) if isinstance(v, torch.Tensor) else v.share for v in (a, b))
    return party.of(_truncated(getattr(torch, name)(left, right, **options), encoder.scale))


def _conv(party: Party, step: Any, x: Any, weight: Any) -> Any:
    rank = len(step["shape"]) - 2
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in step["attributes"].items()}
    return _linear(party, f"conv{rank}d", x, weight, **options)


def _move(party: Party, step: Any, *given: Any) -> Any:
    *values, index = given
    flat = [party.held(value).reshape(-1) for value in values]
    return party.of(torch.cat([torch.zeros(1, dtype=torch.long), *flat])[index])


def _sum(party: Party, step: Any, x: Any) -> Any:
    how = step["attributes"]
    total = x.share.sum(how["dims"], how["keepdim"]) if how["dims"] else x.share
    return party.of(_truncated(total, how["divisor"]) if how["divisor"] != 1 else total)


def _negative(party: Party, step: Any, x: Any) -> Any:
    return party.of(x._ltz().share * _encoder(party.crypten).scale)


def _reciprocal(party: Party, step: Any, x: Any) -> Any:
    with party.crypten.config.cfg.temp_override({"functions.reciprocal_all_pos": True}):
        return x.reciprocal()


_OPS: dict[str, Callable[..., Any]] = {
    "add": lambda p, s, a, b: a + b,
    "sub": lambda p, s, a, b: a - b,
    "shift": lambda p, s, a, b: a + b,
    "scale": _scale,
    "sum": _sum,
    "move": _move,
    "reshape": lambda p, s, a: a.reshape(s["shape"]),
    "multiply": lambda p, s, a, b: a * b,
    "square": lambda p, s, a: a.square(),
    "matmul": lambda p, s, a, b: _linear(p, "matmul", a, b),
    "conv": _conv,
    "relu": lambda p, s, a: a.relu(),
    "negative": _negative,
    "exp": lambda p, s, a: a.exp(),
    "reciprocal": _reciprocal,
    "rsqrt": lambda p, s, a: a.inv_sqrt(),
    "sigmoid": lambda p, s, a: a.sigmoid(),
    "tanh": lambda p, s, a: a.tanh(),
}


def main(folder: Path) -> None:
    """Take part in the computation that the folder describes."""
    document, known = read_job(folder)
    rank = int(document["settings"]["rank"])
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    crypten = _import_crypten()
    crypten.init()
    with crypten.no_grad():
        outputs, figures = _evaluate(crypten, rank, document, known)
    crypten.uninit()
    write_result(folder, outputs, figures)


def _evaluate(crypten: Any, rank: int, document: Any, known: Any) -> Any:
    party = Party(crypten, rank)
    for name, secret in document["constants"].items():
        if secret:
            party.share(name, document["shapes"][name], 0, known.get(name))
        else:
            party.values[name] = torch.from_numpy(known[name])
    for name in document["inputs"]:
        party.share(name, document["shapes"][name], 1, known.get(name))
    crypten.config.cfg.communicator.verbose = True
    figures: dict[str, tuple[float, int, float]] = {}
    steps = document["steps"]
    for done, step in enumerate(steps):
        figures[step["name"]] = _measured(crypten, lambda step=step: party.run(step))[1]
        if rank == 0 and done % 10 == 0:
            print(f"@{done}/{len(steps)}", flush=True)
    shown, figures["reveal"] = _measured(
        crypten, lambda: [_opened(party.values[name]) for name in document["outputs"]]
    )
    return [value.double().numpy() for value in shown], figures


def _opened(value: Any) -> torch.Tensor:
    """An output; one that depends on nothing secret is known already."""
    return value if isinstance(value, torch.Tensor) else value.get_plain_text()


def _measured(crypten: Any, function: Callable[[], Any]) -> tuple[Any, tuple[float, int, float]]:
    link = crypten.communicator.get()
    link.reset_communication_stats()
    start = time.perf_counter()
    result = function()
    seconds = time.perf_counter() - start
    counted = link.get_communication_stats()
    return result, (float(counted["bytes"]), int(counted["rounds"]), seconds)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
