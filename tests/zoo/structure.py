"""Awkward modules: sharing, mutation, aliasing, odd inputs and outputs, frozen parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.zoo.registry import randn, zoo


@zoo(randn(12), name="shared_twice", tags="dropout plan")
class SharedTwice(nn.Module):
    """One block called twice, and once more under a second name."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.2), nn.Tanh())
        self.alias = self.block
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.block(self.block(x))))


@zoo(randn(3, 8, 8), name="shared_batchnorm", tags="batchnorm plan")
class SharedBatchNorm(nn.Module):
    """One BatchNorm called twice in a step: its statistics move twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.bn = nn.BatchNorm2d(6)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.conv1(x)))
        return self.bn(self.conv2(y)).mean((2, 3))


@zoo(randn(16), name="inplace_chain", tags="plan")
class InplaceChain(nn.Module):
    """``relu_``, ``add_``, ``mul_``, slice assignment, writes through views."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y.add_(x).relu_()
        z = self.b(y).mul_(0.5).add_(1.0, alpha=0.1)
        z[:, :4] = y[:, 4:8] * 2
        view = z.view(-1, 4, 4)
        view[:, 0].sub_(1.0)
        view.transpose(1, 2).clamp_(min=-3.0)
        return z.sigmoid_()


@zoo(randn(16), name="inplace_shared_base", tags="plan")
class InplaceSharedBase(nn.Module):
    """An in-place write whose old value is read through an alias afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        left, right = y.chunk(2, dim=1)
        kept = left.clone()
        left = left + right
        y = y.detach().add_(1.0) + y
        return self.b(torch.tanh(left) * kept) + y


@zoo(randn(10), name="weight_norm", tags="plan parametrized")
class Parametrized(nn.Module):
    """Weight and spectral normalisation through ``torch.nn.utils.parametrizations``."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.weight_norm(nn.Linear(10, 12))
        self.b = parametrizations.orthogonal(nn.Linear(12, 12), orthogonal_map="cayley")
        self.c = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.b(torch.relu(self.a(x)))))


@zoo(randn(10), name="spectral_norm", tags="plan parametrized")
class SpectralNorm(nn.Module):
    """Spectral norm: a power iteration updates buffers under ``no_grad`` in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.a = parametrizations.spectral_norm(nn.Linear(10, 12))
        self.c = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.relu(self.a(x)))


class Symmetric(nn.Module):
    """A parametrization of one's own."""

    def forward(self, w: Tensor) -> Tensor:
        return w.triu() + w.triu(1).transpose(-1, -2)


@zoo(randn(6), name="own_parametrization", tags="plan parametrized")
def own_parametrization() -> nn.Module:
    """A linear layer whose weight is kept symmetric."""
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 2))


@zoo(randn(8), name="buffer_update", tags="buffers plan")
class BufferUpdate(nn.Module):
    """Moving averages kept by hand: assignment, ``copy_``, ``lerp_`` and a call counter."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("peak", torch.zeros(8))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("scratch", torch.ones(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        with torch.no_grad():
            self.mean.lerp_(y.mean(0), 0.1)
            self.peak.copy_(torch.maximum(self.peak, y.amax(0)))
            self.calls += 1
        return (y - self.mean) * self.scratch


@zoo(randn(8), name="buffer_assign", tags="buffers")
class BufferAssign(nn.Module):
    """A buffer replaced by assignment in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.state
        self.state = 0.5 * self.state + 0.5 * y.detach().mean(0)
        return y


@zoo(randn(8), name="none_outputs", tags="plan outputs")
class NoneOutputs(nn.Module):
    """Nones, Python numbers and strings among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> tuple[object, ...]:
        return self.fc(x), None, 7, {"name": "logits", "scale": 0.5, "none": None}


@zoo(randn(8), name="integer_outputs", tags="plan outputs")
class IntegerOutputs(nn.Module):
    """Logits with the predicted class, a Boolean mask and a count beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.fc(x)
        return {
            "class": y.argmax(-1),
            "logits": y,
            "positive": y > 0,
            "count": (y > 0).sum(),
            "detached": y.detach().softmax(-1),
        }


@zoo(randn(6), name="alias_outputs", tags="plan outputs alias")
class AliasOutputs(nn.Module):
    """Outputs that are an input, a view of it, a view of another output, a parameter, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.register_buffer("table", torch.arange(6.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return y, x, x[:, :3], y.t(), y, self.table


@zoo(randn(6), name="nested_outputs", tags="plan outputs")
class NestedOutputs(nn.Module):
    """Tuples in lists in dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> object:
        y = torch.relu(self.a(x))
        z = self.b(y)
        return (y, [z, (z.exp(), {"deep": [y * 2]})], {"a": (z.sum(),), "empty": ()})


