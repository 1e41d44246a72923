"""Small models of many kinds, with random parameters and buffers, that pruning is tried on.

``MODELS[name](batch)`` gives ``(model, args)``: nothing in a model is zero or one by
initialisation, running variances are positive, and the model is in eval mode.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import ZOO

Sample = Callable[[int], Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        factory: Makes the model.
        sample: Makes inputs of a batch size.
        hf: Whether it needs the transformers library.
    """

    factory: Callable[[], nn.Module]
    sample: Sample
    hf: bool = False

    def __call__(self, batch: int = 2) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The model and its arguments, the same every time."""
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = self.factory().eval()
            randomise(model)
            inputs = self.sample(batch)
        return model, inputs if isinstance(inputs, tuple) else (inputs,)


MODELS: dict[str, Kind] = {}


def kind(name: str, sample: Sample, **fields: Any) -> Callable[[Any], Any]:
    """Declare a model: decorates a class or a factory."""

    def declare(factory: Any) -> Any:
        assert name not in MODELS
        MODELS[name] = Kind(factory, sample, **fields)
        return factory

    return declare


def randomise(model: nn.Module, scale: float = 0.3) -> None:
    """Give all parameters and buffers random values; variances are positive."""
    named = [*model.named_parameters(), *model.named_buffers()]
    with torch.no_grad():
        for name, tensor in named:
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("inv_freq"):
                tensor.uniform_(0.1, 1)
            else:
                tensor.normal_(0, scale)


def randn(*shape: int) -> Sample:
    """A sampler of normal tensors of shape ``(batch, *shape)``."""
    return lambda batch: torch.randn(batch, *shape)


def ids(length: int, vocabulary: int) -> Sample:
    """A sampler of token ids."""
    return lambda batch: torch.randint(1, vocabulary, (batch, length))


def conv_bn(a: int, b: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, and BatchNorm."""
    conv = nn.Conv2d(a, b, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    return nn.Sequential(*layers[:-1])


# Convolutional networks


class Basic(nn.Module):
    """A ResNet block with a projection where the width changes."""

    def __init__(self, a: int, b: int, stride: int = 1, groups: int = 1, mid: int = 0) -> None:
        super().__init__()
        mid = mid or b
        self.one, self.two = conv_bn(a, mid, 3, stride), conv_bn(mid, b, groups=groups)
        self.skip = nn.Identity() if a == b and stride == 1 else conv_bn(a, b, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.two(F.relu_(self.one(x))))


def classifier(*body: nn.Module, width: int, classes: int = 5) -> nn.Sequential:
    """A body of convolutions, global pooling, a head."""
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(*body, *pool)


@kind("resnet18", randn(3, 16, 16))
def resnet18() -> nn.Module:
    return classifier(
        conv_bn(3, 16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1),
        Basic(16, 16), Basic(16, 32, 2), Basic(32, 32), Basic(32, 64, 2), width=64,
    )  # fmt: skip


@kind("resnext", randn(3, 12, 12))
def resnext() -> nn.Module:
    return classifier(
        conv_bn(3, 16), nn.ReLU(), Basic(16, 32, 1, 8, 32), Basic(32, 32, 2, 4, 16), width=32
    )


class Dense(nn.Module):
    """A dense block: each layer sees all outputs before it."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(width + i * growth), nn.ReLU(), conv_bn(width + i * growth, growth)
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(layer(torch.cat(seen, 1)))
        return torch.cat(seen, 1)


@kind("densenet", randn(3, 12, 12))
def densenet() -> nn.Module:
    return classifier(
        nn.Conv2d(3, 16, 3, padding=1), Dense(16, 8, 3), nn.BatchNorm2d(40), nn.ReLU(),
        nn.Conv2d(40, 20, 1, bias=False), nn.AvgPool2d(2), Dense(20, 8, 2), width=36,
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    """Gates channels by their means."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.up(F.silu(self.down(s))))


class Inverted(nn.Module):
    """An inverted residual: expansion, depthwise convolution, projection."""

    def __init__(self, a: int, b: int, k: int, act: type[nn.Module], excite: int = 0) -> None:
        super().__init__()
        inner = 4 * a
        self.body = nn.Sequential(
            conv_bn(a, inner, 1), act(), conv_bn(inner, inner, k, groups=inner), act(),
            SqueezeExcite(inner, excite) if excite else nn.Identity(), conv_bn(inner, b, 1),
        )  # fmt: skip
        self.residual = a == b

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


@kind("mobilenet_v2", randn(3, 12, 12))
def mobilenet_v2() -> nn.Module:
    return classifier(
        conv_bn(3, 8, stride=2), nn.ReLU6(), Inverted(8, 8, 3, nn.ReLU6),
        Inverted(8, 16, 3, nn.ReLU6), Inverted(16, 16, 3, nn.ReLU6), width=16,
    )  # fmt: skip


@kind("efficientnet", randn(3, 12, 12))
def efficientnet() -> nn.Module:
    return classifier(
        conv_bn(3, 8, stride=2), nn.SiLU(), Inverted(8, 8, 5, nn.SiLU, 4),
        Inverted(8, 16, 3, nn.SiLU, 6), conv_bn(16, 32, 1), nn.SiLU(), width=32,
    )  # fmt: skip


class Shuffled(nn.Module):
    """ShuffleNetV2's block: one half goes through, and channels are shuffled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, 1), nn.ReLU(), conv_bn(half, half, groups=half),
            conv_bn(half, half, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        y = torch.cat([a, self.branch(b)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w)


@kind("shufflenet_v2", randn(3, 8, 8))
def shufflenet_v2() -> nn.Module:
    return classifier(
        conv_bn(3, 16), nn.ReLU(), Shuffled(16), Shuffled(16), conv_bn(16, 24, 1), nn.ReLU(),
        width=24,
    )  # fmt: skip


class GroupsShuffled(nn.Module):
    """Grouped convolutions with the channel-shuffle operator between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Linear(24, 4)
        self.one = nn.Conv2d(16, 32, 3, padding=1, groups=2)
        self.two = nn.Conv2d(32, 24, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.channel_shuffle(F.relu(self.one(self.stem(x))), 2)
        return self.head(F.relu(self.two(y)).mean((-2, -1)))


kind("group_channel_shuffle", randn(3, 8, 8))(GroupsShuffled)


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, LayerNorm over channels last, layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depth = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm, self.body = nn.LayerNorm(width, 1e-6), mlp(width, 4 * width, width)
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.body(self.norm(self.depth(x).permute(0, 2, 3, 1)))
        return x + y.permute(0, 3, 1, 2)


@kind("convnext", randn(3, 16, 16))
def convnext() -> nn.Module:
    return classifier(nn.Conv2d(3, 16, 4, 4), ConvNeXtBlock(16), ConvNeXtBlock(16), width=16)


class UNet(nn.Module):
    """Two levels; skip connections are concatenated."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        block = lambda a, b: nn.Sequential(nn.Conv2d(a, b, 3, padding=1), norm(b), nn.ReLU())  # noqa: E731
        self.one, self.two, self.mid = block(3, 8), block(8, 16), block(16, 32)
        self.up2, self.up1 = nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 4, 2, 1)
        self.dec2, self.dec1, self.head = block(32, 16), block(16, 8), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.one(x)
        b = self.two(F.max_pool2d(a, 2))
        y = self.up2(self.mid(F.avg_pool2d(b, 2)))
        y = self.dec2(torch.cat([b, y], 1))
        return self.head(self.dec1(torch.cat((self.up1(y), a), dim=1)))


kind("unet_batchnorm", randn(3, 12, 12))(lambda: UNet(nn.BatchNorm2d))
kind("unet_groupnorm", randn(3, 12, 12))(lambda: UNet(lambda n: nn.GroupNorm(4, n)))
kind("unet_instancenorm", randn(3, 12, 12))(
    lambda: UNet(lambda n: nn.InstanceNorm2d(n, affine=True))
)


@kind("vgg", randn(3, 12, 12))
def vgg() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(24 * 9, 48), nn.ReLU(), nn.Dropout(), nn.Linear(48, 6),
    )  # fmt: skip


class Decoder(nn.Module):
    """A latent vector becomes an image by a view and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 32 * 16)
        self.body = nn.Sequential(
            nn.BatchNorm2d(32), nn.ReLU(), nn.ConvTranspose2d(32, 16, 4, 2, 1), nn.BatchNorm2d(16),
            nn.LeakyReLU(0.2), nn.ConvTranspose2d(16, 3, 4, 2, 1, bias=False), nn.Tanh(),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.first(z).view(-1, 32, 4, 4))


kind("decoder", randn(10))(Decoder)


@kind("super_resolution", randn(3, 8, 8))
def super_resolution() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.PReLU(24), nn.Conv2d(24, 64, 3, padding=1),
        nn.PixelShuffle(2), nn.PReLU(), nn.Conv2d(16, 12, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


class OptionA(nn.Module):
    """ResNet's parameter-free shortcut: a strided slice, and channels of zeros."""

    def __init__(self, a: int, b: int) -> None:
        super().__init__()
        self.one, self.two, self.add = conv_bn(a, b, 3, 2), conv_bn(b, b), (b - a) // 2

    def forward(self, x: Tensor) -> Tensor:
        skip = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.add, self.add), "constant", 0)
        return F.relu(self.two(F.relu(self.one(x))) + skip)


