"""Are zennit and captum run as they are meant to be?  Rules against their textbook forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.peers.client import PeerError, Residual, captum, needs_peers, zennit

EPS = 1e-6  # zennit's own stabiliser, added with the sign of the denominator

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear of tokens": (nn.Linear(6, 5, bias=False), (2, 4, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 4, 3, padding=2, dilation=2, bias=False), (2, 3, 6, 7)),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 3)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 3, 3, stride=2), (2, 4, 5)),
    "conv_transpose2d": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (2, 4, 4, 5),
    ),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 2, 2, dilation=2), (1, 2, 3, 3, 3)),
}


def drawn(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """A layer in double precision, its input, and relevance at its output."""
    layer, shape = LAYERS[name]
    torch.manual_seed(1)
    layer = layer.double().requires_grad_(False)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(shape, dtype=torch.double)
    return layer, x, torch.randn_like(layer(x))


def matrix(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The layer as (outputs, inputs) of one sample, from its values at unit vectors, and its bias.

    The bias is expanded to the outputs.
    """
    zero = layer(torch.zeros_like(x[:1]))
    units = torch.eye(x[0].numel(), dtype=x.dtype).unflatten(1, x.shape[1:])
    return (layer(units) - zero).flatten(1).T, zero.flatten()


def stable(z: Tensor) -> Tensor:
    return z + EPS * torch.where(z >= 0, 1.0, -1.0)


def share(zs: Tensor, bias: Tensor, relevance: Tensor) -> Tensor:
    """Relevance in proportion to contributions (sample, output, input), and those of the bias."""
    return (zs / stable(zs.sum(-1) + bias)[..., None] * relevance[..., None]).sum(1)


def textbook(rule: str, layer: nn.Module, x: Tensor, relevance: Tensor, **options: Any) -> Tensor:
    """The rule, contribution by contribution (Montavon et al. 2019, tables 1 and 2)."""
    w, b = matrix(layer, x)
    r = relevance.flatten(1)
    zs = w * x.flatten(1)[:, None]
    plus, minus = (
        share(zs.clamp(min=0), b.clamp(min=0), r),
        share(zs.clamp(max=0), b.clamp(max=0), r),
    )
    if rule in ("Epsilon", "Norm"):
        found = share(zs, b, r)
    elif rule == "ZPlus":
        found = plus
    elif rule == "AlphaBeta":
        found = options["alpha"] * plus - options["beta"] * minus
    elif rule == "WSquare":
        found = share((w**2).expand_as(zs), b**2, r)
    elif rule == "Flat":
        found = share(connections(layer, x).expand_as(zs), torch.zeros_like(b), r)
    elif rule == "ZBox":
        low, high = options["low"], options["high"]
        found = share(zs - low * w.clamp(min=0) - high * w.clamp(max=0), torch.zeros_like(b), r)
    else:
        z, gamma = zs.sum(-1) + b, options["gamma"]
        up = share(zs + gamma * zs.clamp(min=0), b + gamma * b.clamp(min=0), r * (z > 0))
        found = up + share(zs + gamma * zs.clamp(max=0), b + gamma * b.clamp(max=0), r * (z < 0))
    return found.view_as(x)


def connections(layer: nn.Module, x: Tensor) -> Tensor:
    """1 where an output sees an input."""
    return (matrix(layer, x)[0] != 0).to(x.dtype)


RULES = {
    "Epsilon": {"epsilon": EPS},
    "Norm": {},
    "ZPlus": {},
    "AlphaBeta": {"alpha": 2.0, "beta": 1.0},
    "WSquare": {},
    "Flat": {},
    "ZBox": {"low": -4.0, "high": 4.0},
    "Gamma": {"gamma": 0.5},
}


@needs_peers
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", LAYERS)
def test_zennit_is_the_textbook(name: str, rule: str) -> None:
    layer, x, relevance = drawn(name)
    found = zennit(layer, x, relevance, rule=rule, **RULES[rule])
    expected = textbook(rule, layer, x, relevance, **RULES[rule])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@needs_peers
def test_zennit_passes_on() -> None:
    x, relevance = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(zennit(nn.ReLU(), x, relevance, rule="Pass"), relevance)
    with pytest.raises(PeerError, match="NoSuchRule"):
        zennit(nn.ReLU(), x, relevance, rule="NoSuchRule")


