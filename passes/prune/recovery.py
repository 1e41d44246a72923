"""Brief recovery of a pruned module: its vectors and its head, not its matrices."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn

from graphopt.batches import read_batch, takes_targets
from graphopt.errors import UsageError
from graphopt.ir.capture import capture
from graphopt.ir.graphs import lookup
from graphopt.ir.program import Program
from graphopt.passes.prune.adapters import Adapted
from graphopt.pipeline import Progress, silent
from graphopt.training import TrainingReport, recalibrate, train
from graphopt.training.accuracy import accuracy_of
from graphopt.training.reading import arguments

KINDS = ("norms", "biases", "head")


def recover(
    module: nn.Module,
    data: Iterable[Any],
    *,
    loss: Callable[..., Any] | None = None,
    teacher: nn.Module | None = None,
    parameters: Sequence[str] = KINDS,
    head_limit: float = 0.01,
    adapter_rank: int = 0,
    recalibrated: bool = False,
    epochs: int = 1,
    steps: int | None = None,
    lr: float = 3e-3,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
    progress: Progress = silent,
    **options: Any,
) -> TrainingReport:
    """Train a few parameters of a pruned module, in place (PERP; Zimmer et al. 2023).

    A network that was pruned has mostly lost the scale and the shift of its activations. Norms and
    biases put these right: one number per channel, well below a hundredth of the parameters of
    all but the smallest networks, no optimizer state for the matrices, and no gradient of them.

    Args:
        module: An `OptimizedModule`, or any other.
        data: Batches, as `graphopt.optimize` takes them.
        loss: ``loss(outputs)`` or ``loss(outputs, targets)``; may be left out with a teacher.
        teacher: Such as the dense model: its class scores are imitated.
        parameters: What is trained. ``norms``: scales, that is parameters with at most one
            dimension larger than 1; ``biases``: those of them that are named so; ``head``: the
            matrix after which no other comes before the outputs.
        head_limit: The head is trained where it holds at most this share of all parameters.
        adapter_rank: Train low-rank adapters of this rank on all matrices besides, and add them to
            the matrices at the end; 0: none.
        recalibrated: Measure the running statistics of batch norms on the data at the end.
        epochs: How often the data is gone through.
        steps: Steps of the optimizer, instead of epochs.
        lr: Learning rate at first.
        validation: Pairs ``(inputs, targets)``: the best weights on it are kept.
        seed: Of everything random.
        progress: Told what goes on.
        **options: Further options of `graphopt.training.train`: ``temperature``, ``label_share``,
            ``groups``, ``optimizer``...

    Returns:
        What was done, and `trained`: the names of all parameters that changed.

    Raises:
        UsageError: A kind of parameters that there isn't.
        NothingToTrainError: The module has none of these.
        CaptureError: It can't be captured to find its head; leave that out then.
    """
    unknown = [kind for kind in parameters if kind not in KINDS]
    if unknown or adapter_rank < 0:
        raise UsageError(
            f"parameters={unknown[0]!r}" if unknown else f"adapter_rank={adapter_rank}",
            hint=f"of {', '.join(KINDS)}; a rank of 0 or more",
        )
    if recalibrated and iter(data) is data:
        raise UsageError("recalibrated= reads the data once more", hint="give a list")
    program, data = _program(module, data, loss) if "head" in parameters else (None, data)
    names = trained_parameters(module, program, parameters, head_limit)
    settings: dict[str, Any] = {
        "loss": loss, "teacher": teacher, "epochs": epochs, "steps": steps, "lr": lr,
        "validation": validation, "seed": seed, "progress": progress, **options,
    }  # fmt: skip
    if adapter_rank:
        report = _with_adapters(module, data, names, adapter_rank, settings)
    else:
        report = train(module, data, parameters=names, **settings)
    if recalibrated:
        progress("measuring statistics")
        recalibrate(module, data, pairs=loss is not None and takes_targets(loss), seed=seed)
        if report.accuracy_after is not None:
            scores = {"scores": options["scores"]} if "scores" in options else {}
            after = accuracy_of(module, validation or (), **scores)
            report = dataclasses.replace(report, accuracy_after=after)
    return report


def trained_parameters(
    module: nn.Module,
    program: Program | None,
    kinds: Sequence[str] = KINDS,
    head_limit: float = 0.01,
) -> list[str]:
    """The names of the parameters that `recover` trains.

    Args:
        module: The module.
        program: Its graph, in which the head is found; needed for that alone.
        kinds: Of `KINDS`.
        head_limit: The largest share of all parameters that a head may hold.
    """
    named = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    found = [name for name, p in named.items() if _is_vector(p) and _kind(name) in kinds]
    if "head" in kinds and program is not None:
        head = [name for name in named if id(named[name]) in _head(program)]
        size = sum(named[name].numel() for name in head)
        if size <= head_limit * sum(p.numel() for p in module.parameters()):
            found += head
    return found


def _kind(name: str) -> str:
    return "biases" if "bias" in name.rpartition(".")[2] else "norms"


def _is_vector(tensor: torch.Tensor) -> bool:
    return sum(size > 1 for size in tensor.shape) <= 1


def _program(
    module: nn.Module, data: Iterable[Any], loss: Callable[..., Any] | None
) -> tuple[Program, Iterable[Any]]:
    """The module as a graph, and the data with its first batch still in it."""
    iterator = iter(data)
    first = next(iterator, None)
    if first is None:
        raise UsageError("the data holds no batch")
    if iterator is data:
        data = itertools.chain([first], iterator)
    batch = read_batch(first, loss, arguments(module))
    return capture(module, batch.args, batch.kwargs), data


def _head(program: Program) -> set[int]:
    """Identities of the matrices through which alone an output comes from the rest."""
    graph = program.module.graph
    inputs = _depending(graph)
    found: dict[fx.Node, list[torch.Tensor]] = {}
    for output in graph.output_node().all_input_nodes:
        node: fx.Node | None = output
        while node is not None:
            matrices = list(_matrices(program, node, inputs))
            if matrices:
                found[node] = matrices
                break
            before = [n for n in node.all_input_nodes if n in inputs]
            node = before[0] if len(before) == 1 else None
    final = [node for node in found if not _leads_to(node, set(found) - {node})]
    return {id(matrix) for node in final for matrix in found[node]}


def _depending(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on inputs."""
    found = set(graph.find_nodes(op="placeholder"))
    for node in graph.nodes:
        if any(each in found for each in node.all_input_nodes):
            found.add(node)
    return found


