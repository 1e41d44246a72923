"""Training memory against recomputation: graphopt and its peers, measured in one run.

    python -m tests.benchmarks.rematerialization                       # CNN and 4-layer GPT-2
    python -m tests.benchmarks.rematerialization --models resnet unet --json out.json --plot out.png

Methods: eager; ``torch.utils.checkpoint`` around each block; the min-cut partitioner of
``torch.compile`` (backend ``aot_eager_decomp_partition``) over a sweep of
``activation_memory_budget``; ``graphopt.optimize`` over a sweep of ``memory``, and the same with
``rematerialize`` alone, without the rewrites of ``share`` (method ``alone``), and with a gradient
error granted (method ``granted``, ``--granted``). Bytes are the
allocator's, above the start of a warmed-up step with gradients allocated. FLOPs are those of
``torch.utils.flop_counter``. Times are medians of paired ratios to eager; the min-cut backend
decomposes normalisations and softmax into small ops, so its times say nothing about Inductor.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.cost.flops import FlopCounter
from graphopt.measure import default_loss, measure_step, step_flops, step_seconds
from tests.benchmarks import charts
from tests.benchmarks.models import TRANSFORMERS
from tests.zoo import ZOO

SCHEMA_VERSION = 1
MIN_CUT_BUDGETS = (1.0, 0.75, 0.5, 0.25, 0.1, 0.0)
OUR_BUDGETS = (80, 60, 50, 42, 40, 35, 30, 25)
MODELS = {**ZOO, **TRANSFORMERS}
OURS = ("alone", "graphopt", "granted")
BLOCKS = {
    "bert": "bert.encoder.layer",
    "bert384": "bert.encoder.layer",
    "cnn": "blocks",
    "efficientnet_lite0": "blocks",
    "gpt2": "transformer.h",
    "gpt2_12": "transformer.h",
    "gpt2_4": "transformer.h",
    "llama": "model.layers",
    "llama256": "model.layers",
    "minilm": "encoder.layer",
    "resnet": "layers",
    "transformer_encoder": "encoder.layers",
    "vit384": "vit.encoder.layer",
}


@dataclass
class Point:
    """One method at one setting on one model; bytes, FLOPs and seconds.

    Attributes:
        model: name in the zoo or in `TRANSFORMERS`.
        method: ``eager``, ``checkpoint``, ``min-cut`` or ``graphopt``.
        setting: the budget, as text.
        peak: allocator's peak of a step.
        saved: live bytes after forward and loss.
        flops: FLOPs of a step.
        recomputed: FLOPs of a step beyond eager's.
        time_ratio: step time over eager's, median of pairs; None if not timed.
        plan_seconds: time to prepare the module (compilation or planning).
        gradient_error: ||g - g_eager|| / ||g_eager|| over all parameters.
        budget: the peak asked for in bytes, if the method takes one.
        predicted: the peak predicted before measuring, if the method does.
        overhead: the plan's own figure: time beyond the unplanned step's, by its cost model.
        lower_bound: proven bound on ``overhead``.
        note: why there are no figures, if there are none.
    """

    model: str
    method: str
    setting: str
    peak: int = 0
    saved: int = 0
    flops: int = 0
    recomputed: int = 0
    time_ratio: float | None = None
    plan_seconds: float = 0.0
    gradient_error: float = 0.0
    budget: int | None = None
    predicted: int | None = None
    overhead: float | None = None
    lower_bound: float | None = None
    note: str = ""


@dataclass
class Bench:
    """A model with its eager figures, against which the methods are measured."""

    name: str
    repeats: int

    def __post_init__(self) -> None:
        self.entry = MODELS[self.name]
        self.eager, self.args, self.kwargs = self.entry()
        self.reference = _gradients(self.eager, self.args, self.kwargs)
        self.point = self.measure("eager", "", self.eager)

    def fresh(self) -> nn.Module:
        """Another copy of the model."""
        return self.entry.model()

    def measure(
        self,
        method: str,
        setting: str,
        module: nn.Module,
        plan_seconds: float = 0.0,
        flops: int | None = None,
    ) -> Point:
        """All figures of one module; its FLOPs are counted unless they are given."""
        gradients = _gradients(module, self.args, self.kwargs)
        step = measure_step(module, self.args, self.kwargs)
        if flops is None:
            flops = step_flops(module, self.args, self.kwargs)
        point = Point(self.name, method, setting, step.peak, step.saved, flops)
        point.plan_seconds = plan_seconds
        if method != "eager":
            point.recomputed = flops - self.point.flops
            point.gradient_error = _relative_error(gradients, self.reference)
            if self.repeats:
                timed = step_seconds(
                    module, self.args, self.kwargs, reference=self.eager, repeats=self.repeats
                )
                point.time_ratio = timed.ratio
        return point


def _gradients(module: nn.Module, args: Any, kwargs: Any) -> dict[str, Tensor]:
    """Gradients by name of one seeded step; buffers are put back."""
    buffers = {name: b.clone() for name, b in module.named_buffers()}
    module.zero_grad(set_to_none=True)
    torch.manual_seed(0)
    default_loss(module(*args, **kwargs)).backward()
    found = {
        name.removeprefix("_orig_mod."): p.grad.clone()
        for name, p in module.named_parameters()
        if p.grad is not None
    }
    module.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, b in module.named_buffers():
            b.copy_(buffers[name])
    return found


def _relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    if got.keys() != want.keys():
        return float("inf")
    difference = sum(float((got[k] - want[k]).double().square().sum()) for k in want)
    norm = sum(float(want[k].double().square().sum()) for k in want)
    return (difference / norm) ** 0.5 if norm else 0.0


def checkpointed(model: nn.Module, path: str) -> nn.Module:
    """Wrap each child of the module at ``path`` in a non-reentrant checkpoint, in place."""

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)

    for block in model.get_submodule(path).children():
        block.forward = wrap(block.forward)
    return model


def run_checkpoint(bench: Bench) -> Iterator[Point]:
    """``torch.utils.checkpoint`` around each block, if the model has blocks."""
    path = BLOCKS.get(bench.name)
    if path is not None:
        yield bench.measure("checkpoint", "per block", checkpointed(bench.fresh(), path))


def run_min_cut(bench: Bench, budgets: Sequence[float]) -> Iterator[Point]:
    """The min-cut partitioner over a sweep of ``activation_memory_budget``."""
    import torch._functorch.config as functorch_config

    for budget in budgets:
        with functorch_config.patch(activation_memory_budget=budget):
            try:
                flops = _min_cut_flops(bench)
                torch._dynamo.reset()
                start = time.perf_counter()
                module = torch.compile(bench.fresh(), backend="aot_eager_decomp_partition")
                _gradients(module, bench.args, bench.kwargs)  # compiles
                seconds = time.perf_counter() - start
                yield bench.measure("min-cut", f"{budget:g}", module, seconds, flops)
            except Exception as error:  # a peer's failure is a result
                yield _failed(bench.name, "min-cut", f"{budget:g}", error)
    torch._dynamo.reset()


def _min_cut_flops(bench: Bench) -> int:
    """FLOPs of a compiled step.

    Under a dispatch mode Dynamo steps aside and the model would run uncompiled (and stay so), so
    the same backend is compiled once more with a counter inside its graphs.
    """
    from torch._dynamo.backends.debugging import aot_eager_decomp_partition_with_mode

    torch._dynamo.reset()
    counter = FlopCounter()
    backend = functools.partial(aot_eager_decomp_partition_with_mode, mode=counter)
    module = torch.compile(bench.fresh(), backend=backend)
    _gradients(module, bench.args, bench.kwargs)  # compiles
    before = counter.total
    _gradients(module, bench.args, bench.kwargs)
    return counter.total - before


def run_graphopt(
    bench: Bench,
    budgets: Sequence[str],
    time_limit: float,
    method: str = "graphopt",
    granted: str = "1%",
) -> Iterator[Point]:
    """``graphopt.optimize`` over a sweep of memory budgets."""
    import graphopt

    passes = "canonicalize,rematerialize" if method == "alone" else None
    further = f",gradient_error={granted}" if method == "granted" else ""

    for budget in budgets:
        start = time.perf_counter()
        try:
            module = graphopt.optimize(
                bench.fresh(),
                f"memory={budget}{further}",
                bench.args,
                example_kwargs=bench.kwargs,
                time_limit=time_limit,
                passes=passes,
            )
        except graphopt.errors.GraphoptError as error:
            yield _failed(bench.name, method, budget, error)
            continue
        seconds = time.perf_counter() - start
        point = bench.measure(method, budget, module, seconds)
        report = module.report.to_dict()
        point.budget = report["memory"]["budget"]
        point.predicted = report["memory"]["predicted_peak"]
        point.overhead = report["plan"]["overhead"]
        point.lower_bound = report["plan"]["lower_bound"]
        yield point


def _failed(model: str, method: str, setting: str, error: Exception) -> Point:
    text = str(error).splitlines()[0] if str(error) else ""
    return Point(model, method, setting, note=f"{type(error).__name__}: {text}"[:160])


def verdicts(points: Sequence[Point]) -> dict[str, Any]:
    """How our points stand against the peers' on one model.

    Returns:
        ``at_checkpoint_peak``: our least recomputed FLOPs at checkpointing's peak, over its own;
        ``at_checkpoint_flops``: our least peak within its recomputed FLOPs, over its own;
        ``min_cut_points_above``: min-cut points that have one of ours below or at them in both
        peak and FLOPs, of how many; ``flops_at_60``: overhead at 60 % of eager's peak;
        ``graphopt_against_alone`` and ``granted_against_alone``: by budget, recomputed FLOPs over
        those of ``rematerialize`` alone.
    """
    ours = [p for p in points if p.method == "graphopt" and not p.note]
    eager = next(p for p in points if p.method == "eager")
    ours.append(dataclasses.replace(eager))
    result: dict[str, Any] = {}
    for peer in (p for p in points if p.method == "checkpoint" and not p.note):
        least = min((p.recomputed for p in ours if p.peak <= peer.peak), default=None)
        result["at_checkpoint_peak"] = None if least is None else least / peer.recomputed
        result["at_checkpoint_flops"] = (
            min(p.peak for p in ours if p.recomputed <= peer.recomputed) / peer.peak
        )
    cuts = [p for p in points if p.method == "min-cut" and not p.note]
    below = [
        any(o.peak <= c.peak and o.recomputed <= max(c.recomputed, 0) for o in ours) for c in cuts
    ]
    result["min_cut_points_above"] = f"{sum(below)} of {len(cuts)}"
    at_60 = [p.recomputed / eager.flops for p in ours if p.peak <= 0.6 * eager.peak]
    result["flops_at_60"] = min(at_60, default=None)
    alone = {p.setting: p for p in points if p.method == "alone"}
    for method in ("graphopt", "granted"):
        result[f"{method}_against_alone"] = {
            p.setting: _against(p, alone[p.setting])
            for p in points
            if p.method == method and p.setting in alone
        }
    return result


def _against(ours: Point, alone: Point) -> float | str:
    if ours.note or alone.note:
        told = [f"{p.method} {'infeasible' if p.note else 'feasible'}" for p in (ours, alone)]
        return ", ".join(told)
    return ours.recomputed / alone.recomputed if alone.recomputed else float(ours.recomputed > 0)


def run(options: argparse.Namespace, say: Callable[[str], None]) -> list[Point]:
    """Measure every model and method asked for."""
    points: list[Point] = []
    for name in options.models:
        say(f"{name}: eager")
        bench = Bench(name, options.repeats)
        points.append(bench.point)
        sources: dict[str, Callable[[], Iterator[Point]]] = {
            "checkpoint": lambda bench=bench: run_checkpoint(bench),
            "min-cut": lambda bench=bench: run_min_cut(bench, options.min_cut),
        }
        for ours in OURS:
            sources[ours] = lambda bench=bench, ours=ours: run_graphopt(
                bench,
                _our_budgets(points, bench, options),
                options.time_limit,
                ours,
                options.granted,
            )
        for method in options.methods:
            for point in sources[method]():
                points.append(point)
                say(f"{name}: {charts.row_text(point, bench.point)}")
    return points


def _our_budgets(points: Sequence[Point], bench: Bench, options: argparse.Namespace) -> list[str]:
    """Percentages, and the bytes at which the peers peak below eager (those within 1 % once)."""
    exact: list[int] = []
    peers = [p for p in points if p.model == bench.name and p.method not in OURS]
    for point in sorted(peers, key=lambda p: p.peak):
        known = any(abs(point.peak / other - 1) < 0.01 for other in exact)
        if not known and 0 < point.peak < 0.99 * bench.point.peak:
            exact.append(point.peak)
    return [*map(str, exact), *(f"{percent:g}%" for percent in options.budgets)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["cnn", "gpt2_4"], choices=sorted(MODELS))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["checkpoint", "min-cut", "graphopt"],
        choices=["checkpoint", "min-cut", *OURS],
    )
    parser.add_argument("--budgets", nargs="+", type=float, default=OUR_BUDGETS, help="per cent")
    parser.add_argument("--granted", default="1%", help="gradient error of method granted")
    parser.add_argument("--min-cut", nargs="+", type=float, default=MIN_CUT_BUDGETS)
    parser.add_argument("--time-limit", type=float, default=30.0, help="seconds for each plan")
    parser.add_argument("--repeats", type=int, default=7, help="timed pairs of steps; 0: none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; the table goes to stdout, progress to stderr."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    points = run(options, lambda text: print(text, file=sys.stderr, flush=True))
    by_model = {name: [p for p in points if p.model == name] for name in options.models}
    found = {name: verdicts(group) for name, group in by_model.items()}
    charts.print_table(by_model, found)
    if options.json:
        data = {
            "schema_version": SCHEMA_VERSION,
            "torch": torch.__version__,
            "threads": options.threads,
            "time_limit": options.time_limit,
            "points": [dataclasses.asdict(point) for point in points],
            "verdicts": found,
        }
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    if options.plot:
        charts.plot(by_model, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