@zoo(
    lambda n: (({"image": torch.randn(n, 6), "meta": [torch.randn(n, 2), torch.randn(n, 2)]},), {}),
    name="nested_inputs",
    tags="plan",
)
class NestedInputs(nn.Module):
    """A dict of tensors and lists of tensors as the one argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 4), nn.Linear(2, 4)

    def forward(self, batch: dict) -> Tensor:
        return self.a(batch["image"]) * self.b(batch["meta"][0]) + self.b(batch["meta"][1])


@zoo(randn(6), name="unused_parameters", tags="plan unused")
class UnusedParameters(nn.Module):
    """A layer never called, one called for nothing, one frozen, one used by one output alone."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.never, self.dead = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.aux = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.used(x)
        self.dead(x)
        return {"loss": y.square().mean(), "aux": self.aux(y)}


@zoo(randn(3, 8, 8), name="frozen", tags="batchnorm plan frozen")
class FrozenBackbone(nn.Module):
    """A frozen trunk (BatchNorm kept in eval mode by the user) under a trained head."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.middle = nn.Conv2d(6, 6, 3)
        self.head = nn.Linear(6, 2)
        self.trunk.requires_grad_(False)
        self.middle.bias.requires_grad_(False)

    def train(self, mode: bool = True) -> FrozenBackbone:
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.middle(self.trunk(x))).mean((2, 3)))


@zoo(randn(16), name="double_dropout", tags="dropout plan")
class DoubleDropout(nn.Module):
    """Dropout of dropout, of several kinds and rates, on the same value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 4)
        self.drop, self.alpha = nn.Dropout(0.4), nn.AlphaDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.alpha(F.selu(self.fc1(x)))
        y = self.drop(self.drop(y)) + self.drop(y)
        y = F.dropout(y, 0.1, training=True)  # stays on in eval mode
        return self.fc2(F.rrelu(y, training=self.training))


@zoo(randn(5), name="no_parameters", tags="no_parameters", unplannable=r"(?i)trainable|parameter")
class NoParameters(nn.Module):
    """Nothing to train."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x * 2, -1)


@zoo(randn(7), name="dtype_mix", tags="plan dtypes")
class DtypeMix(nn.Module):
    """Casts between float32, float64 and bfloat16, integer arithmetic and Booleans."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(7, 7), nn.Linear(7, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x).to(torch.bfloat16).float()
        buckets = (y * 4).long().clamp(0, 3)
        scale = torch.tensor([0.5, 1.0, 2.0, 4.0])[buckets]
        return self.b((y * scale).double()).float()


@zoo(randn(5, 4), name="parameter_list", tags="plan")
class ParameterLists(nn.Module):
    """ParameterList, ParameterDict and a bare scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.mats = nn.ParameterList([torch.eye(4) * (i + 1) for i in range(3)])
        self.gains = nn.ParameterDict({"left": torch.ones(4), "out_x": torch.ones(4)})
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gains["left"]
        for mat in self.mats:
            x = torch.tanh(x @ mat / self.temperature)
        return x * self.gains["out_x"]


@zoo(
    lambda n: ((torch.randn(n, 6), torch.randn(6, 3)), {}),
    name="batchless_input",
    tags="plan",
)
class BatchlessInput(nn.Module):
    """A second input whose leading dimension is not the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.fc(x @ table)


@zoo(randn(6), name="constant_batch", tags="static_batch plan")
class ConstantBatch(nn.Module):
    """A reshape that fixes the batch: another batch size must be refused, never miscomputed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.reshape(2, 12))


@zoo(randn(6), name="lambda_free_sequential", tags="plan")
def plain_sequential() -> nn.Module:
    """A bare ``nn.Sequential``, whose parameters are called ``0.weight`` and so on."""
    return nn.Sequential(
        nn.Linear(6, 8), nn.GELU(approximate="tanh"), nn.Flatten(), nn.Linear(8, 2)
    )


@zoo(randn(6), name="odd_names", tags="plan")
class OddNames(nn.Module):
    """Submodules and parameters whose names collide with Python, FX or nn.Module words."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("input", nn.Linear(6, 6))
        self.add_module("output", nn.Linear(6, 6))
        self.add_module("self", nn.Linear(6, 6))
        self.add_module("add", nn.Linear(6, 6))
        self.register_parameter("graph_", nn.Parameter(torch.ones(6)))
        self.register_parameter("x", nn.Parameter(torch.ones(6)))

    def forward(self, x: Tensor) -> Tensor:
        y = self.get_submodule("input")(x) * self.graph_
        y = y + self.get_submodule("self")(y) * self.x
        return self.get_submodule("output")(self.get_submodule("add")(y))


@zoo(randn(6), name="keyword_names", refused=r"(?i)keyword|identifier|name|syntax")
class KeywordNames(nn.Module):
    """A submodule named with a Python keyword: the exporter prints code that does not compile."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("class", nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule("class")(x)
