"""The single checks that make up the contract of an emitted module."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.zoo.compare import Run, clone_inputs, run, run_problems, tensor_problem
from tests.zoo.registry import ZooModel

Build = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], nn.Module]
Check = Callable[["Subject"], Iterator[str]]


@dataclass
class Subject:
    """An emitted module on trial.

    Attributes:
        entry: the zoo model.
        emitted: the emission.
        load: ``load(path)`` reads what ``emitted.save(path)`` wrote.
        recapture: captures and emits an emitted module again.
        trainable: run backward passes.
    """

    entry: ZooModel
    emitted: nn.Module
    load: Callable[[Path], nn.Module] | None = None
    recapture: Build | None = None
    trainable: bool = True

    def __post_init__(self) -> None:
        self._state = tensors_of(self.emitted)

    def reset(self) -> nn.Module:
        """The emission in training mode, its parameters and buffers as they came."""
        with torch.no_grad():
            for name, value in tensors_of(self.emitted, copies=False).items():
                value.copy_(self._state[name])
        return self.emitted.train()

    def run(self, module: nn.Module, **options: Any) -> Run:
        """One recorded step of a module."""
        return run(module, self.entry, backward=self.trainable, **options)

    def both(self, **options: Any) -> Iterator[str]:
        """Problems of a training step of the emission against the source's."""
        yield from run_problems(
            self.run(self.reset(), **options), self.run(self.entry.model(), **options)
        )


def tensors_of(module: nn.Module, *, copies: bool = True) -> dict[str, Tensor]:
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    return {k: v.detach().clone() if copies else v.detach() for k, v in named.items()}


def check_training(subject: Subject) -> Iterator[str]:
    """Outputs, loss, gradients and buffers of two accumulated steps, dropout on."""
    yield from subject.both(steps=2)


def check_input_gradients(subject: Subject) -> Iterator[str]:
    """Gradients of floating inputs."""
    if subject.trainable:
        yield from subject.both(differentiable=True)


def check_modes(subject: Subject) -> Iterator[str]:
    """Eval mode, and back; buffers must not move in eval mode."""
    emitted, source = subject.reset(), subject.entry.model()
    for mode in (False, True, False):
        emitted.train(mode)
        source.train(mode)
        if emitted.training is not mode:
            yield f"training is {emitted.training} after train({mode})"
        got, want = subject.run(emitted), subject.run(source)
        yield from (f"mode {mode}: {text}" for text in run_problems(got, want))


def check_partial_modes(subject: Subject) -> Iterator[str]:
    """One BatchNorm or dropout layer put into eval mode by itself, as in fine-tuning."""
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)
    emitted, source = subject.reset(), subject.entry.model()
    paths = [n for n, m in source.named_modules() if n and isinstance(m, kinds) and m.training]
    if not paths:
        return
    for module in (emitted, source):
        module.get_submodule(paths[0]).eval()
    yield from run_problems(subject.run(emitted), subject.run(source))
    emitted.train()


def check_second_batch(subject: Subject) -> Iterator[str]:
    """Another batch size in both modes, then the first again."""
    if "static_batch" in subject.entry.tags:
        return
    second = subject.entry.second
    for size in (second, second * 2, None):
        yield from (f"batch {size}: {text}" for text in subject.both(batch=size))
    got = subject.run(subject.reset().eval(), batch=second)
    want = subject.run(subject.entry.model().eval(), batch=second)
    yield from (f"batch {second}, eval: {text}" for text in run_problems(got, want))


def check_no_grad(subject: Subject) -> Iterator[str]:
    """Under ``no_grad`` and ``inference_mode``, in both modes."""
    for guard in (torch.no_grad, torch.inference_mode):
        for mode in (True, False):
            # A copy, because buffers assigned in inference mode stay inference tensors.
            emitted = copy.deepcopy(subject.reset()).train(mode)
            source = subject.entry.model().train(mode)
            with guard():
                got = run(emitted, subject.entry, backward=False)
                want = run(source, subject.entry, backward=False)
            where = f"{guard.__name__}, training={mode}"
            yield from (f"{where}: {text}" for text in run_problems(got, want))


