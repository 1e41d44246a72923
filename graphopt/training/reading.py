"""What a caller of `train` asks for: read, checked, and refused where it makes no sense."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from graphopt.batches import Batch, read_batch
from graphopt.errors import ModelError, NothingToTrainError, UsageError


class Batches:
    """Data as batches, read anew in each epoch."""

    def __init__(self, data: Iterable[Any], loss: Callable[..., Any] | None, arguments: int):
        self.data, self.loss, self.arguments = data, loss, arguments

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.data:
            yield read_batch(batch, self.loss, self.arguments)


class Length:
    """How long training goes on, and how far it has come."""

    def __init__(self, epochs: int, steps: int | None, data: Iterable[Any]) -> None:
        self.once = iter(data) is data
        self.epochs, self.steps = epochs, steps
        if steps is None and hasattr(data, "__len__"):
            self.steps = epochs * len(data)  # type: ignore[arg-type]
        self.by_epochs = steps is None

    def done(self, step: int, epoch: int) -> float:
        """The share that is done, in [0, 1]; by whole epochs where their length isn't known."""
        return min(1.0, step / self.steps if self.steps else epoch / self.epochs)

    def is_over(self, step: int, epoch: int) -> bool:
        """Whether nothing is left to do."""
        return epoch >= self.epochs if self.by_epochs else step >= (self.steps or 0)


def chosen(module: nn.Module, names: Iterable[str] | None) -> dict[str, nn.Parameter]:
    """The parameters to train, by name."""
    known = dict(module.named_parameters(remove_duplicate=False))
    if names is None:
        found = {name: p for name, p in module.named_parameters() if p.requires_grad}
    else:
        names = list(names)
        unknown = [name for name in names if name not in known]
        if unknown:
            raise UsageError(f"the model has no parameter {unknown[0]!r}")
        found = {name: known[name] for name in names}
        found = {name: p for name, p in found.items() if _first(found, p) == name}
    if not found:
        raise NothingToTrainError("no parameter to train", hint="does any require gradients?")
    return found


def _first(named: dict[str, nn.Parameter], tensor: nn.Parameter) -> str:
    return next(name for name, p in named.items() if p is tensor)


def check(
    module: Any,
    data: Any,
    loss: Any,
    teacher: Any,
    epochs: int,
    steps: int | None,
    lr: float,
    temperature: float,
    label_share: float,
) -> None:
    """Refuses what is no module, no data, nothing to learn from, or a number out of range.

    Raises:
        UsageError: Says what.
        ModelError: The module or the teacher is none.
    """
    for model in (module, *(() if teacher is None else (teacher,))):
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if loss is None and teacher is None:
        raise UsageError("nothing to learn from", hint="give a loss, a teacher, or both")
    if teacher is module:
        raise UsageError("the model is its own teacher", hint="teacher=copy.deepcopy(model)")
    if not isinstance(data, Iterable):
        raise UsageError(f"data is an iterable of batches, not {type(data).__name__}")
    if steps is None and epochs > 1 and iter(data) is data:
        raise UsageError(
            f"{epochs} epochs of data that can be read only once",
            hint="give a list or a DataLoader, or steps= instead of epochs=",
        )
    wrong = {
        f"epochs={epochs}": epochs >= 1,
        f"steps={steps}": steps is None or steps >= 1,
        f"lr={lr}": lr > 0,
        f"temperature={temperature}": temperature > 0,
        f"label_share={label_share}": 0 <= label_share <= 1,
    }
    for text, right in wrong.items():
        if not right:
            raise UsageError(f"{text} is out of range")


def arguments(module: nn.Module) -> int:
    """How many positional inputs a model needs."""
    try:
        known = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len([p for p in known if p.kind in positional and p.default is p.empty])


def only_targets(outputs: Any, targets: Any) -> Any:
    """Stands for a loss where pairs are read and there is only a teacher."""
    raise UsageError("there is no loss", hint="give one, or a teacher")
