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


def zennit(task: Task, composite: str) -> Tensor:
    """One of zennit's composites, on layers in a row with BatchNorm folded.

    What is propagated is the target's logit.
    """
    if not isinstance(task.model, nn.Sequential):
        raise UnsupportedError("zennit is asked about layers in a row alone")
    (pixels,) = task.inputs
    box: dict[str, Any] = {}
    if composite == "EpsilonGammaBox":
        shape = (1, pixels.shape[1], 1, 1)
        box = {"low": pixels.min().expand(shape), "high": pixels.max().expand(shape)}
    net = folded(task.model)
    with torch.no_grad():
        out = net(pixels)
    start = torch.zeros_like(out).scatter(1, task.targets[:, None], 1) * out
    return _client().zennit(net, pixels, start, composite=composite, **box)


def lxt(task: Task, rules: str) -> Tensor:
    """LXT on BERT.

    The classifier's logit is the mean over the tokens of a linear function of their states, which
    is `BertForTokenClassification`; relevance is linear in what is propagated, so that it is the
    mean of those of the tokens' logits.
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
    total = torch.zeros(ids.shape)
    for place in range(int(mask.sum(1).max())):
        target = torch.stack([torch.full_like(task.targets, place), task.targets], 1)
        found = asked.explain({"input_ids": ids, "attention_mask": mask}, target)["relevance"]
        total += found.sum(-1) * mask[:, place, None]
    return total / mask.sum(1, keepdim=True)


_COMPOSITES = (
    "EpsilonPlus", "EpsilonPlusFlat", "EpsilonGammaBox", "EpsilonAlpha2Beta1",
    "EpsilonAlpha2Beta1Flat", "ExcitationBackprop",
)  # fmt: skip

PEERS: dict[str, Callable[[Task], Tensor]] = {
    **{f"zennit: {name}": functools.partial(zennit, composite=name) for name in _COMPOSITES},
    "LXT: attnlrp": functools.partial(lxt, rules="attnlrp"),
}
