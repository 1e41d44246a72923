"""The zoo itself: its models are what they claim to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils import _pytree as pytree

from tests.zoo import ZOO, ZooModel
from tests.zoo.memory import step_footprint
from tests.zoo.params import zoo_params


def _equal(a: object, b: object) -> bool:
    left, spec_left = pytree.tree_flatten(a)
    right, spec_right = pytree.tree_flatten(b)
    return spec_left == spec_right and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("entry", zoo_params())
def test_models_and_inputs_are_deterministic(entry: ZooModel) -> None:
    """Two builds hold the same parameters and, with one seed, give the same outputs."""
    state = torch.get_rng_state()
    model, args, kwargs = entry()
    again, args_again, kwargs_again = entry()
    assert torch.equal(state, torch.get_rng_state())
    assert _equal(model.state_dict(), again.state_dict())
    assert _equal((args, kwargs), (args_again, kwargs_again))
    torch.manual_seed(7)
    first = model(*args, **kwargs)
    torch.manual_seed(7)
    assert _equal(first, again(*args_again, **kwargs_again))


@pytest.mark.parametrize("entry", zoo_params(without="static_batch"))
def test_models_take_a_second_batch_size(entry: ZooModel) -> None:
    model = copy.deepcopy(entry.model())
    args, kwargs = entry.inputs(entry.second)
    model(*args, **kwargs)


def test_the_zoo_covers_what_is_promised() -> None:
    promised = [
        "mlp",
        "cnn",
        "resnet",
        "unet",
        "lstm",
        "dict_kwargs",
        "tied_weights",
        "moe_dense",
        "moe_sparse",
        "cond",
        "autocast",
        "no_grad_region",
        "bert",
        "gpt2",
        "llama",
        "vit",
        "t5",
        "whisper",
        "mamba",
        "swin",
        "efficientnet_lite0",
        "minilm",
    ]
    assert set(promised) <= set(ZOO)


def test_benchmark_cnn_has_the_published_footprint() -> None:
    """The figures of the comparison that the benchmark repeats."""
    model, args, kwargs = ZOO["cnn"]()
    measured = step_footprint(model, args, kwargs, lambda out: out.sum())
    assert measured.peak == pytest.approx(18_885_512, rel=0.001)
    assert measured.live == 0


@pytest.mark.slow
def test_benchmark_gpt2_has_the_published_footprint() -> None:
    model, args, kwargs = ZOO["gpt2_4"]()
    measured = step_footprint(model, args, kwargs, lambda out: out.loss)
    assert measured.peak == pytest.approx(40_260_744, rel=0.001)


@pytest.mark.slow
def test_real_weights_do_their_job() -> None:
    """EfficientNet names the photographed flower, MiniLM finds the paraphrase."""
    entry = ZOO["efficientnet_lite0"]
    args, kwargs = entry.inputs(2)
    with torch.no_grad():
        classes = entry.model().eval()(*args, **kwargs).argmax(-1).tolist()
    assert classes[1] == 985  # daisy, as scikit-learn's flower.jpg
    entry = ZOO["minilm"]
    args, kwargs = entry.inputs(3)
    with torch.no_grad():
        hidden = entry.model().eval()(*args, **kwargs).last_hidden_state
    mask = kwargs["attention_mask"].unsqueeze(-1)
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = (pooled[0] @ pooled[1]).item(), (pooled[0] @ pooled[2]).item()
    assert near > 0.4
    assert far < 0.2
