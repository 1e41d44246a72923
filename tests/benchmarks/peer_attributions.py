"""Attributions by other tools, which run in an environment of their own (`tests.peers`).

A tool that isn't there, or that doesn't know a task's kind of network, is refused with
`UnsupportedError`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from graphopt.errors import UnsupportedError
from tests.benchmarks.faithful_tasks import Task
from tests.benchmarks.keytokens import TextClassifier


def _client() -> Any:
    try:
        client = importlib.import_module("tests.peers.client")
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"the peers aren't there: {error}") from error
    if why := client.missing():
        raise UnsupportedError(why)
    return client


def folded(net: nn.Sequential) -> nn.Sequential:
    """Layers in a row with each BatchNorm folded into the convolution before it."""
    found: list[nn.Module] = []
    for layer in net:
        if isinstance(layer, nn.BatchNorm2d) and isinstance(found[-1], nn.Conv2d):
            found[-1] = fuse_conv_bn_eval(found[-1], layer)
        else:
            found.append(layer)
    return nn.Sequential(*found)


def in_a_row(model: nn.Module) -> nn.Sequential:
    """A network as layers in a row, as far as it can be written so; BatchNorm is folded.

    Raises:
        UnsupportedError: It can't.
    """
    if isinstance(model, nn.Sequential):
        return folded(model)
    if type(model).__name__ == "EfficientNet":
        return _efficientnet(model)
    raise UnsupportedError("zennit and captum are asked about layers in a row alone")


def _padded(conv: Any) -> list[nn.Module]:
    """A convolution with padding of its own kind as a padding and a plain one."""
    plain = nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, tuple(conv.stride),
        groups=conv.groups, bias=conv.bias is not None,
    )  # fmt: skip
    plain.load_state_dict(conv.state_dict())
    padding = conv.static_padding
    plain.eval()
    return [padding, plain] if isinstance(padding, nn.ZeroPad2d) else [plain]


def _efficientnet(model: Any) -> nn.Sequential:
    """An EfficientNet-Lite: no squeeze and excitation, and ReLU6."""
    act = nn.ReLU6()
    row = [*_padded(model._conv_stem), model._bn0, act]
    for block in model._blocks:
        inner: list[nn.Module] = []
        if hasattr(block, "_expand_conv"):
            inner += [*_padded(block._expand_conv), block._bn0, act]
        inner += [*_padded(block._depthwise_conv), block._bn1, act]
        inner += [*_padded(block._project_conv), block._bn2]
        args = block._block_args
        skips = (
            block.id_skip and args.stride in (1, [1]) and args.input_filters == args.output_filters
        )
        row += [_client().Residual(folded(nn.Sequential(*inner)))] if skips else inner
    row += [*_padded(model._conv_head), model._bn1, act]
    row += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), model._fc]
    return folded(nn.Sequential(*row).eval())


def zennit(task: Task, composite: str) -> Tensor:
    """One of zennit's composites, on layers in a row with BatchNorm folded and additions as layers.

    What is propagated is the target's logit.
    """
    net = in_a_row(task.model)
    (pixels,) = task.inputs
    box: dict[str, Any] = {}
    if composite == "EpsilonGammaBox":
        shape = (1, pixels.shape[1], 1, 1)
        box = {"low": pixels.min().expand(shape), "high": pixels.max().expand(shape)}
    with torch.no_grad():
        out = net(pixels)
        torch.testing.assert_close(out, task.model(pixels), rtol=1e-3, atol=1e-3)
    start = torch.zeros_like(out).scatter(1, task.targets[:, None], 1) * out
    return _client().zennit(net, pixels, start, composite=composite, **box)


def captum(task: Task, rule: str | None = None) -> Tensor:
    """Captum's LRP on layers in a row: its epsilon rule, or another one in the convolutions."""
    net = in_a_row(task.model)
    if any(isinstance(layer, _client().Residual | nn.ZeroPad2d) for layer in net):
        raise UnsupportedError("captum has no rule for sums of layers and for padding")
    (pixels,) = task.inputs
    names = [name for name, layer in net.named_children() if isinstance(layer, nn.Conv2d)]
    rules: dict[str, Any] = {name: (rule, {}) for name in names} if rule else {}
    return _client().captum(net, pixels, task.targets, rules)


def lxt(task: Task, rules: str) -> Tensor:
    """LXT on BERT.

    The classifier's logit is the mean over the tokens of a linear function of their states, which
    is `BertForTokenClassification`; the mean of the tokens' logits is what is propagated.
    """
    if not isinstance(task.model, TextClassifier):
        raise UnsupportedError("LXT is asked about text classifiers alone")
    client = _client()
    ids, mask = task.inputs
    names = {"encoder.": "bert.", "head.": "classifier."}
    weights = {}
    for name, value in task.model.state_dict().items():
        old = next(prefix for prefix in names if name.startswith(prefix))
        weights[names[old] + name.removeprefix(old)] = value
    encoder: Any = task.model.encoder
    labels = {str(index): str(index) for index in range(task.model.head.out_features)}
    config = client.config_for_4(encoder.config.to_dict())
    config |= {"id2label": labels, "label2id": labels}
    asked = client.Lxt(
        "bert", "BertForTokenClassification", config, weights, rules, output="logits"
    )
    shares = mask.to(torch.float32) / mask.sum(1, keepdim=True)
    chosen = nn.functional.one_hot(task.targets, task.model.head.out_features)
    target = shares[:, :, None] * chosen[:, None]
    found = asked.explain({"input_ids": ids, "attention_mask": mask}, target)["relevance"]
    return found.sum(-1)


_COMPOSITES = (
    "EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat", "ExcitationBackprop",
)  # fmt: skip

PEERS: dict[str, Callable[[Task], Tensor]] = {
    "captum: epsilon": captum,
    "captum: gamma": functools.partial(captum, rule="GammaRule"),
    **{f"zennit: {name}": functools.partial(zennit, composite=name) for name in _COMPOSITES},
    "LXT: attnlrp": functools.partial(lxt, rules="attnlrp"),
}
