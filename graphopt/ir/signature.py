"""The call signature of a captured model: argument names, trees of inputs and outputs, checks."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from graphopt.errors import InputMismatch, UnsupportedError
from graphopt.ir.guards import compile_arithmetic
from graphopt.ir.trees import LEAF, Tree, flatten, match, rebuild, same_value, unflatten


@dataclass(frozen=True)
class Leaf:
    """One tensor input of a program.

    Attributes:
        name: Name of its placeholder, made from the argument's name.
        path: How a user would write it, such as ``batch['ids']``.
        shape: Example sizes, as the user gave them.
        dtype: Example dtype.
        device: Example device.
        traced: The sizes with which it was traced; a string is the name of a free size.
        requires_grad: Whether the example required a gradient.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    traced: tuple[int | str, ...]
    requires_grad: bool = False


@dataclass(frozen=True)
class Guard:
    """A condition on input sizes under which the captured graph is valid.

    Attributes:
        text: How a user would read it, such as ``x.size()[0] % 2 == 0``.
        code: Python over ``s``, the list of input sizes: ``s[0][0] % 2 == 0``.
    """

    text: str
    code: str


@dataclass(frozen=True, eq=False)
class Signature:
    """How a captured program is called and what it returns.

    Attributes:
        parameters: The parameters of the source's ``forward``, in order, without a ``*args`` or
            ``**kwargs`` that caught nothing when the model was captured.
        in_spec: One tree for each parameter, defaults included.
        out_spec: The tree of the result.
        inputs: One entry for each tensor input, in the order of the placeholders.
        guards: Conditions on sizes beyond those that `Leaf.traced` shows.
        passed: Names of the arguments that the user gave when capturing.
    """

    parameters: tuple[inspect.Parameter, ...]
    in_spec: tuple[Tree, ...]
    out_spec: Tree
    inputs: tuple[Leaf, ...]
    guards: tuple[Guard, ...] = ()
    passed: tuple[str, ...] = ()
    _python: inspect.Signature = field(init=False, repr=False)
    _checked: set[Any] = field(init=False, repr=False, default_factory=set)
    _simple: int = field(init=False, repr=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_python", inspect.Signature(self.parameters))
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        simple = 0
        for parameter, tree in zip(self.parameters, self.in_spec, strict=True):
            if tree.kind != "leaf" or parameter.kind not in kinds:
                break
            simple += 1
        rest = self.in_spec[simple:]
        defaults = [
            same_value(_default(p), t.context) if t.kind == "static" else _is_empty(p, t)
            for p, t in zip(self.parameters[simple:], rest, strict=True)
        ]
        object.__setattr__(self, "_simple", simple if all(defaults) else -1)

    def __reduce__(self) -> Any:  # without the caches
        names = [f.name for f in dataclasses.fields(self) if f.init]
        return type(self), tuple(getattr(self, name) for name in names)

    @property
    def python(self) -> inspect.Signature:
        """The signature of calls, without ``self``."""
        return self._python

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the placeholders."""
        return tuple(leaf.name for leaf in self.inputs)

    @property
    def dynamic(self) -> dict[str, dict[int, str]]:
        """The free sizes: placeholder name -> dimension -> symbol."""
        return {
            leaf.name: {i: size for i, size in enumerate(leaf.traced) if isinstance(size, str)}
            for leaf in self.inputs
        }

    def flatten_inputs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """Flatten the arguments of a call into the program's tensor inputs.

        Raises:
            InputMismatch: The call doesn't fit the captured one; names the argument.
        """
        if not kwargs and len(args) == self._simple:
            flat = list(args)
            if all(isinstance(leaf, torch.Tensor) for leaf in flat):
                return flat
        flat = []
        values = self._arguments(args, dict(kwargs))
        for parameter, tree, value in zip(self.parameters, self.in_spec, values, strict=True):
            match(tree, value, flat, parameter.name)
        return flat

    def _arguments(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
        """One value for each parameter, defaults filled in (in code that Dynamo traces)."""
        positional = list(args)
        values: list[Any] = []
        missing: list[str] = []
        for parameter in self.parameters:
            kind, name = parameter.kind, parameter.name
            if kind is inspect.Parameter.VAR_POSITIONAL:
                values.append(tuple(positional))
                positional = []
            elif kind is inspect.Parameter.VAR_KEYWORD:
                values.append(kwargs)
                kwargs = {}
            elif positional and kind is not inspect.Parameter.KEYWORD_ONLY:
                values.append(positional.pop(0))
            elif name in kwargs and kind is not inspect.Parameter.POSITIONAL_ONLY:
                values.append(kwargs.pop(name))
            elif parameter.default is not inspect.Parameter.empty:
                values.append(parameter.default)
            else:
                missing.append(name)
        if positional or kwargs or missing:
            raise self._does_not_bind(args, kwargs, missing)
        return values

    def _does_not_bind(
        self, args: Sequence[Any], unknown: Mapping[str, Any], missing: list[str]
    ) -> InputMismatch:
        why = f"missing {', '.join(missing)}" if missing else f"{len(args)} positional arguments"
        if unknown:
            why += f", not taken: {', '.join(unknown)}"
        return InputMismatch(f"the call doesn't fit the model's signature {self._python}: {why}")

    def check(self, flat: Sequence[torch.Tensor]) -> None:
        """Check the sizes of flat inputs against the captured graph.

        Raises:
            InputMismatch: A size that is fixed in the graph differs, or a guard doesn't hold.
        """
        sizes = tuple(tensor.shape for tensor in flat)
        if sizes in self._checked:
            return
        if len(flat) != len(self.inputs):
            raise InputMismatch(f"expected {len(self.inputs)} tensors, got {len(flat)}")
        self._check_sizes(sizes)
        self._check_guards(sizes)
        if len(self._checked) > 4096:
            self._checked.clear()
        self._checked.add(sizes)

    def _check_sizes(self, sizes: tuple[Any, ...]) -> None:
        symbols: dict[str, tuple[int, str]] = {}
        for leaf, size in zip(self.inputs, sizes, strict=True):
            if len(size) != len(leaf.traced):
                raise InputMismatch(
                    f"argument {leaf.path!r}: expected {len(leaf.traced)} dimensions, "
                    f"got {len(size)} (shape {tuple(size)})"
                )
            for axis, (expected, got) in enumerate(zip(leaf.traced, size, strict=True)):
                where = f"{leaf.path}.shape[{axis}]"
                if isinstance(expected, int):
                    if got != expected:
                        raise _wrong_size(leaf.path, axis, expected, got)
                elif expected.isidentifier():
                    first, owner = symbols.setdefault(expected, (got, where))
                    if first != got:
                        raise _wrong_size(leaf.path, axis, first, got, f", as {owner}")

    def _check_guards(self, sizes: tuple[Any, ...]) -> None:
        for guard, test in zip(self.guards, self._tests(), strict=True):
            if not test(sizes):
                shapes = {leaf.path: tuple(s) for leaf, s in zip(self.inputs, sizes, strict=True)}
                raise InputMismatch(
                    f"the captured graph holds only where {guard.text}; got shapes {shapes}",
                    hint="capture the model with inputs of this size",
                )

    def _tests(self) -> list[Callable[[Any], bool]]:
        cached = self.__dict__.get("_compiled")
        if cached is None:
            cached = [compile_arithmetic(guard.code) for guard in self.guards]
            object.__setattr__(self, "_compiled", cached)
        return cached

    def flatten_outputs(self, output: Any) -> list[Any]:
        """Flatten a result of this program (or of its source) into its tensors."""
        return flatten(output)[0]

    def unflatten_outputs(self, flat: Iterable[Any]) -> Any:
        """Rebuild the result that the source model would return from the graph's flat outputs."""
        return unflatten(self.out_spec, flat)

    def rebuild_call(self, flat: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The (args, kwargs) with which the user called the model, holding these tensors."""
        leaves = iter(flat)
        bound = inspect.BoundArguments(self._python, {})  # type: ignore[arg-type]
        for parameter, tree in zip(self.parameters, self.in_spec, strict=True):
            value = rebuild(tree, leaves)
            if parameter.name in self.passed:
                bound.arguments[parameter.name] = value
        return bound.args, bound.kwargs


def _default(parameter: inspect.Parameter) -> Any:
    return parameter.default


def _is_empty(parameter: inspect.Parameter, tree: Tree) -> bool:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return parameter.kind in variadic and not tree.children


def _wrong_size(path: str, axis: int, expected: int, got: int, why: str = "") -> InputMismatch:
    return InputMismatch(
        f"argument {path!r}: dimension {axis} has to be {expected}{why}, got {got}",
        hint="this size is fixed in the captured graph; capture the model with inputs of this "
        "size, or with dynamic= naming the dimension",
    )


def python_signature(model: nn.Module) -> inspect.Signature:
    """The signature of ``model.forward``.

    Raises:
        UnsupportedError: It can't be read (a builtin).
    """
    try:
        return inspect.signature(model.forward)
    except (TypeError, ValueError) as error:
        name = type(model).__name__
        raise UnsupportedError(f"the signature of {name}.forward: {error}") from error


def bind(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Signature, list[torch.Tensor]]:
    """Bind example arguments to a model's ``forward``.

    Returns:
        A signature without output (a single leaf stands for it), and the flat tensor inputs.

    Raises:
        InputMismatch: The arguments don't fit the signature.
    """
    python = python_signature(model)
    try:
        bound = python.bind(*args, **kwargs)
    except TypeError as error:
        raise InputMismatch(
            f"the example inputs don't fit {type(model).__name__}.forward{python}: {error}"
        ) from None
    passed = tuple(bound.arguments)
    bound.apply_defaults()
    flat: list[Any] = []
    trees: list[Tree] = []
    paths: list[str] = []
    parameters: list[inspect.Parameter] = []
    for name, value in bound.arguments.items():
        leaves, tree = flatten(value)
        parameter = python.parameters[name].replace(annotation=inspect.Parameter.empty)
        if _is_empty(parameter, tree):
            continue  # what it would take isn't in the graph: callers have to see that
        flat += leaves
        trees.append(tree)
        parameters.append(parameter)
        paths += leaf_paths(tree, name)
    inputs = tuple(
        Leaf(
            name,
            path,
            tuple(leaf.shape),
            leaf.dtype,
            leaf.device,
            tuple(leaf.shape),
            leaf.requires_grad,
        )
        for name, path, leaf in zip(_placeholder_names(paths), paths, flat, strict=True)
    )
    return Signature(tuple(parameters), tuple(trees), LEAF, inputs, passed=passed), flat


def leaf_paths(tree: Tree, path: str) -> list[str]:
    """Where each leaf of a tree stands, such as ``output.hidden[0]``."""
    if tree.kind == "leaf":
        return [path]
    pairs = zip(tree.children, tree.keys(), strict=True) if tree.children else ()
    return [leaf for child, key in pairs for leaf in leaf_paths(child, path + key)]


def _placeholder_names(paths: Sequence[str]) -> list[str]:
    names: list[str] = []
    for path in paths:
        name = "".join(c if c.isalnum() else "_" for c in path).strip("_")
        while "__" in name:
            name = name.replace("__", "_")
        if not name.isidentifier():
            name = f"input_{name}"
        unique, count = name, 1
        while unique in names or unique == "self":
            unique, count = f"{name}_{count}", count + 1
        names.append(unique)
    return names
