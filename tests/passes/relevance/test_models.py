"""Every operation of every architecture has a rule, and the ledger adds up."""

from __future__ import annotations

from importlib.metadata import distributions
from typing import Any

import pytest
import torch
from torch import fx
from torch.utils import _pytree as pytree

import graphopt
from tests.passes.relevance.models import MODELS
from tests.zoo import ZOO
from tests.zoo.registry import ZooModel

ALL = {**ZOO, **MODELS}
QUICK = [
    "vgg", "mobilenet_v3", "wavenet", "graph_attention", "hypernet", "spectral", "tables",
    "lstm_projected", "rnn_relu", "moe_dense", "moe_sparse", "cond", "no_grad_region",
    "inplace_chain",
]  # fmt: skip
SLOW = [
    *(name for name in MODELS if name not in QUICK),
    "t5", "whisper", "mamba", "swin", "efficientnet_lite0", "minilm", "lstm", "gru",
    "moe_capacity", "transformer", "multihead_attention", "buffer_update", "inplace_shared_base",
    "batchless_input", "conv1d_3d", "einsum", "fft",
]  # fmt: skip


def checked(entry: ZooModel, composite: str, dtype: torch.dtype) -> None:
    """Explain a model and check its ledger, as a whole and at each operation."""
    missing = set(entry.requires) - {each.name for each in distributions()}
    if missing:
        pytest.skip(f"{', '.join(sorted(missing))} missing")
    model = entry.model().eval().to(dtype)

    def inputs(batch: int) -> Any:
        args, kwargs = entry.inputs(batch)
        return pytree.tree_map(
            lambda t: t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t,
            (args, kwargs),
        )

    args, kwargs = inputs(entry.batch)
    explained: Any = graphopt.explain(model, args, example_kwargs=kwargs, composite=composite)
    single = dtype is torch.float32 or _casts_to_single(explained.plan.graph)
    bar = 1e-6 if single else 1e-12
    assert [each for each in explained.conservation() if not each["residual"] <= bar] == []
    for batch in (entry.batch, entry.second, 1):
        args, kwargs = inputs(batch)
        ledger = dict(explained(*args, **kwargs).ledger)
        output = ledger.pop("output")
        lost = (sum(ledger.values()) - output).abs() / output.abs()
        assert float(lost.max()) <= (1e-5 if single else 1e-10)


def _casts_to_single(graph: fx.Graph) -> bool:
    """Whether a model in double precision rounds on its way, as norms of transformers do."""
    values = [node.meta.get("val") for node in graph.nodes]
    return any(isinstance(v, torch.Tensor) and v.dtype is torch.float32 for v in values)


@pytest.mark.parametrize("name", QUICK)
def test_the_ledger_of_each_operation_adds_up(name: str) -> None:
    checked(ALL[name], "cp-lrp", torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp", "epsilon-plus"])
@pytest.mark.parametrize("name", SLOW)
def test_more_of_them(name: str, composite: str) -> None:
    checked(ALL[name], composite, torch.float64)


@pytest.mark.parametrize("name", ["lstm_projected", "rnn_relu", "gru"])
def test_recurrent_layers_in_single_precision(name: str) -> None:
    checked(ALL[name], "attnlrp", torch.float32)


@pytest.mark.slow
@pytest.mark.parametrize("composite", ["cp-lrp", "attnlrp"])
@pytest.mark.parametrize("name", QUICK + SLOW)
def test_in_single_precision(name: str, composite: str) -> None:
    checked(ALL[name], composite, torch.float32)


def test_shifted_ids_get_the_relevance_of_what_they_were_shifted_from() -> None:
    """A decoder that reads its labels one place later, as T5 does; the start is a parameter."""

    class Shifted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Embedding(9, 3)

        def forward(self, labels: torch.Tensor) -> torch.Tensor:
            ids = labels.new_zeros(labels.shape)
            ids[:, 1:] = labels[:, :-1].clone()
            ids[:, 0] = 8
            return self.table(ids.masked_fill(ids == 5, 7)).cumsum(1)[:, -1]

    model = Shifted().double()
    labels = torch.tensor([[1, 2, 5, 3], [4, 0, 6, 1]])
    explained: Any = graphopt.explain(model, (labels,), target=0)
    result = explained(labels)
    rows = model.table.weight[:, 0].detach()
    # labels that are padding are looked up as another row, but at their own place
    want = torch.stack([rows[[1, 2, 7]], rows[[4, 0, 6]]])
    torch.testing.assert_close(
        result.relevance["labels"][:, :3], want * torch.tensor([[1, 1, 0], [1, 1, 1]])
    )
    torch.testing.assert_close(
        result.ledger["parameters"], rows[8] + torch.stack([rows[7], rows[7] * 0])
    )
    assert float(result.relevance["labels"][:, 3].abs().max()) == 0
