"""What the benchmark asks of graphopt and of the peers, on tiny networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import UnsupportedError
from graphopt.passes.relevance.judging import Removal
from tests.benchmarks import keytokens
from tests.benchmarks.attributions import METHODS, composite
from tests.benchmarks.faithful_tasks import Task
from tests.benchmarks.peer_attributions import in_a_row
from tests.peers.client import needs_peers


def _task(model: nn.Module, x: Tensor, targets: Tensor, **options: Any) -> Task:
    return Task("tiny", model.eval(), (x,), targets, Removal(), **options)


def _linear(chunk: int) -> Task:
    torch.manual_seed(0)
    targets = torch.tensor([2, 0, 1, 1, 0, 2, 1])
    return _task(nn.Linear(4, 3), torch.randn(7, 4), targets=targets, chunk=chunk)


@pytest.mark.parametrize("chunk", [3, 7, 1])
@pytest.mark.parametrize("name", ["cp-lrp", "lrp-0", "gradient-x-input"])
def test_a_linear_layers_relevance_is_weight_times_input(name: str, chunk: int) -> None:
    """Each sample is explained for its own target; the last chunk may be of one sample."""
    task = _linear(chunk)
    layer: Any = task.model
    (x,) = task.inputs
    torch.testing.assert_close(composite(name)(task), layer.weight[task.targets] * x)


def test_a_model_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[nn.Module] = []
    capture = graphopt.capture

    def counted(model: nn.Module, *args: Any) -> Any:
        calls.append(model)
        return capture(model, *args)

    monkeypatch.setattr(graphopt, "capture", counted)
    task = _linear(2)
    for name in ("cp-lrp", "gradient-x-input"):
        composite(name)(task)
    assert calls == [task.model]


def test_epsilon_gamma_favours_positive_weights_of_convolutions() -> None:
    """``R_i = x_i (w + w+ / 4) R / z'`` for positive inputs and a positive result."""
    torch.manual_seed(0)
    conv = nn.Conv2d(2, 1, 3, bias=False)
    conv.weight.data.add_(0.1)
    x = torch.rand(5, 2, 3, 3) + 0.1
    model = nn.Sequential(conv, nn.Flatten())
    task = _task(model, x, targets=torch.zeros(len(x), dtype=torch.int64))
    z = model(x)[:, :, None, None].detach()
    assert bool((z > 0).all())
    weight = conv.weight.detach()
    assert bool((weight < 0).any())
    parts = x * (weight + 0.25 * weight.clamp(min=0))
    expected = parts / parts.sum((1, 2, 3), keepdim=True) * z
    torch.testing.assert_close(composite("epsilon-gamma")(task), expected)
    assert not torch.allclose(composite("epsilon")(task), expected, rtol=0.01)


@pytest.fixture(scope="module")
def tokens() -> Task:
    """A BERT that isn't trained, with attention and activations that do something."""
    torch.manual_seed(0)
    model = keytokens.network()
    ids, mask, _, _ = keytokens.sequences(4, seed=0)
    return Task(
        "tiny", model.eval(), (ids, mask), torch.tensor([0, 3, 1, 1]),
        Removal(baseline=keytokens.MASK, allowed=mask), chunk=3,
        embedding="encoder.embeddings.word_embeddings",
    )  # fmt: skip


def test_tokens_have_gradient_times_embedding(tokens: Task) -> None:
    found, expected = (METHODS[n](tokens) for n in ("ours: gradient-x-input", "gradient x input"))
    assert found.shape == tokens.inputs[0].shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@needs_peers
def test_lxt_gives_the_same_in_one_request(tokens: Task) -> None:
    """The logit is a mean over tokens, so all of them are asked about at once."""
    found = METHODS["LXT: attnlrp"](tokens)
    expected = METHODS["ours: attnlrp"](tokens)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_networks_that_are_no_row_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="in a row"):
        in_a_row(nn.Bilinear(2, 2, 2))


@needs_peers
@pytest.mark.parametrize("name", ["zennit: EpsilonPlus", "captum: epsilon"])
def test_text_is_refused_by_the_tools_for_layers_in_a_row(name: str, tokens: Task) -> None:
    with pytest.raises(UnsupportedError, match="in a row"):
        METHODS[name](tokens)
