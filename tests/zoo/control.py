"""Control flow, regions, routing and code that tracing finds awkward."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.zoo.registry import randn, zoo


@zoo(randn(10, 16), name="moe_dense", tags="dropout plan")
class DenseMoE(nn.Module):
    """A mixture of experts: every expert runs, top-2 gates weigh them."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.up = nn.Parameter(torch.randn(experts, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(experts, 32, 16) / 6)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        gates = self.router(x).softmax(-1)
        top, index = gates.topk(2, dim=-1)
        sparse = torch.zeros_like(gates).scatter(-1, index, top / top.sum(-1, keepdim=True))
        hidden = F.gelu(torch.einsum("btd,edh->ebth", x, self.up))
        y = torch.einsum("ebth,ehd->ebtd", hidden, self.down)
        return self.drop(torch.einsum("ebtd,bte->btd", y, sparse)), index


@zoo(randn(10, 16), name="moe_capacity", tags="plan")
class CapacityMoE(nn.Module):
    """Top-1 routing with a fixed capacity: sorted tokens, gather and scatter by index."""

    def __init__(self, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.weight = nn.Parameter(torch.randn(experts, 16, 16) / 4)
        self.experts = experts

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        gates = self.router(flat).softmax(-1)
        top, chosen = gates.max(-1)
        weight = self.weight.index_select(0, chosen)
        y = torch.bmm(flat.unsqueeze(1), weight).squeeze(1) * top.unsqueeze(1)
        return flat.index_add(0, torch.arange(flat.shape[0]), y).reshape(x.shape)


@zoo(
    randn(10, 16),
    name="moe_sparse",
    tags="data_dependent",
    unplannable=r"(?i)data.dependent|dynamic|nonzero|where",
)
class SparseMoE(nn.Module):
    """Token routing by ``torch.where``: the number of rows an expert sees depends on the data."""

    def __init__(self, experts: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(16, experts)
        self.experts = nn.ModuleList([nn.Linear(16, 16) for _ in range(experts)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        gates = self.router(flat).softmax(-1)
        top, chosen = gates.max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == index)
            out = out.index_add(0, rows, expert(flat[rows]) * top[rows].unsqueeze(-1))
        return out.reshape(x.shape)


@zoo(randn(8), name="cond", tags="cond plan")
class Conditional(nn.Module):
    """``torch.cond`` on the data; both branches hold parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.pre = nn.Linear(8, 8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pre(x)
        return torch.cond(y.sum() > 0, lambda t: self.a(t).relu(), lambda t: self.b(t).tanh(), (y,))


@zoo(randn(12), name="autocast", tags="autocast plan")
class AutocastRegion(nn.Module):
    """A bfloat16 autocast region between float32 layers, and a buffer updated in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(12, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = F.relu(self.b(x))
            self.calls.add_(1)
        return self.c(y.float() + x)


@zoo(randn(12), name="no_grad_region", tags="plan")
class NoGradRegion(nn.Module):
    """A target branch under ``no_grad``, as in self-distillation, and a detached gate."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.target = nn.Linear(12, 8), nn.Linear(12, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            goal = F.normalize(self.target(x), dim=-1)
            shifted = self.online(x).mean()
        y = F.normalize(self.head(F.relu(self.online(x))), dim=-1)
        return (y - goal).square().sum(-1) * y.detach().norm() + shifted


@zoo(randn(12), name="user_checkpoint", tags="checkpoint dropout plan")
class UserCheckpoint(nn.Module):
    """A user's own non-reentrant checkpoint around a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 24), nn.Linear(24, 12)
        self.c = nn.Linear(12, 3)

    def _block(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))

    def forward(self, x: Tensor) -> Tensor:
        y = checkpoint(self._block, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return self.c(y + x)


@zoo(randn(10), name="training_branch", tags="eval_branch dropout plan")
class TrainingBranch(nn.Module):
    """A branch on ``self.training`` that switching dropout and BatchNorm cannot express."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(10, 6), nn.Linear(10, 6)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.fc(x))
        if self.training:
            return y + 0.3 * self.aux(x)
        return y.softmax(-1)


@zoo(randn(10), name="noise", tags="dropout random plan")
class GaussianNoise(nn.Module):
    """Random numbers drawn in forward: additive noise and a stochastic mask."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(10, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y + 0.1 * torch.randn_like(y)
        mask = torch.rand_like(y) < 0.8
        return self.b(y * mask) + torch.rand(y.shape[0], 1)


@zoo(
    lambda n: ((torch.randn(n, 8), 2), {"mode": "mean", "flags": [True, 0.5]}),
    name="non_tensor_arguments",
    tags="plan static_arguments",
)
class NonTensorArguments(nn.Module):
    """Integers, strings and lists as arguments steer the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(
        self, x: Tensor, repeats: int, mode: str = "sum", flags: list[object] | None = None
    ) -> Tensor:
        for _ in range(repeats):
            x = torch.tanh(self.fc(x))
        if flags and flags[0]:
            x = x * flags[1]
        return x.mean(-1) if mode == "mean" else x.sum(-1)


@zoo(randn(6), name="data_dependent_if", refused=r"(?i)data.dependent|cond")
class DataDependentIf(nn.Module):
    """A Python ``if`` on a value: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if y.sum() > 0:
            return y * 2
        return y


@zoo(randn(6), name="python_item", refused=r"(?i)data.dependent|item|cond")
class PythonItem(nn.Module):
    """A Python loop whose length is read from a tensor: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.abs().max().item()) + 1):
            x = self.fc(x)
        return x


@zoo(randn(6), name="numpy_roundtrip", refused=r"(?i)numpy|data.dependent|fake")
class NumpyRoundtrip(nn.Module):
    """Activations leave for NumPy and come back: cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().numpy().mean())
        return self.fc(x) * scale


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)  # type: ignore[attr-defined]
        return x * x

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return 20 * x * grad


@zoo(randn(6), name="custom_function", refused=r"(?i)autograd\.?.?function|custom backward|_Square")
class CustomFunction(nn.Module):
    """An ``autograd.Function`` whose backward is not its forward's derivative.

    ``torch.export`` inlines the forward and drops the backward without a word.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return _Square.apply(self.fc(x))
