"""One trace: `torch.export` of a model in one mode, in the flat form that every pass reads."""

from __future__ import annotations

import contextlib
import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from graphopt.errors import CaptureError, GraphoptError, UsageError, innermost_user_frame
from graphopt.ir.graphs import clean_graph, free_sizes, mark_assignments
from graphopt.ir.randomness import python_draws
from graphopt.ir.signature import Signature
from graphopt.ir.stand_ins import StandIns
from graphopt.ir.trees import LEAF, Tree, flatten

_HINTS = (
    (
        ("data-dependent", "DataDependent", "Could not guard", "Could not extract specialized"),
        "control flow depends on the values of tensors: write it with torch.cond or torch.where, "
        "or capture the part of the model around it",
    ),
    (
        ("DynamicOutputShape", "nonzero", "UnbackedSymint"),
        "a shape depends on the values of tensors: use torch.where with masks of fixed size, or "
        "capture the part of the model around it",
    ),
    (
        ("SyntaxError", "invalid syntax"),
        "a module or parameter has a name that torch can't write as Python (a keyword, or one with "
        "a double quote or a line end): rename it",
    ),
    (
        ("Constraints violated", "ConstraintViolation", "dynamic_shapes"),
        "the dynamic dimensions don't fit the model: pass dynamic=None, or name others",
    ),
    (
        ("FakeTensor", "fake tensor", "meta device"),
        "an op has no shape rule (a custom kernel without register_fake?), or the code reads a "
        "tensor's values",
    ),
)


class _Found:
    """What a call finds out; an object of its own, for export resets a module's attributes."""

    def __init__(self) -> None:
        self.out_spec: Tree = LEAF
        self.assigned: list[str] = []


class FlatCall(nn.Module):
    """Calls a model with flat tensors and returns flat tensors: what is exported."""

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model = model
        self.signature = signature
        self.found = _Found()

    def forward(self, *flat: torch.Tensor) -> tuple[Any, ...]:
        """Flat tensors in, flat tensors out; notes the tree of the result."""
        args, kwargs = self.signature.rebuild_call(flat)
        tables = [(name, m._buffers, dict(m._buffers)) for name, m in self.model.named_modules()]
        drawn = python_draws()
        output = self.model(*args, **kwargs)
        if drawn():
            raise CaptureError(
                f"{type(self.model).__name__}.forward draws numbers from Python's or NumPy's "
                "generator: a captured graph would keep those of this one call",
                hint="draw them with torch (torch.rand(())), or pass them in as tensors",
            )
        self.found.assigned = self._write_back(tables)
        leaves, self.found.out_spec = flatten(output, symbols=True)
        return tuple(leaves)

    def _write_back(self, tables: list[tuple[str, dict[str, Any], dict[str, Any]]]) -> list[str]:
        """Record assignments to buffers (``self.mean = ...``), which export loses, as copies."""
        assigned = []
        for path, table, before in tables:
            for name, old in before.items():
                new = table.get(name)
                if new is old or not isinstance(old, torch.Tensor):
                    continue
                full = f"{path}.{name}" if path else name
                if not isinstance(new, torch.Tensor) or new.shape != old.shape:
                    raise CaptureError(
                        f"forward gives the buffer {full!r} another shape",
                        hint="a captured graph has buffers of fixed shape: keep such state outside",
                    )
                old.copy_(new)
                table[name] = old
                assigned.append(full)
        return assigned


@dataclass(frozen=True)
class Trace:
    """One exported graph in flat form.

    Attributes:
        graph: The graph.
        signature: Its signature.
        sizes: What stands for another trace's free sizes, if this one has none.
    """

    graph: fx.GraphModule
    signature: Signature
    sizes: StandIns | None = None


def trace(
    model: nn.Module,
    signature: Signature,
    flat: Sequence[torch.Tensor],
    dynamic: Any,
    *,
    training: bool,
) -> Trace:
    """Export a model in one mode and bring the graph into flat form.

    Raises:
        CaptureError: Export failed.
    """
    for module in model.modules():
        module.training = training
    wrapper = FlatCall(model, signature)
    wrapper.training = training
    inputs = _distinct(_at_least_two(flat) if isinstance(dynamic, str) else flat)
    shapes = dimensions(signature, inputs, dynamic)
    exported, module = _export(wrapper, tuple(inputs), shapes)
    graph = clean_graph(module, signature.names)
    mark_assignments(graph, wrapper.found.assigned)
    return Trace(graph, free_sizes(signature, wrapper.found.out_spec, graph, exported))


