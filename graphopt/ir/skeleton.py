"""The source model's modules without their code: containers that hold parameters at their paths."""

from __future__ import annotations

import copy
import dataclasses
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import nn

from graphopt.errors import UnsupportedError

_MODULE_FIELDS = frozenset(vars(nn.Module()))
ADDED = "_graphopt"
"""Name of the container of tensors that a pass adds and the source hasn't."""
INNER_HOOKS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)


class Container(nn.Module):
    """Holds the parameters and buffers of one module of the source, at its path.

    It has no code of its own: the graph reads its tensors and its ``training`` flag.
    """

    _path: str = ""
    _class_name: str = "Module"
    _repr: str = ""
    _extra_state: Any = None

    def _get_name(self) -> str:
        return self._class_name

    def extra_repr(self) -> str:
        """What the source module shows of itself."""
        return self._repr

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refused: the graph doesn't call inner modules."""
        raise UnsupportedError(
            f"calling the inner module {self._path!r} ({self._class_name}) of an optimized module",
            hint="only the whole module has code; call the source model's own module instead",
        )

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        is_setting = isinstance(value, int | float | str) and name != "training"
        if is_setting and not name.startswith("_") and self._was_captured(name):
            warnings.warn(
                f"{self._class_name}.{name} was fixed when the model was captured: setting it "
                "changes nothing. Set it on the source model and optimise that again.",
                stacklevel=2,
            )

    def _was_captured(self, name: str) -> bool:
        """Whether the source may have had a setting of that name."""
        return True

    def __setitem__(self, key: Any, value: Any) -> NoReturn:
        raise UnsupportedError(
            f"replacing part {key!r} of {self._class_name} in an optimized module",
            hint="replace it in the source model and optimise that again",
        )

    def __getitem__(self, key: Any) -> Any:
        modules = self._modules
        if isinstance(key, int):
            key = str(key if key >= 0 else len(modules) + key)
        if isinstance(key, str):
            return modules[key] if key in modules else self._parameters[key]
        return nn.ModuleList(list(modules.values())[key])


class SequenceContainer(Container):
    """A container for ``Sequential``, ``ModuleList``, ``ModuleDict`` and their like."""

    def __len__(self) -> int:
        return len(self._modules) or len(self._parameters)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        if self._class_name == "ModuleList":  # which shows equal entries once
            return nn.ModuleList.__repr__(self)  # type: ignore[arg-type]
        return super().__repr__()

    def __iter__(self) -> Iterator[Any]:
        if self._class_name in ("ModuleDict", "ParameterDict"):
            return iter(list(self._modules) or list(self._parameters))
        return iter(list(self._modules.values()) or list(self._parameters.values()))


class ExtraStateContainer(Container):
    """A container for a module with ``get_extra_state``."""

    def get_extra_state(self) -> Any:
        """The state as it was captured, or as it was loaded."""
        return self._extra_state

    def set_extra_state(self, state: Any) -> None:
        """Keep the state."""
        self._extra_state = state


def _refuse(name: str) -> Callable[..., NoReturn]:
    def refuse(self: Container, *args: Any, **kwargs: Any) -> NoReturn:
        raise UnsupportedError(
            f"{name} on the inner module {self._path!r} ({self._class_name}) of an optimized "
            "module",
            hint="inner modules aren't called; hooks work on the whole module, on tensors, and on "
            "parameters, or put the hook on the source model and capture again",
        )

    refuse.__name__ = name
    return refuse


for _name in INNER_HOOKS:
    setattr(Container, _name, _refuse(_name))


@dataclass(frozen=True, eq=False)
class Skeleton:
    """The source's modules at their paths and its other attributes.

    Attributes:
        root: The tree of containers, which holds the program's parameters and buffers.
        attributes: The source's other attributes by name (a HF ``config``), with no weights.
        source: The source's class, or None where it is not known (a loaded program).
        properties: Names of the source class's properties.
        methods: Names of its methods, which are refused by name.
        flags: Module modes after ``train()`` and ``eval()`` where the source overrides these.
    """

    root: Container
    attributes: Mapping[str, Any] = field(default_factory=dict)
    source: type | None = None
    properties: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    flags: Mapping[bool, Mapping[str, bool]] = field(default_factory=dict)

    def rebuilt(self, root: Container) -> Skeleton:
        """The same skeleton with another tree of containers."""
        return dataclasses.replace(self, root=root)

    def with_attributes(self, attributes: Mapping[str, Any]) -> Skeleton:
        """The same skeleton with other attributes."""
        return dataclasses.replace(self, attributes=attributes)