def check_state(subject: Subject) -> Iterator[str]:
    """Names, order, ties and flags of parameters and buffers; values as in the source."""
    emitted, source = subject.reset(), subject.entry.model()
    got, want = emitted.state_dict(), source.state_dict()
    if list(got) != list(want):
        yield f"state_dict keys {list(got)} instead of {list(want)}"
    for name in want.keys() & got.keys():
        problem = tensor_problem(got[name], want[name], exact=True)
        if problem:
            yield f"state {name}: {problem}"
    for kind in ("named_parameters", "named_buffers"):
        for doubled in (True, False):
            left = [name for name, _ in getattr(emitted, kind)(remove_duplicate=doubled)]
            right = [name for name, _ in getattr(source, kind)(remove_duplicate=doubled)]
            if left != right:
                yield f"{kind}(remove_duplicate={doubled}): {left} instead of {right}"
    flags = {name: p.requires_grad for name, p in emitted.named_parameters()}
    if flags != {name: p.requires_grad for name, p in source.named_parameters()}:
        yield f"requires_grad flags {flags}"
    paths = {name for name, _ in emitted.named_modules()}
    owners = {name.rpartition(".")[0] for name, _ in source.named_parameters()}
    if owners - paths:
        yield f"named_modules lacks {sorted(owners - paths)}"


def check_load_state_dict(subject: Subject) -> Iterator[str]:
    """Another checkpoint of the source loads and is used, in both directions."""
    other = subject.entry.model()
    with torch.no_grad():
        for value in tensors_of(other, copies=False).values():
            if value.is_floating_point():
                value.mul_(1.125)
    emitted = subject.reset()
    emitted.load_state_dict(copy.deepcopy(other.state_dict()))
    for name, value in other.named_buffers():
        if name not in other.state_dict():
            dict(emitted.named_buffers())[name].copy_(value)
    back = subject.entry.model()
    back.load_state_dict(emitted.state_dict())
    yield from run_problems(subject.run(emitted), subject.run(other))


def _copies(subject: Subject) -> Iterator[tuple[str, Callable[[nn.Module], nn.Module]]]:
    yield "deepcopy", copy.deepcopy
    yield "pickle", lambda module: pickle.loads(pickle.dumps(module))
    yield "torch.save", _through_torch_save
    if subject.load is not None:
        load = subject.load
        yield "save/load", lambda module: _through_file(module, load)
    if subject.recapture is not None:
        again = subject.recapture
        args, kwargs = subject.entry.inputs()
        yield "recapture", lambda module: again(module, args, kwargs)