@kind("resnet_option_a", randn(3, 12, 12))
def resnet_option_a() -> nn.Module:
    return classifier(
        conv_bn(3, 8), nn.ReLU(), Basic(8, 8), OptionA(8, 16), OptionA(16, 32), width=32
    )


class Temporal(nn.Module):
    """Dilated causal 1-D convolutions with gated units and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv1d(4, 16, 1), nn.Conv1d(16, 3, 1)
        self.body = nn.ModuleList(nn.Conv1d(16, 32, 2, dilation=2**i) for i in range(3))
        self.mix = nn.ModuleList(nn.Conv1d(16, 16, 1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, (body, mix) in enumerate(zip(self.body, self.mix, strict=True)):
            value, gate = body(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            x = x + mix(value.tanh() * gate.sigmoid())
        return self.head(F.relu(x))


kind("conv1d_dilated", randn(4, 20))(Temporal)


@kind("conv3d", randn(2, 6, 8, 8))
def conv3d() -> nn.Module:
    return nn.Sequential(
        nn.Conv3d(2, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ELU(), nn.MaxPool3d(2),
        nn.Conv3d(12, 24, (1, 3, 3), groups=3), nn.Hardswish(), nn.AdaptiveAvgPool3d(1),
        nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


class ChannelAttention(nn.Module):
    """Attention maps of the mean and the maximum over channels, and over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 16, 3)
        self.gate, self.map = mlp(24, 12, 24), nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.mish(self.one(x))
        y = (
            y
            * torch.sigmoid(self.gate(y.mean((2, 3))) + self.gate(y.amax((2, 3))))[..., None, None]
        )
        y = y * torch.sigmoid(self.map(y.mean(1, keepdim=True)))
        return self.two(y)


