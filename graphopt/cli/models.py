"""From the text that names a model to the model and its example inputs."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.errors import ModelError, first_line, suggest, user_line_of_error


@dataclass(frozen=True)
class Loaded:
    """A model with example inputs.

    Attributes:
        name: The text that named it.
        model: The module.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
    """

    name: str
    model: Any
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


def load_model(name: str, *, trust: bool = False, evaluation: bool = False) -> Loaded:
    """Build or load the model called ``name``.

    Args:
        name: ``package.module:factory``, ``path/to/file.py:factory``, or a saved module's file.
        trust: Load a file even if it could execute code.
        evaluation: Put the model in eval mode.

    Raises:
        ModelError: It can't be found or built.
        FileFormatError: A corrupt file.
    """
    if ":" not in name or Path(name).is_file():
        loaded = _load_file(name, trust)
    else:
        loaded = _called(name, _factory(name))
    if evaluation:
        loaded.model.eval()
    return loaded


def load_named(name: str) -> Any:
    """The function called ``package.module:function`` or ``path/to/file.py:function``.

    Raises:
        ModelError: There is none.
    """
    return _factory(name)


def dynamic_axes(text: str) -> str | None:
    """The ``dynamic`` argument that an option's text stands for."""
    return None if text.strip().lower() == "none" else text


def _load_file(name: str, trust: bool) -> Loaded:
    path = Path(name)
    if not path.is_file():
        raise ModelError(
            f"no model {name!r}",
            hint="name it package.module:factory, path/to/file.py:factory, or a saved file",
        )
    if path.suffix == ".py":
        raise ModelError(f"{name!r} names no factory", hint=f"for example {name}:build")
    from graphopt.api import load
    from graphopt.cli.examples import example_inputs

    module = load(path, trust=trust)
    args, kwargs = example_inputs(module)
    return Loaded(name, module, args, kwargs)


def _factory(name: str) -> Any:
    place, _, attribute = name.rpartition(":")
    if not attribute:
        raise ModelError(f"{name!r} names no factory", hint=f"for example {place}:build")
    module = _module(place)
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [n for n in vars(value) if not n.startswith("_")]
            raise ModelError(f"{place} has no {attribute!r}", hint=suggest(part, public))
        value = getattr(value, part)
    if not callable(value):
        raise ModelError(f"{name} is no factory: it is a {type(value).__name__}")
    return value


def _module(place: str) -> Any:
    if place.endswith(".py"):
        return _module_from_file(Path(place))
    here = os.getcwd()
    if here not in sys.path:  # as `python -m` does; an installed script doesn't
        sys.path.insert(0, here)
    try:
        found = importlib.util.find_spec(place)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise ModelError(f"no module {place!r}", hint="is it installed, or a path ending in .py?")
    try:
        return importlib.import_module(place)
    except Exception as error:  # importing a user's module may raise anything
        raise _failed(f"importing {place}", error) from error


def _module_from_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"no file {path}")
    name = f"_graphopt_model_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be pickled and found by name
    folder = str(path.resolve().parent)
    if folder not in sys.path:  # as `python file.py` does
        sys.path.insert(0, folder)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # a user's file may raise anything
        raise _failed(f"running {path}", error) from error
    return module


def _called(name: str, factory: Any) -> Loaded:
    from torch import nn

    try:
        made = factory()
    except Exception as error:  # a user's factory may raise anything
        raise _failed(f"{name}()", error) from error
    parts = made if isinstance(made, (tuple, list)) else (made,)
    model, args, kwargs = [*parts, *((), {})[len(parts) - 1 :]][:3] if parts else (None, (), {})
    if len(parts) > 3 or not isinstance(model, nn.Module):
        raise ModelError(
            f"{name}() gave {type(made).__name__}, not a model",
            hint="return the model, or (model, args), or (model, args, kwargs)",
        )
    if not isinstance(args, (tuple, list)):
        args = (args,)
    if not isinstance(kwargs, Mapping):
        raise ModelError(f"{name}() gave keyword inputs that are no mapping")
    return Loaded(name, model, tuple(args), dict(kwargs))


def _failed(what: str, error: Exception) -> ModelError:
    line = user_line_of_error(error)
    if isinstance(error, SyntaxError) and error.filename:
        line = f"{error.filename}:{error.lineno}: {(error.text or '').strip()}"
    return ModelError(f"{what} failed: {type(error).__name__}: {first_line(error)}", user_line=line)