def _through_torch_save(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _through_file(module: nn.Module, load: Callable[[Path], nn.Module]) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "module.graphopt"
        module.save(path)  # type: ignore[operator]
        return load(path)


def check_copies(subject: Subject) -> Iterator[str]:
    """Every way to copy the module gives equal bits, in both modes, with the state_dict's keys."""
    for name, duplicate in _copies(subject):
        try:
            twin = duplicate(subject.reset())
        except Exception as error:  # the report must say which copy failed, and go on
            yield f"{name}: {type(error).__name__}: {error}"
            continue
        if list(twin.state_dict()) != list(subject.emitted.state_dict()):
            yield f"{name}: state_dict keys differ"
        for mode in (True, False):
            want = subject.run(subject.reset().train(mode))
            if name == "recapture":  # may share its parameters
                subject.reset()
            got = subject.run(twin.train(mode))
            problems = run_problems(got, want, exact=True)
            yield from (f"{name}, training={mode}: {text}" for text in problems)
            with torch.no_grad():
                for key, value in tensors_of(twin, copies=False).items():
                    value.copy_(subject._state[key])


def check_copy_is_independent(subject: Subject) -> Iterator[str]:
    """Training a deep copy leaves the original's parameters and buffers alone."""
    twin = copy.deepcopy(subject.reset())
    with torch.no_grad():
        for value in tensors_of(twin, copies=False).values():
            value.zero_()
    for name, value in tensors_of(subject.emitted).items():
        problem = tensor_problem(value, subject._state[name], exact=True)
        if problem:
            yield f"zeroing a deep copy changed {name}"


def check_inputs(subject: Subject) -> Iterator[str]:
    """Inputs are left alone, or changed as the source changes them."""
    given, taken = (clone_inputs(subject.entry.inputs()) for _ in range(2))
    subject.run(subject.reset(), inputs=given)
    subject.run(subject.entry.model(), inputs=taken)
    leaves = zip(pytree.tree_leaves(given), pytree.tree_leaves(taken), strict=True)
    for index, (a, b) in enumerate(leaves):
        if isinstance(a, Tensor) and not torch.equal(a, b):
            yield f"input {index} was changed"


def check_keyword_call(subject: Subject) -> Iterator[str]:
    """Positional arguments may be given by the names of the source's signature."""
    source = subject.entry.model()
    args, kwargs = subject.entry.inputs()
    if type(source) is nn.Sequential or not args:
        return
    bound = inspect.signature(source.forward).bind(*args, **kwargs)
    if any(p.kind is p.VAR_POSITIONAL for p in bound.signature.parameters.values()):
        return
    named = ((), {**bound.arguments})
    got = subject.run(subject.reset(), inputs=clone_inputs(named))
    want = subject.run(source, inputs=clone_inputs((args, kwargs)))
    yield from run_problems(got, want)


def _aliases(outputs: Any, inputs: Any, module: nn.Module) -> list[tuple[int, str]]:
    """Pairs (output index, what it shares its memory with)."""
    owners: dict[int, str] = {}
    for index, leaf in enumerate(pytree.tree_leaves(inputs)):
        if isinstance(leaf, Tensor):
            owners.setdefault(leaf.untyped_storage().data_ptr(), f"input {index}")
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        owners.setdefault(tensor.untyped_storage().data_ptr(), name)
    found = []
    for index, leaf in enumerate(pytree.tree_leaves(outputs)):
        if isinstance(leaf, Tensor) and leaf.numel():
            pointer = leaf.untyped_storage().data_ptr()
            if pointer in owners:
                found.append((index, owners[pointer]))
            owners.setdefault(pointer, f"output {index}")
    return found


def check_aliases(subject: Subject) -> Iterator[str]:
    """Outputs share memory with inputs, parameters and each other as the source's do."""
    seen = []
    for module in (subject.reset(), subject.entry.model()):
        inputs = clone_inputs(subject.entry.inputs())
        torch.manual_seed(3)
        seen.append(_aliases(module(*inputs[0], **inputs[1]), inputs, module))
    if seen[0] != seen[1]:
        yield f"outputs alias {seen[0]}, the source's {seen[1]}"


def check_optimizer(subject: Subject) -> Iterator[str]:
    """Three steps of SGD with momentum lead to the same parameters."""
    if not subject.trainable or "no_parameters" in subject.entry.tags:
        return
    states = []
    for module in (subject.reset(), subject.entry.model()):
        optimizer = torch.optim.SGD(module.parameters(), lr=1e-3, momentum=0.9)
        torch.manual_seed(5)
        for _ in range(3):
            optimizer.zero_grad()
            args, kwargs = clone_inputs(subject.entry.inputs())
            subject.entry.loss(module(*args, **kwargs)).backward()
            optimizer.step()
        optimizer.zero_grad()
        states.append(tensors_of(module))
    for name, want in states[1].items():
        problem = tensor_problem(states[0][name], want)
        if problem:
            yield f"{name} after three steps: {problem}"


def _count(fired: Counter[str], name: str, _: Tensor) -> None:
    fired[name] += 1


def check_hooks(subject: Subject) -> Iterator[str]:
    """Each parameter's gradient reaches its hooks exactly once a step, as in eager."""
    if not subject.trainable:
        return
    counts: list[dict[str, int]] = []
    for module in (subject.reset(), subject.entry.model()):
        fired: Counter[str] = Counter()
        handles = [
            parameter.register_post_accumulate_grad_hook(partial(_count, fired, name))
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        ]
        subject.run(module)
        for handle in handles:
            handle.remove()
        counts.append(dict(fired))
    if counts[0] != counts[1]:
        yield f"gradient hooks fired {counts[0]}, in eager {counts[1]}"


def check_double_precision(subject: Subject) -> Iterator[str]:
    """``.double()`` works where it works on the source."""

    def convert(module: nn.Module) -> Run | str:
        inputs = pytree.tree_map(
            lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x,
            clone_inputs(subject.entry.inputs()),
        )
        try:
            return subject.run(module.double(), inputs=inputs)
        except (RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"

    want = convert(subject.entry.model())
    if isinstance(want, str):
        return
    got = convert(copy.deepcopy(subject.reset()))
    if isinstance(got, str):
        yield f"fails: {got}"
    else:
        yield from run_problems(got, want)


CHECKS: dict[str, Check] = {
    name.removeprefix("check_"): function
    for name, function in list(globals().items())
    if name.startswith("check_")
}