def _at_least_two(flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Double a batch of one: export would take a size of one for a constant."""
    sizes = [tensor.shape[0] for tensor in flat if tensor.ndim]
    if not sizes or max(sizes) > 1:
        return list(flat)
    return [
        torch.cat([t.detach(), t.detach()]).requires_grad_(t.requires_grad) if t.ndim else t
        for t in flat
    ]


def _distinct(flat: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Give an input that comes twice (``labels=ids``) an object for each: export keeps one."""
    seen: set[int] = set()
    result = []
    for tensor in flat:
        again = id(tensor) in seen
        seen.add(id(tensor))
        result.append(tensor.clone() if again else tensor)
    return result


def dimensions(signature: Signature, flat: Sequence[torch.Tensor], dynamic: Any) -> Any:
    """``dynamic_shapes`` for `FlatCall`.

    Raises:
        UsageError: ``dynamic`` is a text that isn't known.
    """
    if dynamic is None:
        return None
    if isinstance(dynamic, str):
        names = [part.strip() for part in dynamic.split(",")]
        if names not in (["batch"], ["batch", "sequence"]):
            raise UsageError(
                f"dynamic={dynamic!r} isn't known",
                hint="use 'batch', 'batch,sequence', None, or torch's dynamic_shapes",
            )
        count = len(names)
        return (tuple(dict.fromkeys(range(min(count, t.ndim)), Dim.AUTO) for t in flat),)
    specs: list[Any] = []
    trees = dict(zip((p.name for p in signature.parameters), signature.in_spec, strict=True))
    given = [trees[name] for name in signature.passed]
    if isinstance(dynamic, Mapping):
        by_name = [dynamic.get(name) for name in signature.passed]
    else:
        by_name = [*dynamic, *[None] * (len(given) - len(dynamic))]
    for name, tree in trees.items():
        spec = by_name[signature.passed.index(name)] if name in signature.passed else None
        _spread(tree, spec, specs)
    return (tuple(specs),)


def _spread(tree: Tree, spec: Any, specs: list[Any]) -> None:
    """Append one dimension spec for each leaf of a tree."""
    if tree.kind == "leaf":
        specs.append(spec)
        return
    for index, child in enumerate(tree.children):
        if isinstance(spec, Mapping):
            name = tree.context[index] if isinstance(tree.context, list) else index
            _spread(child, spec.get(name), specs)
        elif isinstance(spec, (list, tuple)) and index < len(spec):
            _spread(child, spec[index], specs)
        else:
            _spread(child, None, specs)


def _export(wrapper: FlatCall, inputs: tuple[Any, ...], shapes: Any) -> Any:
    export: Callable[..., Any] = torch.export.export
    try:
        with warnings.catch_warnings(), _no_custom_functions(wrapper.model), _quiet():
            warnings.simplefilter("ignore")
            exported = export(wrapper, inputs, strict=False, dynamic_shapes=shapes)
            return exported, exported.module(check_guards=False)
    except GraphoptError:
        raise
    except Exception as error:
        raise capture_error(wrapper.model, error) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own remarks about a failing export back: the error says it better."""
    names = ("fx.experimental.symbolic_shapes", "fx.experimental.proxy_tensor")
    loggers = [logging.getLogger(f"torch.{n}") for n in (*names, "_subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # On failure torch prints the graph so far to stderr; the error says what matters.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


_FORWARD_ONLY = ContextVar("forward only", default=False)


@contextlib.contextmanager
def forward_only() -> Iterator[None]:
    """Capture for what runs a model in eval mode and never asks it for gradients.

    Of the user's autograd functions only what they compute is captured, and of a model that can't
    be captured in training mode only what it is in eval mode.
    """
    token = _FORWARD_ONLY.set(True)
    try:
        yield
    finally:
        _FORWARD_ONLY.reset(token)


def is_forward_only() -> bool:
    """Whether what is captured only runs in eval mode, without gradients."""
    return _FORWARD_ONLY.get()


@contextlib.contextmanager
def _no_custom_functions(model: nn.Module) -> Iterator[None]:
    """Refuse the user's autograd functions: export inlines them and drops their backward.

    None is refused where nobody will ask for gradients.
    """
    if is_forward_only():
        yield
        return
    base = torch.autograd.Function
    original = vars(base)["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if not cls.__module__.startswith("torch."):
            raise CaptureError(
                f"{type(model).__name__} can't be captured: it calls the autograd.Function "
                f"{cls.__qualname__}, whose custom backward a captured graph can't hold",
                user_line=user_frame("".join(traceback.format_stack())),
                hint="make it a torch.library.custom_op with register_autograd, or write it with "
                "differentiable ops",
            )
        return original.__get__(None, cls)(*args, **kwargs)

    base.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        base.apply = original  # type: ignore[method-assign]


def capture_error(model: nn.Module, error: Exception) -> CaptureError:
    """Say what failed, where in the user's code, and what to try."""
    text = str(error).strip() or type(error).__name__
    first = next((line.strip() for line in text.splitlines() if line.strip()), text)
    chain: BaseException | None = error
    line = None
    while chain is not None and line is None:
        frames = "".join(traceback.format_tb(chain.__traceback__))
        line = user_frame(frames)
        chain = chain.__cause__ or chain.__context__
    haystack = f"{type(error).__name__} {text}"
    hint = next((h for words, h in _HINTS if any(w in haystack for w in words)), None)
    return CaptureError(
        f"{type(model).__name__} can't be captured: {type(error).__name__}: {first[:500]}",
        user_line=line,
        hint=hint
        or "check that model(*args, **kwargs) runs as it stands; if it does, capture a "
        "smaller region of the model",
    )


def user_frame(trace_text: str) -> str | None:
    """The innermost frame outside torch and graphopt, or None."""
    line = innermost_user_frame(trace_text)
    return None if line is None or "/torch/" in line or "/graphopt/" in line else line