def _matrices(program: Program, node: fx.Node, inputs: set[fx.Node]) -> Iterator[torch.Tensor]:
    """The matrices among parameters that a node reads, perhaps through views of them."""
    waiting = [n for n in node.all_input_nodes if n not in inputs]
    while waiting:
        source = waiting.pop()
        waiting += source.all_input_nodes
        if source.op == "get_attr":
            tensor = lookup(program.module, str(source.target))
            if isinstance(tensor, nn.Parameter) and not _is_vector(tensor):
                yield tensor


def _leads_to(node: fx.Node, others: set[fx.Node]) -> bool:
    """Whether other nodes are computed from one: it is inside the network then, not at its end."""
    seen, waiting = set[fx.Node](), list(node.users)
    while waiting:
        user = waiting.pop()
        if user in others:
            return True
        if user not in seen:
            seen.add(user)
            waiting += user.users
    return False


def _with_adapters(
    module: nn.Module,
    data: Iterable[Any],
    names: Sequence[str],
    rank: int,
    settings: dict[str, Any],
) -> TrainingReport:
    """Train with adapters on all matrices that are not trained themselves, then merge them."""
    matrices = [
        name
        for name, p in module.named_parameters()
        if p.is_floating_point() and p.dim() > 1 and name not in names
        and min(p.flatten(1).shape) > rank
    ]  # fmt: skip
    adapted = Adapted(module, matrices, rank, settings["seed"])
    inner = [f"base.{name}" for name in names]
    beside = [name for name, _ in adapted.named_parameters() if not name.startswith("base.")]
    report = train(adapted, data, parameters=[*inner, *beside], **settings)
    adapted.merge()
    total = sum(p.numel() for p in module.parameters())
    return dataclasses.replace(report, trained=(*names, *matrices), total_count=total)
