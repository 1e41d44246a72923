"""Asks other tools for relevance propagation, which run in an environment of their own.

`python -m tests.peers.environment` makes that environment.  Without it `missing()` says so, and
`needs_peers` skips a test.  Processes start at the first request and end with this one.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import inspect
import json
import os
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.peers import environment

_WORKER = Path(__file__).with_name("worker.py")
_TIMEOUT = 300.0  # seconds for one answer
# Options of layers that say where their parameters are made, not what they do
_PLACES = {"self", "device", "dtype"}

# Parameters whose names differ between transformers 5 and 4.52
_RENAMED = {
    "vit": {
        "vit.layers": "vit.encoder.layer",
        "attention.q_proj": "attention.attention.query",
        "attention.k_proj": "attention.attention.key",
        "attention.v_proj": "attention.attention.value",
        "attention.o_proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
}


class PeerError(Exception):
    """The other tool failed; its traceback is the message."""


def missing() -> str | None:
    """Why the other tools can't be asked, or None."""
    where = environment.folder()
    if environment.is_complete(where):
        return None
    return f"no peers in {where}: python -m tests.peers.environment (GRAPHOPT_PEERS names it)"


needs_peers = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Peer:
    """A process of the other environment that answers requests."""

    def __init__(self) -> None:
        """Start it; its first request imports the tool, which takes seconds."""
        self.folder = tempfile.TemporaryDirectory(prefix="graphopt-peers-")
        self.log = (Path(self.folder.name) / "log").open("w+")
        settings = {n: v for n, v in os.environ.items() if not n.startswith("PYTHON")}
        self.process = subprocess.Popen(
            [environment.python(environment.folder()), "-I", _WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            start_new_session=True,
            env=settings | {"OMP_NUM_THREADS": settings.get("OMP_NUM_THREADS", "1")},
        )
        atexit.register(self.close)

    def ask(
        self, kind: str, tensors: Mapping[str, Tensor], **options: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Send a request and wait for its figures and tensors.

        Raises:
            PeerError: The tool failed, ended, or took too long.
        """
        asked, answered = (str(Path(self.folder.name) / n) for n in ("asked", "answered"))
        save_file({n: t.detach().contiguous().clone() for n, t in tensors.items()}, asked)
        request = {"kind": kind, "tensors": asked, "answer": answered, **options}
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        ready, _, _ = select.select([stdout], [], [], _TIMEOUT)
        line = stdout.readline() if ready else ""
        if not line:
            said = self._said()
            self.close()
            raise PeerError(f"no answer; the end of its log:\n{said}")
        answer = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer["figures"], load_file(answered)

    def close(self) -> None:
        """End the process and its fork; the next request starts another."""
        atexit.unregister(self.close)
        peer.cache_clear()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.log.close()
        self.folder.cleanup()

    def _said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-2000:]


@functools.cache
def peer() -> Peer:
    """The process that is asked."""
    return Peer()


class Residual(nn.Module):
    """Layers in a row and what went into them, added."""

    def __init__(self, inner: nn.Sequential) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """``x + inner(x)``."""
        return x + self.inner(x)


def layers(net: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """A layer, or layers in a row, by class names and options; a `Residual` holds such a row."""
    return [
        (type(layer).__name__, _options(layer))
        for layer in (net if isinstance(net, nn.Sequential) else [net])
    ]


def _options(layer: nn.Module) -> dict[str, Any]:
    if isinstance(layer, Residual):
        return {"inner": layers(layer.inner)}
    names = inspect.signature(type(layer).__init__).parameters
    found = {n: getattr(layer, n) for n in names if n not in _PLACES and hasattr(layer, n)}
    if "bias" in found:
        found["bias"] = found["bias"] is not None
    return found


def _ask_net(
    kind: str, net: nn.Module, tensors: Mapping[str, Tensor], **options: Any
) -> dict[str, Tensor]:
    row = net if isinstance(net, nn.Sequential) else nn.Sequential(net)
    weights = {f"weights.{n}": t for n, t in row.state_dict().items()}
    return peer().ask(kind, {**weights, **tensors}, layers=layers(row), **options)[1]


def zennit(
    net: nn.Module,
    x: Tensor,
    relevance: Tensor,
    *,
    rule: str | None = None,
    composite: str | None = None,
    **parameters: Any,
) -> Tensor:
    """Zennit's relevance at the input of a layer or of layers in a row.

    Args:
        net: A module of torch.nn, or `nn.Sequential` of such.
        x: Its input.
        relevance: The relevance at its output, of its shape.
        rule: A class of zennit.rules, for every layer that has no layers inside.
        composite: A class of zennit.composites instead.
        parameters: Of that class: numbers or tensors.  zennit's own defaults otherwise (stabilizers
            1e-6, added with the sign of the denominator).
    """
    extra = {f"parameters.{n}": v for n, v in parameters.items() if isinstance(v, Tensor)}
    plain = {n: v for n, v in parameters.items() if not isinstance(v, Tensor)}
    named = {"rule": rule} if composite is None else {"composite": composite}
    tensors = {"x": x, "relevance": relevance, **extra}
    return _ask_net("zennit", net, tensors, parameters=plain, **named)["relevance"]


def captum(
    net: nn.Module,
    x: Tensor,
    target: Tensor,
    rules: Mapping[str, tuple[str, dict[str, Any]]] | None = None,
) -> Tensor:
    """Captum's relevance (`captum.attr.LRP`) at the input of layers in a row.

    Args:
        net: As for `zennit`.  Without `rules` all layers have captum's epsilon rule.
        x: Its input.
        target: The index of the output explained, one a sample.
        rules: Class of captum.attr._utils.lrp_rules and its parameters, by the layer's name.
    """
    return _ask_net("captum", net, {"x": x, "target": target}, rules=rules or {})["relevance"]


@dataclass(frozen=True)
class Lxt:
    """A model of transformers for LXT, as JSON and tensors.

    Attributes:
        family: `llama`, `qwen2`, `qwen3`, `gemma3`, `bert`, `gpt2`, or `vit` (a map of our own).
        kind: The class, such as `LlamaForCausalLM`.
        config: Its configuration in the words of transformers 4.52.
        weights: Its state dict; their dtype is the model's.
        rules: `attnlrp`, or `cp` (CP-LRP; LXT has none for `bert`).
        attention: `sdpa` or `eager`.
        output: Which output is explained.
    """

    family: str
    kind: str
    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    rules: str = "attnlrp"
    attention: str = "sdpa"
    output: str = "logits"

    @classmethod
    def of(cls, model: nn.Module, rules: str = "attnlrp", attention: str = "sdpa") -> Lxt:
        """From a model of any version of transformers: its class, configuration and weights."""
        config = config_for_4(model.config.to_dict())  # pyright: ignore[reportCallIssue]
        family = config["model_type"].removesuffix("_text")
        kind = type(model).__name__
        weights = {_name_for_4(family, n): t for n, t in model.state_dict().items()}
        return cls(family, kind, config, weights, rules, attention)

    def explain(self, inputs: Mapping[str, Tensor], target: Tensor) -> dict[str, Tensor]:
        """LXT's relevance.

        Args:
            inputs: Of the model: `input_ids`, `inputs_embeds` or `pixel_values`, masks and so on.
            target: Integers of shape (batch, dims of the output - 1): the output explained in each
                sample; its value is the relevance that is propagated.  Or floats of the output's
                shape: the sum of the outputs weighted by them is.

        Returns:
            `relevance` at the embedded or pixel inputs (gradient times input), the `output` and the
            input itself, `inputs_embeds` or `pixel_values`.
        """
        return self._ask("lxt", inputs, target)[1]

    def cost(
        self, inputs: Mapping[str, Tensor], target: Tensor, *, repeats: int = 9, warmup: int = 2
    ) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Seconds and bytes of an explanation, beside those of forward and input gradient.

        Returns:
            `seconds` and `reference_seconds` (medians), `ratio` (median over the pairs), `peak` and
            `reference_peak` (allocator bytes above the start, as in graphopt.cost.allocator); and
            the tensors: `relevance`, and the plain `gradient`.
        """
        return self._ask("lxt_cost", inputs, target, repeats=repeats, warmup=warmup)

    def _ask(
        self, request: str, inputs: Mapping[str, Tensor], target: Tensor, **options: Any
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        weights = {f"weights.{n}": t for n, t in self.weights.items()}
        return peer().ask(
            request,
            {**weights, **inputs, "target": target},
            family=self.family,
            rules=self.rules,
            config=dict(self.config),
            attention=self.attention,
            output=self.output,
            **{"class": self.kind},
            **options,
        )


def config_for_4(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration of transformers 5 in the words of 4.52.

    Raises:
        ValueError: It says something that 4.52 can't.
    """
    found = {n: v for n, v in config.items() if n not in ("dtype", "transformers_version")}
    rope = found.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        found["rope_theta"] = rope["full_attention"]["rope_theta"]
        found["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        found["rope_theta"] = rope["rope_theta"]
    kinds = [rope] if rope and "rope_theta" in rope else list((rope or {}).values())
    if any(kind.get("rope_type", "default") != "default" for kind in kinds):
        raise ValueError(f"rotary embedding of another kind: {rope}")
    return found | _pattern(found.pop("layer_types", None))


def _name_for_4(family: str, name: str) -> str:
    for new, old in _RENAMED.get(family, {}).items():
        name = name.replace(new, old)
    return name


def _pattern(kinds: list[str] | None) -> dict[str, int]:
    """`layer_types` as 4.52 has them: every so many-th layer attends to all."""
    if kinds is None or "sliding_attention" not in kinds:
        return {}
    period = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    wanted = ["sliding" if (i + 1) % period else "full" for i in range(len(kinds))]
    if [kind.removesuffix("_attention") for kind in kinds] != wanted:
        raise ValueError(f"layers that don't alternate: {kinds}")
    return {"sliding_window_pattern": period}