def vgg(dtype: torch.dtype = torch.double) -> tuple[nn.Sequential, Tensor, Tensor]:
    """A small VGG without biases, an image, and the index of its largest output."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(8 * 4, 10, bias=False),
        nn.ReLU(),
        nn.Linear(10, 4, bias=False),
    ).to(dtype)
    net.eval().requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=dtype)
    return net, x, net(x).argmax(1)


def at_target(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The explained outputs, and zero at the others."""
    output = net(x)
    return output * F.one_hot(target, output.shape[1])


COMPOSITES = {
    "EpsilonPlus": {},
    "EpsilonPlusFlat": {},
    "EpsilonAlpha2Beta1": {},
    "EpsilonAlpha2Beta1Flat": {},
    "EpsilonGammaBox": {"low": -4 * torch.ones(1, 3, 1, 1), "high": 4 * torch.ones(1, 3, 1, 1)},
    "ExcitationBackprop": {},
}


@needs_peers
@pytest.mark.parametrize("name", COMPOSITES)
def test_zennit_composites_are_their_rules(name: str) -> None:
    """Layer by layer with the rules that a composite is documented to give."""
    net, x, target = vgg()
    relevance = at_target(net, x, target)
    found = zennit(net, x, relevance, composite=name, **COMPOSITES[name])
    first, conv, dense = {
        "EpsilonPlus": ("ZPlus", "ZPlus", "Epsilon"),
        "EpsilonPlusFlat": ("Flat", "ZPlus", "Epsilon"),
        "EpsilonAlpha2Beta1": ("AlphaBeta", "AlphaBeta", "Epsilon"),
        "EpsilonAlpha2Beta1Flat": ("Flat", "AlphaBeta", "Epsilon"),
        "EpsilonGammaBox": ("ZBox", "Gamma", "Epsilon"),
        "ExcitationBackprop": ("ZPlus", "ZPlus", "ZPlus"),
    }[name]
    values = [x]
    for layer in net:
        values.append(layer(values[-1]))
    for i in reversed(range(len(net))):
        layer, value = net[i], values[i]
        rule = "Norm" if isinstance(layer, nn.AvgPool2d) else None
        if isinstance(layer, nn.Conv2d | nn.Linear):
            rule = first if i == 0 else conv if isinstance(layer, nn.Conv2d) else dense
        if rule is not None:
            options = {"gamma": 0.25} if rule == "Gamma" else RULES[rule]
            relevance = textbook(rule, layer, value, relevance, **options)
        elif not isinstance(layer, nn.ReLU):  # those pass relevance on; routing is its gradient
            _, pull = torch.func.vjp(layer, value)
            (relevance,) = pull(relevance)
    torch.testing.assert_close(found, relevance, rtol=1e-8, atol=1e-10)


@needs_peers
def test_captum_is_gradient_times_input_without_biases() -> None:
    """Bach et al. 2015: so is epsilon-LRP of a ReLU network, in the limit (captum: 1e-9)."""
    net, x, target = vgg()
    found = captum(net, x, target)
    gradient = torch.func.grad(lambda a: at_target(net, a, target).sum())(x)
    torch.testing.assert_close(found, gradient * x, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        found.sum((1, 2, 3)), at_target(net, x, target).sum(1), rtol=1e-5, atol=0
    )


@needs_peers
def test_captum_takes_rules_by_layer() -> None:
    net, x, target = vgg()
    found = captum(net, x, target, {"0": ("Alpha1_Beta0_Rule", {})})
    assert not torch.allclose(found, captum(net, x, target))


@needs_peers
def test_zennit_shares_at_a_sum_of_layers() -> None:
    """Both sides of ``x + W x`` take what they contribute, so that nothing is lost or doubled."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4, bias=False).double()
    net = nn.Sequential(Residual(nn.Sequential(layer)))
    x = torch.randn(3, 4).double()
    output = net(x)
    found = zennit(net, x, output, composite="EpsilonPlus")
    # with relevance = output and no stabiliser the quotient is one everywhere
    torch.testing.assert_close(found, x * (1 + layer.weight.sum(0)), rtol=1e-4, atol=1e-5)