kind("channel_attention", randn(3, 8, 8))(ChannelAttention)


class Masked(nn.Module):
    """A mask of one channel multiplies all."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 16), (16, 32), (32, 4))
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.relu(self.one(x)) * mask
        return self.three(self.two(y).masked_fill(mask < 0.5, 0.0))


kind("mask_multiply", lambda n: (torch.randn(n, 3, 8, 8), torch.rand(n, 1, 8, 8)))(Masked)


class Siamese(nn.Module):
    """One encoder for both inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(conv_bn(3, 16), nn.ReLU(), conv_bn(16, 32, stride=2))
        self.head = nn.Linear(64, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        a, b = self.encoder(a).mean((2, 3)), self.encoder(b).mean((2, 3))
        return self.head(torch.cat([(a - b).abs(), a * b], -1))


kind("shared_module", lambda n: tuple(torch.randn(2, n, 3, 8, 8)))(Siamese)


class Looped(nn.Module):
    """One residual block run three times."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 3)
        self.block = nn.Sequential(nn.LayerNorm(32), *mlp(32, 64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = x + self.block(x)
        return self.head(x)


kind("block_looped", randn(8))(Looped)


class TwoOutputs(nn.Module):
    """Logits, and the features that they come from as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.box = mlp(12, 48, 32), mlp(32, 24, 4)
        self.classes = nn.Linear(32, 6)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.trunk(x))
        return {"box": self.box(h), "classes": self.classes(h).log_softmax(-1)}


kind("two_outputs", randn(12))(TwoOutputs)


# Parameters used in uncommon ways


