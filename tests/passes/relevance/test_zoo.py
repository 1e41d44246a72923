"""Relevance of the zoo: every operation has a rule, and what arrives is what leaves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graphopt
from tests.zoo import ZOO

MODELS = ["mlp", "cnn", "resnet", "unet", "bert", "bert_eager", "gpt2", "llama", "vit"]


@pytest.mark.parametrize("name", MODELS)
def test_the_ledger_adds_up(name: str) -> None:
    entry = ZOO[name]
    model = entry.model().eval()
    args, kwargs = entry.inputs()
    explained = graphopt.explain(model, args, example_kwargs=kwargs)
    for batch in (entry.batch, entry.second):
        args, kwargs = entry.inputs(batch)
        ledger = dict(explained(*args, **kwargs).ledger)
        output = ledger.pop("output")
        assert output.shape == (batch,)
        torch.testing.assert_close(sum(ledger.values()), output, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "bert", "llama"])
def test_no_operation_loses_anything(name: str) -> None:
    entry = ZOO[name]
    args, kwargs = entry.inputs()
    explained: Any = graphopt.explain(entry.model().eval(), args, example_kwargs=kwargs)
    assert max(each["residual"] for each in explained.conservation()) < 1e-6
