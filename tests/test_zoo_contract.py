"""The contract checker is itself checked: a copy of the model passes, spoiled copies don't."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZOO
from tests.zoo.contract import problems


def _copy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
    return copy.deepcopy(model)


COPIED = """resnet lstm dict_kwargs tied_weights cond training_branch noise buffer_assign
    none_outputs alias_outputs unused_parameters frozen double_dropout no_parameters constant_batch
    weight_norm"""


@pytest.mark.parametrize("name", COPIED.split())
def test_a_deep_copy_keeps_the_contract(name: str) -> None:
    entry = ZOO[name]
    expected = {"copies"} if entry.tags & {"parametrized"} else set()
    found = problems(entry, _copy)
    assert {text.partition(":")[0] for text in found} <= expected, found


class Spoiled(nn.Module):
    """A model with one fault; it holds the source's tensors under their own names."""

    def __init__(self, source: nn.Module, fault: str) -> None:
        super().__init__()
        self.__dict__["source"] = copy.deepcopy(source)
        self._modules.update(self.source._modules)
        self._parameters.update(self.source._parameters)
        self._buffers.update(self.source._buffers)
        self.fault = fault
        self.training = source.training

    def __deepcopy__(self, memo: dict[int, Any]) -> Spoiled:
        return Spoiled(copy.deepcopy(self.source, memo), self.fault)

    def train(self, mode: bool = True) -> Spoiled:
        self.training = mode
        self.source.train(mode or self.fault == "eval")
        return self

    def forward(self, x: Tensor) -> Tensor:
        out = self.source(x)
        if self.fault == "output":
            return out * (1 + 1e-4)
        if self.fault == "gradient":
            return out.detach() + 1.0001 * (out - out.detach())
        if self.fault == "buffers":
            with torch.no_grad():
                self.source(x)
        if self.fault == "batch" and x.shape[0] != ZOO["resnet"].batch:
            return out.flip(0)
        if self.fault == "input":
            x.mul_(2.0)
        return out


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("output", "training"),
        ("gradient", "training"),
        ("buffers", "training"),
        ("eval", "modes"),
        ("batch", "second_batch"),
        ("input", "inputs"),
    ],
)
def test_a_fault_is_found(fault: str, check: str) -> None:
    found = problems(ZOO["resnet"], lambda model, args, kwargs: Spoiled(model, fault))
    assert any(text.startswith(check) for text in found), found


def test_touching_the_source_is_found() -> None:
    def build(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> nn.Module:
        twin = copy.deepcopy(model)
        model(*args, **kwargs).sum().backward()
        model.train()
        torch.rand(1)
        return twin

    found = "\n".join(problems(ZOO["resnet"], build, checks=()))
    for what in ("gradients", "modes", "rng"):
        assert f"the source's {what} changed" in found