class Bare(nn.Module):
    """Parameters without layers: F.linear, matmul from both sides, addmm, a scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.empty(32, 10)), nn.Parameter(torch.empty(32, 24))
        self.c, self.d = nn.Parameter(torch.empty(40, 24)), nn.Parameter(torch.empty(40, 5))
        self.bias, self.scale = nn.Parameter(torch.empty(24)), nn.Parameter(torch.empty(1, 40))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(F.linear(x, self.a))
        y = torch.addmm(self.bias, y, self.b).relu()
        y = (self.c @ y.t()).t() * self.scale
        return y @ self.d


kind("bare_parameters", randn(10))(Bare)


class Slices(nn.Module):
    """Parts of a layer's output go different ways, and come together in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.mid, self.down = nn.Linear(10, 64), nn.Linear(32, 16), nn.Linear(48, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x)
        left, right = y[:, :32], y[:, 32:]
        return self.down(torch.cat([right.sigmoid(), F.relu(self.mid(left))], dim=-1))


kind("slices", randn(10))(Slices)


class TiedAutoencoder(nn.Module):
    """The decoder is the encoder's transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(20, 48), nn.Linear(48, 16)
        self.biases = nn.ParameterList([torch.empty(48), torch.empty(20)])

    def forward(self, x: Tensor) -> Tensor:
        z = self.two(torch.tanh(self.one(x)))
        y = torch.tanh(F.linear(z, self.two.weight.t(), self.biases[0]))
        return F.linear(y, self.one.weight.t(), self.biases[1])


kind("tied_autoencoder", randn(20))(TiedAutoencoder)


class SoftExperts(nn.Module):
    """Every expert computes, and a softmax weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = nn.Linear(8, 24), nn.Linear(24, 4), nn.Linear(24, 3)
        self.experts = nn.ModuleList(mlp(24, 32, 24) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        weights = self.router(h).softmax(-1)
        mixed = torch.stack([expert(h) for expert in self.experts], dim=-2)
        return self.head(h + (weights.unsqueeze(-1) * mixed).sum(-2))


kind("soft_experts", randn(5, 8))(SoftExperts)


class BatchedExperts(nn.Module):
    """Experts as one parameter of three axes, by bmm and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.head = nn.Linear(16, 4), nn.Linear(16, 3)
        self.up, self.down = (
            nn.Parameter(torch.empty(4, 16, 40)), nn.Parameter(torch.empty(4, 40, 16))
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        h = torch.bmm(x.unsqueeze(0).expand(4, -1, -1), self.up)
        y = torch.bmm(F.gelu(h), self.down)
        return self.head(torch.einsum("end,ne->nd", y, self.router(x).softmax(-1)))


kind("batched_experts", randn(16))(BatchedExperts)


# Gates, mixers, recurrences


class ChunkGLU(nn.Module):
    """Gated units by chunk, then by F.glu."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Linear(10, 64), nn.Linear(32, 48), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.one(x).chunk(2, dim=-1)
        return self.head(F.glu(self.two(value * F.gelu(gate)), dim=-1))


kind("glu_chunk", randn(10))(ChunkGLU)


class ConvGLU(nn.Module):
    """F.glu over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(16, 48, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(48), nn.Conv2d(24, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.glu(self.norm(self.two(F.glu(self.one(x), 1))), 1))


kind("glu_conv", randn(3, 8, 8))(ConvGLU)


class RMSNorm(nn.Module):
    """Root-mean-square norm written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class GatedMLP(nn.Module):
    """Pre-norm residual blocks with a gated MLP; one norm is PyTorch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, 32), nn.Linear(32, 4, bias=False)
        self.norms = nn.ModuleList([RMSNorm(32), nn.RMSNorm(32), RMSNorm(32)])
        self.gates = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2))
        self.ups = nn.ModuleList(nn.Linear(32, 48, bias=False) for _ in range(2))
        self.downs = nn.ModuleList(nn.Linear(48, 32, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i in range(2):
            h = self.norms[i](x)
            x = x + self.downs[i](F.silu(self.gates[i](h)) * self.ups[i](h))
        return self.head(self.norms[2](x))


kind("gated_mlp", randn(6, 8))(GatedMLP)


class Mixer(nn.Module):
    """MLP-Mixer: MLPs over tokens and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 24, 4, 4), nn.Linear(24, 5)
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(5))
        self.tokens = nn.ModuleList(mlp(16, 32, 16) for _ in range(2))
        self.channels = nn.ModuleList(mlp(24, 48, 24) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for i in range(2):
            x = x + self.tokens[i](self.norms[2 * i](x).transpose(1, 2)).transpose(1, 2)
            x = x + self.channels[i](self.norms[2 * i + 1](x))
        return self.head(self.norms[4](x).mean(1))


kind("mlp_mixer", randn(3, 16, 16))(Mixer)


class Recurrent(nn.Module):
    """Embedding, a recurrent network, the last step's state."""

    def __init__(self, cell: type[nn.Module], layers: int, both: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.rnn = cell(16, 24, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(48 if both else 24, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0][:, -1])


kind("lstm", ids(7, 30))(lambda: Recurrent(nn.LSTM, 1, False))
kind("gru", ids(7, 30))(lambda: Recurrent(nn.GRU, 2, False))
kind("lstm_bidirectional", ids(7, 30))(lambda: Recurrent(nn.LSTM, 2, True))


class TextClassifier(nn.Module):
    """Embeddings, the mean of those that are no padding, an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body = nn.Embedding(40, 32, padding_idx=0), mlp(32, 48, 3)

    def forward(self, ids: Tensor) -> Tensor:
        valid = (ids != 3).unsqueeze(-1).to(self.embed.weight.dtype)
        return self.body((self.embed(ids) * valid).sum(1) / valid.sum(1).clamp(min=1))


kind("text_mean", ids(9, 40))(TextClassifier)


# Attention


class Block(nn.Module):
    """A pre-norm transformer block around some attention."""

    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.body = attention, mlp(width, 2 * width, width)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = x + self.attention(self.one(x), *more)
        return x + self.body(self.two(x))


class Stack(nn.Module):
    """A linear stem, learned positions, two blocks, a norm, a head."""

    def __init__(
        self, attention: Callable[[], nn.Module], width: int = 32, length: int = 6
    ) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(8, width), nn.Linear(width, 4)
        self.position = nn.Parameter(torch.empty(length + 2, width))
        self.blocks = nn.ModuleList(Block(width, attention()) for _ in range(2))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.position[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class SelfMHA(nn.Module):
    """PyTorch's own attention, of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class ViT(nn.Module):
    """Patches, a class token, position embeddings, PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.head = nn.Conv2d(3, 32, 4, 4), nn.Linear(32, 5)
        self.token, self.position = (nn.Parameter(torch.empty(1, n, 32)) for n in (1, 10))
        self.blocks = nn.Sequential(*(Block(32, SelfMHA(32, 4)) for _ in range(2)))
        self.norm = nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


kind("vit_own", randn(3, 12, 12))(ViT)


class FusedQKV(nn.Module):
    """One projection for queries, keys and values; heads by view, permute and unbind."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.qkv, self.out, self.heads = nn.Linear(width, 3 * width), nn.Linear(width, width), heads

    def forward(self, x: Tensor) -> Tensor:
        b, t, w = x.shape
        q, k, v = (
            self.qkv(x).view(b, t, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, w))


kind("attention_fused", randn(6, 8))(lambda: Stack(FusedQKV))


class LiteralSizes(nn.Module):
    """Attention whose views hold numbers, its softmax written out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(-1, 6, 4, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (q @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).contiguous().view(-1, 6, 32))


kind("attention_literal", randn(6, 8))(lambda: Stack(LiteralSizes))


class EinsumAttention(nn.Module):
    """Attention by einsum over projections of three axes."""

    def __init__(self, width: int = 32, heads: int = 4, each: int = 8) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.empty(width, heads, each)) for _ in range(3))
        self.out = nn.Parameter(torch.empty(heads, each, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,dhe->bhte", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhte,bhse->bhts", q, k).mul(8**-0.5).softmax(-1)
        return torch.einsum("bhts,bhse,hed->btd", weights, v, self.out)


kind("attention_einsum", randn(6, 8))(lambda: Stack(EinsumAttention))


class RotaryAttention(nn.Module):
    """Rotary positions over interleaved pairs."""

    def __init__(self, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.heads = heads
        self.register_buffer("angles", torch.empty(8, width // heads // 2))

    def turned(self, x: Tensor) -> Tensor:
        a, b, angles = x[..., ::2], x[..., 1::2], self.angles[: x.shape[-2]]
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


kind("attention_rotary", randn(6, 8))(lambda: Stack(RotaryAttention))


class Perceiver(nn.Module):
    """Learned queries attend to the inputs, of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.empty(1, 5, 24))
        self.stem, self.head = nn.Linear(8, 40), nn.Linear(24, 3)
        self.cross = nn.MultiheadAttention(24, 3, kdim=40, vdim=40, batch_first=True)
        self.norm, self.body = nn.LayerNorm(24), mlp(24, 48, 24)

    def forward(self, x: Tensor) -> Tensor:
        h, q = F.gelu(self.stem(x)), self.latent.expand(x.shape[0], -1, -1)
        q = q + self.cross(q, h, h, need_weights=False)[0]
        return self.head((q + self.body(self.norm(q))).mean(1))


kind("cross_attention", randn(7, 8))(Perceiver)


class Decoding(nn.Module):
    """A decoder layer of PyTorch: self-attention with a causal mask, cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.context, self.head = nn.Linear(8, 32), nn.Linear(6, 32), nn.Linear(32, 3)
        self.layer = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True, norm_first=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        y = self.layer(self.stem(x), self.context(context), tgt_mask=mask, tgt_is_causal=True)
        return self.head(y)


kind("decoder_layer", lambda n: (torch.randn(n, 5, 8), torch.randn(n, 7, 6)))(Decoding)


class Positions(nn.Module):
    """Tables of token, position and segment embeddings, added and normalised after."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(40, 32), nn.Embedding(12, 32)
        self.segments = nn.Parameter(torch.empty(2, 32))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 40)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.positions(where) + self.segments[(where > 3).long()]
        return self.head(self.layer(self.norm(x)))


