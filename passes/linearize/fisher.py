"""Sensitivity without labels: what the outputs lose when a position is replaced.

With a gate h at each position, ``out = h f(x) + (1 - h) r(x)``, the loss changes to second order by
``E[(dL/dh)^2] / 2``: the Fisher information of the gate, for labels drawn from what the model
itself predicts. The score is taken against the replacement r that is really used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from graphopt.ir.aliases import writes_to_values
from graphopt.ir.interpret import Value, interpret
from graphopt.passes.linearize.calibration import Reference, samples_at_once
from graphopt.passes.linearize.distillation import floating, logits_of
from graphopt.passes.linearize.replacements import Kind, Replacement, approximated
from graphopt.passes.linearize.sites import Site, read_by

Damage = dict[Site, dict[Kind, Tensor]]
# Labels drawn for each sample.
_DRAWS = 4


def fisher(
    reference: Reference,
    options: Mapping[Site, Mapping[Kind, Tensor | None]],
    granularity: str,
    seed: int,
    present: Mapping[Site, Replacement] | None = None,
) -> Damage:
    """The damage of every replacement at every group.

    Args:
        reference: The graph and its inputs.
        options: Replacements and their coefficients.
        granularity: ``element``, ``channel`` or ``site``.
        seed: Of the labels.
        present: What some sites have become already; scores are then of going there or back.

    Returns:
        For each site and replacement ``[groups]``, float64.
    """
    generator = torch.Generator().manual_seed(seed)
    zero = torch.zeros((), dtype=torch.float64)
    total: Damage = {site: dict.fromkeys(kinds, zero) for site, kinds in options.items()}
    at_once = samples_at_once(sum(site.per_sample for site in options))
    samples = 0
    for index in range(len(reference.inputs)):
        for part in reference.parts(index, at_once):
            count = max((int(t.shape[0]) for t in part if t.dim()), default=1)
            samples += count
            for site, kind, gate in _gates(reference, part, options, generator, present or {}):
                each = grouped(site, gate, count, granularity)
                total[site][kind] = total[site][kind] + each.double().square().sum(0)
    scale = 2 * samples * _DRAWS
    return {s: {k: v.cpu() / scale for k, v in o.items()} for s, o in total.items()}


def _gates(
    reference: Reference,
    inputs: Sequence[Tensor],
    options: Mapping[Site, Mapping[Kind, Tensor | None]],
    generator: torch.Generator,
    present: Mapping[Site, Replacement],
) -> Any:
    """For each draw, site and replacement ``dL/dh`` at every element."""
    by_node = {site.name: site for site in options}
    seen: dict[Site, tuple[Tensor, Tensor, Tensor]] = {}
    graph = reference.module.graph
    apart = writes_to_values(graph)  # then nothing may see what is written later

    def run(node: fx.Node, value: Value) -> Any:
        exact = reference.run(node, value)
        site = by_node.get(node.name)
        if site is None:
            return exact
        x = value(read_by(node))
        y = present[site].of(x, exact) if site in present else exact
        gate = y if y.requires_grad else y.requires_grad_()
        x, exact = x.detach(), exact.detach()
        seen[site] = (x.clone(), exact.clone(), gate) if apart else (x, exact, gate)
        return gate.clone() if apart else gate

    with torch.enable_grad():
        outputs = floating(interpret(graph, inputs, reference.attribute, run))
        outputs = [each for each in outputs if each.requires_grad]
        if not outputs:
            return
        results = [y for _, _, y in seen.values()]
        for draw in range(_DRAWS):
            loss = _drawn_loss(outputs, generator)
            last = draw == _DRAWS - 1
            found = torch.autograd.grad(loss, results, retain_graph=not last, allow_unused=True)
            for (site, (x, exact, y)), gradient in zip(seen.items(), found, strict=True):
                for kind, coefficients in options[site].items():
                    change = exact - approximated(site, kind, coefficients, x)
                    yield site, kind, torch.zeros_like(y) if gradient is None else gradient * change


def _drawn_loss(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The log-likelihood of labels drawn from the model: classes of logits, else Gaussian noise."""
    logits = logits_of(outputs)
    if logits is not None:
        likely = logits.detach().float().softmax(1).cpu()
        labels = torch.multinomial(likely, 1, generator=generator).squeeze(1)
        return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    outputs = [o for o in outputs if o.dim()] or outputs
    noise = [torch.randn(o.shape, generator=generator).to(o) for o in outputs]
    scales = [o.detach().square().mean().sqrt().clamp_min(1e-12) for o in outputs]
    terms = [(o * n).sum() / s for o, n, s in zip(outputs, noise, scales, strict=True)]
    return torch.stack(terms).sum()


def grouped(site: Site, gate: Tensor, samples: int, granularity: str) -> Tensor:
    """The gate's derivative of each sample and group: ``[samples, groups]``."""
    if site.positions == 1:
        return gate.reshape(samples, -1).sum(1, keepdim=True)
    flat = site.flat(gate)
    by_position = flat.reshape(samples, -1, *flat.shape[1:]).sum((1, 3))
    if granularity == "element":
        return by_position
    if granularity == "site" or site.channel is None:
        return by_position.sum(1, keepdim=True)
    channels = site.channel_of_positions().to(gate.device)
    found = by_position.new_zeros(samples, site.channels)
    return found.index_add_(1, channels, by_position)
