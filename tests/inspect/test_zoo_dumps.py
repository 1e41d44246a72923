"""The dumped Python of every zoo model runs and gives what the model gives, bit for bit."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt import inspect, registry
from graphopt.inspect import diff
from graphopt.ir.capture import capture
from graphopt.pipeline import PassContext
from tests.zoo import ZOO, ZooModel
from tests.zoo.params import zoo_params

SLOW = {"whisper", "t5", "transformer", "bert", "gpt2", "lstm", "gru", "wide_linear_chain"}


def modes(model: nn.Module) -> dict[str, bool]:
    named = model.named_modules(remove_duplicate=False)  # a shared module has several paths
    return {name: module.training for name, module in named}


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {
        name: value.detach().clone().requires_grad_(value.requires_grad)
        for name, value in module.state_dict(keep_vars=True).items()
    }


def called(text: str, function: str, *args: Any) -> Any:
    """What a function of a dumped file gives."""
    scope: dict[str, Any] = {"__name__": "dumped"}
    exec(compile(text, "dump.py", "exec"), scope)
    torch.manual_seed(7)
    return scope[function](*args)


def seeded(module: nn.Module, inputs: Any) -> Any:
    torch.manual_seed(7)
    args, kwargs = inputs
    return module(*args, **kwargs)


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return (
            first.dtype == second.dtype
            and first.shape == second.shape
            and bool(torch.equal(torch.nan_to_num(first), torch.nan_to_num(second)))
        )
    return first == second


def assert_same(found: Any, module: nn.Module, program: Any, inputs: Any, state: Any) -> None:
    """The dump's outputs and the buffers that it left are those of a module."""
    outputs = pytree.tree_leaves(program.signature.flatten_outputs(seeded(module, inputs)))
    assert len(found) == len(outputs)
    assert all(map(equal, found, outputs))
    assert all(equal(state[name], b) for name, b in module.named_buffers() if name in state)


@pytest.mark.parametrize("entry", zoo_params(slow=SLOW))
def test_the_python_of_a_model_gives_what_the_model_gives(entry: ZooModel) -> None:
    inputs = entry.inputs()
    args, kwargs = inputs
    program = capture(entry.model(), args, kwargs)
    flat = program.signature.flatten_inputs(args, kwargs)
    model = entry.model()
    state = state_of(model)
    text = inspect.dump(program, view="program", training=modes(model))
    assert_same(called(text, "forward", state, *flat), model, program, inputs, state)

    model = entry.model().eval()
    signature = program.eval_signature or program.signature
    text = inspect.dump(program, view="program", training=modes(model))
    found = called(text, "forward", state_of(model), *signature.flatten_inputs(args, kwargs))
    outputs = signature.flatten_outputs(seeded(model, inputs))
    assert len(found) == len(outputs)
    assert all(map(equal, found, outputs))

    context = PassContext(args, kwargs, entry.model())
    clean = registry.parse("canonicalize").run(program, context)
    model = entry.model()
    state = state_of(model)
    text = inspect.dump(clean, view="program", training=modes(model))
    assert_same(called(text, "forward", state, *flat), model, clean, inputs, state)

    # The program that was dumped is the same afterwards, and only what was rewritten differs.
    assert not diff(program, program)
    assert bool(diff(program, clean)) == clean.history[-1].changed


SLOWLY = pytest.mark.slow
CHANGED = [
    ("resnet", "canonicalize,prune{flops=60%}"),
    ("resnet", "canonicalize,linearize{relus=50%}"),
    ("mlp", "canonicalize,share"),
    pytest.param("cnn", "canonicalize,prune{params=50%}", marks=SLOWLY),
    pytest.param("vit", "canonicalize,prune{flops=80%}", marks=SLOWLY),
    pytest.param("cnn", "canonicalize,linearize{relus=25%}", marks=SLOWLY),
    pytest.param("resnet", "canonicalize,prune{flops=60%},linearize{relus=50%}", marks=SLOWLY),
    pytest.param("cnn", "canonicalize,share", marks=SLOWLY),
]


@functools.cache
def transformed(name: str, passes: str) -> Any:
    """A zoo model's program after a pipeline, and the inputs."""
    model, args, kwargs = ZOO[name]()
    program = capture(model, args, kwargs)
    context = PassContext(args, kwargs, model, time_limit=2)
    return registry.parse(passes).run(program, context), (args, kwargs)


@pytest.mark.parametrize(("name", "passes"), CHANGED)
@pytest.mark.parametrize("training", [True, False])
def test_the_python_after_passes_gives_what_the_module_gives(
    name: str, passes: str, training: bool
) -> None:
    program, inputs = transformed(name, passes)
    # A planned step runs other kernels; its forward graph is the graph without the plan.
    plain = program.replace(planner=None)
    module = copy.deepcopy(plain.emit()).train(training)
    state = state_of(module)
    flat = program.signature.flatten_inputs(*inputs)
    text = inspect.dump(program, view="program", training=training)
    found = called(text, "forward", state, *flat)
    assert_same(found, module, program, inputs, state)


PLANNED = ["groupnorm", pytest.param("cnn", marks=SLOWLY), pytest.param("unet", marks=SLOWLY)]


@pytest.mark.parametrize("name", PLANNED)
def test_the_python_of_a_plan_that_recomputes_gives_the_module_s_bits(name: str) -> None:
    model, args, kwargs = ZOO[name]()
    module = graphopt.optimize(
        model, "memory=75%", args, example_kwargs=kwargs, time_limit=2, verify=False
    )
    shown = inspect.document(module.program, "plan")
    state = state_of(module)
    text = inspect.dump(module.program, view="plan")
    assert "(recomputed)" in text
    outputs = module.program.signature.flatten_outputs(seeded(module, (args, kwargs)))
    wanted = [outputs[int(slot.name.removeprefix("tangent_"))] for slot in shown.tangents]
    tangents = [torch.rand_like(value) for value in wanted]
    with torch.random.fork_rng():
        torch.autograd.backward(wanted, tangents)
    with torch.no_grad():
        flat = module.program.signature.flatten_inputs(args, kwargs)
        found, gradients = called(text, "step", state, *flat, *tangents)
    assert all(map(equal, found, outputs))
    expected = {n: p.grad for n, p in module.named_parameters()}
    assert expected.keys() <= gradients.keys()
    assert all(equal(gradients[n], grad) for n, grad in expected.items())
    assert all(equal(state[n], b) for n, b in module.named_buffers())