kind("position_tables", ids(8, 40))(Positions)


# Models of the transformers library


class Logits(nn.Module):
    """A model of the zoo that takes its inputs by place, and gives its logits alone."""

    def __init__(self, name: str, inputs: Sequence[str], **fixed: Any) -> None:
        super().__init__()
        self.model, self.inputs, self.fixed = ZOO[name].model(), inputs, fixed

    def forward(self, *args: Tensor) -> Tensor:
        given = dict(zip(self.inputs, args, strict=True))
        return self.model(**given, **self.fixed, return_dict=True).logits


def padded(length: int) -> Sample:
    """Token ids with a mask of which the last two are padding."""

    def sample(batch: int) -> tuple[Tensor, ...]:
        mask = (torch.arange(length) < length - 2).long().expand(batch, length).clone()
        return torch.randint(1, 96, (batch, length)), mask

    return sample


def _zoo(name: str, inputs: str, sample: Sample, entry: str | None = None) -> None:
    kind(name, sample, hf=True)(lambda: Logits(entry or name, inputs.split()))


def _two_ids(batch: int) -> tuple[Tensor, ...]:
    return torch.randint(1, 96, (batch, 9)), torch.randint(1, 96, (batch, 6))


def _speech(batch: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, 8, 60), torch.randint(1, 96, (batch, 6))


