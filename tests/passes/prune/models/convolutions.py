"""Convolutional networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes.prune.models.kinds import (
    classifier,
    conv_bn,
    kind,
    mlp,
    randn,
)


class Basic(nn.Module):
    """A ResNet block with a projection where the width changes."""

    def __init__(self, a: int, b: int, stride: int = 1, groups: int = 1, mid: int = 0) -> None:
        super().__init__()
        mid = mid or b
        self.one, self.two = conv_bn(a, mid, 3, stride), conv_bn(mid, b, groups=groups)
        self.skip = nn.Identity() if a == b and stride == 1 else conv_bn(a, b, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.two(F.relu_(self.one(x))))


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