def build(model: nn.Module, flags: Mapping[bool, Mapping[str, bool]]) -> Skeleton:
    """Make the skeleton of a model.  Its containers share the model's parameters and buffers."""
    cls = type(model)
    members = {name: _static_member(cls, name) for name in dir(cls) if not hasattr(nn.Module, name)}
    return Skeleton(
        root=_container(model, "", {}),
        attributes=_attributes(model),
        source=cls,
        properties=tuple(n for n, m in members.items() if isinstance(m, property)),
        methods=tuple(n for n, m in members.items() if _is_method(m)),
        flags=flags,
    )


def _static_member(cls: type, name: str) -> Any:
    for base in cls.__mro__:
        if name in vars(base):
            return vars(base)[name]
    return None


def _is_method(member: Any) -> bool:
    return isinstance(member, (types.FunctionType, classmethod)) or (
        callable(member) and not isinstance(member, (type, staticmethod))
    )


def _container(module: nn.Module, path: str, seen: dict[int, Container]) -> Container:
    if id(module) in seen:
        return seen[id(module)]
    container = _container_class(module)()
    seen[id(module)] = container
    container._path = path
    container._class_name = module._get_name()
    container._repr = _extra_repr(module)
    container._version = getattr(module, "_version", None)  # type: ignore[assignment]
    if isinstance(container, ExtraStateContainer):
        container._extra_state = module.get_extra_state()
    container.training = module.training
    container._parameters.update(module._parameters)
    container._buffers.update(module._buffers)
    container._non_persistent_buffers_set.update(module._non_persistent_buffers_set)
    for name, child in module._modules.items():
        inner = f"{path}.{name}" if path else name
        container._modules[name] = None if child is None else _container(child, inner, seen)
    return container


def _container_class(module: nn.Module) -> type[Container]:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        return ExtraStateContainer
    if hasattr(type(module), "__len__") and hasattr(type(module), "__getitem__"):
        return SequenceContainer
    return Container


def _extra_repr(module: nn.Module) -> str:
    try:
        return module.extra_repr()
    except Exception:  # an extra_repr of the user's that fails is no reason to fail here
        return ""


def all_tensors(root: Container) -> list[torch.Tensor]:
    """Parameters, buffers and constants of a tree of containers, each once."""
    found: dict[int, torch.Tensor] = {}
    for module in root.modules():
        own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        found.update({id(t): t for t in own if isinstance(t, torch.Tensor)})
    return list(found.values())


def copy_tree(
    container: Container, make_root: Callable[[], Container], replaced: Mapping[int, Any]
) -> Container:
    """Copy a tree of containers, sharing the tensors; ``replaced`` maps tensor ids to new ones."""
    seen: dict[int, Container] = {}
    root = make_root()
    seen[id(container)] = root
    _fill(root, container, seen, replaced)
    return root


def _fill(
    new: Container, old: Container, seen: dict[int, Container], replaced: Mapping[int, Any]
) -> None:
    for name, value in vars(old).items():
        if name in ("_path", "_class_name", "_repr", "_extra_state", "_version", "training"):
            new.__dict__[name] = value
        elif name not in _MODULE_FIELDS and isinstance(value, torch.Tensor):
            new.__dict__[name] = replaced.get(id(value), value)
    for key, tensor in old._parameters.items():
        new._parameters[key] = replaced.get(id(tensor), tensor)
    for key, tensor in old._buffers.items():
        new._buffers[key] = replaced.get(id(tensor), tensor)
    new._non_persistent_buffers_set.update(old._non_persistent_buffers_set)
    for key, child in old._modules.items():
        if child is None:
            new._modules[key] = None
            continue
        if id(child) not in seen:
            inner = type(child)()
            seen[id(child)] = inner  # type: ignore[assignment]
            _fill(inner, child, seen, replaced)  # type: ignore[arg-type]
        new._modules[key] = seen[id(child)]


def _attributes(model: nn.Module) -> dict[str, Any]:
    """The model's own instance attributes, without weights, modules and torch's bookkeeping."""
    memo = {id(module): None for module in model.modules()}
    result = {}
    for name, value in vars(model).items():
        if name in _MODULE_FIELDS or isinstance(value, (torch.Tensor, types.MethodType)):
            continue
        try:
            result[name] = copy.deepcopy(value, dict(memo))
        except Exception:  # what can't be copied (a lock, a file) is shared
            result[name] = value
    return result