_zoo("hf_vit", "pixel_values", randn(3, 16, 16), "vit")
_zoo("hf_bert", "input_ids attention_mask", padded(9), "bert")
_zoo("hf_gpt2", "input_ids", ids(9, 96), "gpt2")
_zoo("hf_llama_gqa", "input_ids attention_mask", padded(9), "llama")
_zoo("hf_t5", "input_ids decoder_input_ids", _two_ids, "t5")
_zoo("hf_whisper", "input_features decoder_input_ids", _speech, "whisper")
_zoo("hf_mamba", "input_ids", ids(5, 96), "mamba")
_zoo("hf_swin", "pixel_values", randn(3, 32, 32), "swin")


class OwnLogits(nn.Module):
    """A model of the library by its configuration."""

    def __init__(self, family: str, head: str, **config: Any) -> None:
        super().__init__()
        import transformers

        config = {"vocab_size": 64, "pad_token_id": 0, **config}
        self.model = getattr(transformers, family + head)(
            getattr(transformers, family + "Config")(**config)
        )

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


@kind("hf_llama_tied", ids(9, 64), hf=True)
def llama_tied() -> nn.Module:
    return OwnLogits(
        "Llama", "ForCausalLM", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, tie_word_embeddings=True,
        max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


@kind("hf_distilbert", ids(9, 64), hf=True)
def distilbert() -> nn.Module:
    return OwnLogits(
        "DistilBert", "ForSequenceClassification", dim=32, n_layers=2, n_heads=4, hidden_dim=48,
        max_position_embeddings=32,
    )  # fmt: skip


if importlib.util.find_spec("transformers") is None:
    MODELS = {name: each for name, each in MODELS.items() if not each.hf}
