"""Capture and emission over the zoo: the emitted module does what the source does."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from tests.zoo import ZOO, ZooModel
from tests.zoo.compare import run, run_problems
from tests.zoo.contract import problems, state_of, state_problems
from tests.zoo.params import zoo_params


def emit(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    """Capture a model and emit it without any pass."""
    return graphopt.capture(model, args, kwargs).emit()


# Long to trace and run; the default tests have others of their kind.
LONG = {
    "dtype_mix",
    "moe_dense",
    "gpt2",
    "unet",
    "whisper",
    "einsum",
    "conv1d_3d",
    "groupnorm",
    "transformer_encoder",
    "sdpa_dropout",
    "t5",
    "multihead_attention",
    "vit",
    "cond",
    "rnn_tanh",
    "transformer",
    "llama",
    "cnn",
    "wide_linear_chain",
    "gru",
}


@pytest.mark.parametrize("entry", zoo_params(slow=LONG))
def test_the_emission_keeps_the_contract(entry: ZooModel) -> None:
    found = problems(entry, emit, load=graphopt.load, recapture=emit)
    assert not found, "\n".join(found)


REFUSED = [pytest.param(z, id=z.name) for z in ZOO.values() if z.refused]


@pytest.mark.parametrize("entry", REFUSED)
def test_what_cannot_be_captured_is_refused_with_the_reason(entry: ZooModel) -> None:
    """The reason matches, the user's line is named where there is one, nothing was touched."""
    model, args, kwargs = entry()
    before = state_of(model)
    with pytest.raises(graphopt.CaptureError, match=entry.refused) as caught:
        graphopt.capture(model, args, kwargs)
    assert caught.value.hint, "the error does not say what to try"
    if type(model).__module__.startswith("tests."):
        assert "zoo" in (caught.value.user_line or "") or entry.name == "keyword_names"
    assert not list(state_problems(before, state_of(model)))


def test_a_fixed_batch_refuses_another() -> None:
    entry = ZOO["constant_batch"]
    model, args, kwargs = entry()
    emitted = emit(model, args, kwargs)
    with pytest.raises(graphopt.GraphoptError, match=r"(?i)size|shape|batch"):
        emitted(torch.randn(8, 6))


def test_a_batch_of_one_serves_other_batches() -> None:
    """Export specialises a batch of 1; capture must not."""
    entry = ZOO["resnet"]
    args, kwargs = entry.inputs(1)
    emitted = emit(entry.model(), args, kwargs)
    for batch in (1, 2, 5):
        args, kwargs = entry.inputs(batch)
        torch.testing.assert_close(
            emitted.eval()(*args, **kwargs), entry.model().eval()(*args, **kwargs)
        )


def test_a_layer_in_eval_mode_at_capture_stays_so() -> None:
    """``model.train()`` puts it back into training mode, as on the source."""
    entry = ZOO["resnet"]
    source = entry.model()
    source.stem[1].eval()
    args, kwargs = entry.inputs()
    emitted = emit(copy.deepcopy(source), args, kwargs)
    assert not list(run_problems(run(emitted, entry), run(source, entry)))
    emitted.train()
    source.train()
    assert not list(run_problems(run(emitted, entry), run(source, entry)))


@pytest.mark.parametrize("name", ["gpt2", "tied_weights", "einsum"])
def test_sequence_can_be_free_too(name: str) -> None:
    entry = ZOO[name]
    model, args, kwargs = entry()
    emitted = graphopt.capture(model, args, kwargs, dynamic="batch,sequence").emit().eval()
    args, kwargs = entry.inputs(3)
    shorter = tuple(a[:, :5] for a in args), {k: v[:, :5] for k, v in kwargs.items()}
    got = emitted(*shorter[0], **shorter[1])
    want = entry.model().eval()(*shorter[0], **shorter[1])
    leaf = (lambda out: out.logits) if "hf" in entry.tags else (lambda out: out)
    torch.testing.assert_close(leaf(got), leaf(want))


@pytest.mark.parametrize("name", ["resnet", "gpt2", "lstm", "llama"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_precisions_run_where_the_source_runs(name: str, dtype: torch.dtype) -> None:
    entry = ZOO[name]
    model, args, kwargs = entry()
    emitted = emit(model, args, kwargs).to(dtype).eval()
    source = entry.model().to(dtype).eval()
    args = tuple(a.to(dtype) if a.is_floating_point() else a for a in args)
    want, got = source(*args, **kwargs), emitted(*args, **kwargs)
    leaf = (lambda out: out.logits) if "hf" in entry.tags else (lambda out: out)
    torch.testing.assert_close(leaf(got), leaf(want))


def test_attributes_of_the_source_are_read_through() -> None:
    model, args, kwargs = ZOO["gpt2"]()
    emitted = emit(model, args, kwargs)
    assert emitted.config.n_layer == 2
    with pytest.raises(AttributeError):
        _ = emitted.no_such_attribute
    with pytest.raises(graphopt.GraphoptError, match="generate"):
        emitted.generate(**kwargs)


def test_hooks_on_inner_modules_are_refused_by_name() -> None:
    model, args, kwargs = ZOO["mlp"]()
    emitted = emit(model, args, kwargs)
    with pytest.raises(graphopt.GraphoptError, match="hook"):
        emitted.get_submodule("fc1").register_forward_hook(lambda *_: None)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param((), id="missing"),
        pytest.param((torch.randn(4, 20), torch.randn(4)), id="too many"),
        pytest.param((torch.randn(4, 21),), id="width"),
        pytest.param((torch.randn(4),), id="rank"),
        pytest.param((torch.zeros(4, 20, dtype=torch.long),), id="dtype"),
        pytest.param(("text",), id="not a tensor"),
    ],
)
def test_inputs_that_do_not_match_are_refused(inputs: tuple[Any, ...]) -> None:
    model, args, kwargs = ZOO["mlp"]()
    emitted = emit(model, args, kwargs)
    with pytest.raises((graphopt.GraphoptError, TypeError, RuntimeError)):
        emitted(*inputs)


def test_a_changed_constant_argument_is_refused() -> None:
    entry = ZOO["non_tensor_arguments"]
    model, args, kwargs = entry()
    emitted = emit(model, args, kwargs)
    with pytest.raises(graphopt.GraphoptError, match=r"(?i)repeats|constant|static"):
        emitted(args[0], 3, **kwargs)


@pytest.mark.parametrize("name", ["mlp", "resnet", "gpt2", "cond", "autocast", "training_branch"])
def test_torch_export_of_an_emission_is_the_forward_program(name: str) -> None:
    entry = ZOO[name]
    model, args, kwargs = entry()
    emitted = emit(model, args, kwargs).eval()
    exported = torch.export.export(emitted, args, kwargs).module()
    got, want = exported(*args, **kwargs), entry.model().eval()(*args, **kwargs)
    leaf = (lambda out: out.logits) if "hf" in entry.tags else (lambda out: out)
    torch.testing.assert_close(leaf(got), leaf(want))
