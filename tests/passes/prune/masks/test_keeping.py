"""Masks that stay: files, copies, other passes, training, other types."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import graphopt
from graphopt import errors
from graphopt.passes.prune.masks import keep_masked, save_masks, semi_structured, sparse_csr


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 32))
    return graphopt.capture(net, (torch.randn(2, 32),)).emit()  # traced once


def masked(model: nn.Module, x: Tensor, text: str) -> graphopt.OptimizedModule:
    return graphopt.optimize(model, passes=f"sparsify{{{text}}}", example_inputs=(x,), verify=False)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[n], other[n]) for n in one)


def test_files_and_copies_keep_masks(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    sparse = masked(model, x, "weights=30%")
    masks = sparse.report.masks()
    sparse.save(tmp_path / "model.gopt")
    loaded = graphopt.load(tmp_path / "model.gopt")
    copies = [loaded, copy.deepcopy(sparse), pickle.loads(pickle.dumps(sparse))]
    for other in copies:
        assert same(other.report.masks(), masks)
        assert torch.equal(other(x), sparse(x))
        assert other.report.to_dict()["sparsify"] == sparse.report.to_dict()["sparsify"]
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(x), sparse(x))


def test_twice_is_once_more(model: nn.Module, x: Tensor) -> None:
    """What is masked stays so; shares are of the weights of the source."""
    once = masked(model, x, "weights=60%,criterion=random")
    twice = masked(once, x, "weights=30%,criterion=magnitude")
    whole = 2 * 32 * 64
    assert twice.report["sparsify"]["weights_after"] == int(0.3 * whole)
    for name, mask in twice.report.masks().items():
        assert not (mask & ~once.report.masks()[name]).any()
    exported = torch.export.export(twice, (x,)).module()
    assert torch.equal(exported(x), twice(x))


def test_a_second_batch_size(model: nn.Module, x: Tensor) -> None:
    sparse = masked(model, x, "weights=30%")
    more = torch.randn(7, 32)
    by_hand = copy.deepcopy(model)
    by_hand.load_state_dict(sparse.state_dict())
    assert torch.equal(sparse(more), by_hand(more))


@pytest.mark.slow
def test_pruned_and_planned_afterwards(model: nn.Module, x: Tensor) -> None:
    sparse = masked(model, x, "weights=50%")
    small = graphopt.optimize(sparse, "params=60%", (x,))
    masks = small.report.masks()
    for name, mask in masks.items():
        weight = small.get_parameter(name)
        assert mask.shape == weight.shape
        assert not weight.detach()[~mask].any()
        assert not mask.all()
    small.load_state_dict(model.state_dict())
    for name, mask in masks.items():
        assert not small.get_parameter(name).detach()[~mask].any()
    planned = graphopt.optimize(model, "weights=50%,memory=95%", (x,))
    assert planned.report["sparsify"]["weights_after"] == 2048
    with pytest.raises(errors.UnsupportedError, match="memory plan"):
        masked(planned, x, "weights=20%")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(model: nn.Module, x: Tensor, dtype: torch.dtype) -> None:
    other = copy.deepcopy(model).to(dtype)
    data = [x.to(dtype)]
    for method in ("global", "layerwise", "icbs"):
        sparse = graphopt.optimize(
            other,
            passes=f"sparsify{{weights=50%,method={method},rounds=1}}",
            example_inputs=(x.to(dtype),),
            data=data,
            loss=lambda y: y.square().mean(),
            verify=False,
        )
        assert sparse.report["sparsify"]["weights_after"] == 2048
        assert sparse(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
    lambda p: torch.optim.AdamW(p, 0.01),
])  # fmt: skip
def test_training_keeps_masks(model: nn.Module, x: Tensor, make: object) -> None:
    sparse = masked(model, x, "weights=30%")
    masks = sparse.report.masks()
    before = {n: p.detach().clone() for n, p in sparse.named_parameters()}
    optimizer = make(sparse.parameters())  # type: ignore[operator]

    def steps() -> None:
        for _ in range(3):
            optimizer.zero_grad()
            F.mse_loss(sparse(x), x).backward()
            optimizer.step()

    def stray() -> int:
        return sum(int((sparse.get_parameter(n)[~m] != 0).sum()) for n, m in masks.items())

    with keep_masked(optimizer, sparse):
        steps()
    assert stray() == 0
    assert all((sparse.get_parameter(n)[m] != before[n][m]).any() for n, m in masks.items())
    steps()  # the hook is gone
    assert stray() > 0


def test_training_what_has_no_masks(model: nn.Module, x: Tensor) -> None:
    sparse = masked(model, x, "weights=30%")
    with pytest.raises(errors.UsageError):
        keep_masked(torch.optim.SGD(model.parameters(), 0.1), sparse)
    plain = graphopt.capture(model, (x,)).emit()
    assert graphopt.optimize(model, passes="canonicalize", example_inputs=(x,)).report.masks() == {}
    for refused in (
        lambda: keep_masked(torch.optim.SGD(plain.parameters(), 0.1), plain),
        lambda: sparse_csr(plain),
        lambda: semi_structured(plain),
    ):
        with pytest.raises(errors.UnsupportedError):
            refused()


def test_a_file_of_masks(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    sparse = masked(model, x, "weights=30%")
    save_masks(sparse, tmp_path / "masks.safetensors")
    assert same(load_file(tmp_path / "masks.safetensors"), sparse.report.masks())


def test_compressed_sparse_rows(model: nn.Module, x: Tensor) -> None:
    sparse = masked(model, x, "weights=30%")
    for name, matrix in sparse_csr(sparse).items():
        weight = sparse.get_parameter(name).detach()
        assert torch.equal(matrix.to_dense(), weight)
        assert matrix.values().numel() == int((weight != 0).sum())
        y = torch.randn(weight.shape[1], 3)
        torch.testing.assert_close(matrix @ y, weight @ y)


class Two(nn.Module):
    """A convolution, and a weight that stands on the right of a product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 2)
        self.right = nn.Parameter(torch.randn(64, 32) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.right[0], self.conv(x).flatten(1).repeat(1, 2), self.right)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_the_size(dtype: torch.dtype) -> None:
    """Values and metadata alone give the masked weight back."""
    torch.manual_seed(0)
    sparse = masked(Two(), torch.randn(2, 16, 2, 2), "pattern=2:4")
    with pytest.raises(errors.UnsupportedError, match="float32"):
        semi_structured(sparse)
    found = semi_structured(sparse.to(dtype))
    assert set(found) == {"conv.weight", "right"}
    for name, compressed in found.items():
        weight = sparse.get_parameter(name).detach()
        order = (0, 2, 3, 1) if name == "conv.weight" else (1, 0)
        matrix = weight.permute(order).flatten(1)
        assert compressed.packed.numel() == matrix.numel() // 2
        assert torch.equal(compressed.to_dense(), matrix)


def test_not_of_the_pattern(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(errors.UnsupportedError, match="more than two"):
        semi_structured(masked(model, x, "weights=60%").half())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_products_on_sparse_tensor_cores() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))
    sparse = masked(model, torch.randn(64, 256), "pattern=2:4").half().cuda()
    y = {256: torch.randn(64, 256), 512: torch.randn(64, 512)}
    for name, compressed in semi_structured(sparse).items():
        weight = sparse.get_parameter(name).detach()
        given = y[weight.shape[1]].half().cuda()
        torch.testing.assert_close(
            F.linear(given, compressed), F.linear(given, weight), rtol=1e-2, atol=1e-2
        )
        assert torch.equal(compressed.to_dense(), weight)
