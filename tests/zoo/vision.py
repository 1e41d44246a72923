"""Convolutional networks."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.registry import randn, zoo


@zoo(randn(20), name="mlp", tags="dropout plan")
class MLP(nn.Module):
    """Linear, ReLU, dropout; twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(20, 64)
        self.fc2 = nn.Linear(64, 64)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(F.relu(self.fc1(x)))
        return self.head(self.drop(F.relu(self.fc2(x))))


class ConvBlock(nn.Module):
    """conv-BN-relu-conv-BN-add-relu."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(y)))


@zoo(randn(3, 32, 32), name="cnn", tags="batchnorm plan", batch=8, second=5)
class CNN(nn.Module):
    """The benchmark CNN: stem and eight blocks of 16 channels.

    At batch 8 of 3x32x32 an eager training step peaks at 18,885,512 bytes on CPU.
    """

    def __init__(self, channels: int = 16, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.blocks = nn.ModuleList([ConvBlock(channels) for _ in range(blocks)])
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """Basic ResNet block with in-place ReLUs and a projection where the width changes."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.down: nn.Module | None = None
        if stride != 1 or c_in != c_out:
            self.down = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        skip = x if self.down is None else self.down(x)
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += skip
        return self.relu(y)


@zoo(randn(3, 32, 32), name="resnet", tags="batchnorm plan")
class ResNet(nn.Module):
    """A small ResNet as torchvision writes it: in-place ReLU, ``+=``, max-pool, projections."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, 1, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        self.layers = nn.Sequential(
            ResidualBlock(8, 8, 1),
            ResidualBlock(8, 16, 2),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


def _double(c_in: int, c_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
        nn.Conv2d(c_out, c_out, 3, padding=1),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


@zoo(randn(3, 32, 32), name="unet", tags="batchnorm plan")
class UNet(nn.Module):
    """Encoder and decoder with long skip connections, transposed and interpolated upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.enc1, self.enc2, self.mid = _double(3, 8), _double(8, 16), _double(16, 32)
        self.up2 = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.dec2 = _double(32, 16)
        self.up1 = nn.Conv2d(16, 8, 1)
        self.dec1 = _double(16, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.enc1(x)
        b = self.enc2(F.max_pool2d(a, 2))
        m = self.mid(F.max_pool2d(b, 2))
        y = self.dec2(torch.cat([self.up2(m), b], 1))
        y = F.interpolate(self.up1(y), scale_factor=2, mode="bilinear", align_corners=False)
        return self.head(self.dec1(torch.cat([y, a], 1)))


@zoo(randn(8, 16, 16), name="depthwise", tags="batchnorm plan")
class Depthwise(nn.Module):
    """Inverted residuals: depthwise convolution, ReLU6, hard-swish, squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 32, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.depth = nn.Conv2d(32, 32, 5, padding=2, groups=32, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.squeeze, self.excite = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8, momentum=0.3)
        self.act1, self.act2 = nn.ReLU6(inplace=True), nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.expand(x)))
        y = self.act2(self.bn2(self.depth(y)))
        gate = F.adaptive_avg_pool2d(y, 1)
        gate = torch.sigmoid(self.excite(F.silu(self.squeeze(gate))))
        return x + self.bn3(self.project(y * gate))


@zoo(randn(3, 8, 8), name="batchnorm_cumulative", refused=r"(?i)data.dependent|item")
def batchnorm_cumulative() -> nn.Module:
    """``momentum=None`` reads the number of batches as a Python number: cannot be captured."""
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None), nn.ReLU())


@zoo(randn(6, 16, 16), name="groupnorm", tags="dropout plan")
class GroupNormNet(nn.Module):
    """GroupNorm, InstanceNorm, LayerNorm over channels-last, channel dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 12, 3, padding=1)
        self.gn = nn.GroupNorm(3, 12)
        self.inorm = nn.InstanceNorm2d(12, affine=True)
        self.ln = nn.LayerNorm(12)
        self.drop = nn.Dropout2d(0.25)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.gn(self.conv(x)))
        y = self.drop(F.elu(self.inorm(y)))
        y = self.ln(y.permute(0, 2, 3, 1))
        return self.out(y).mean((1, 2))


@zoo(randn(4, 8, 8), name="conv_transpose", tags="batchnorm plan")
class ConvTranspose(nn.Module):
    """A decoder of transposed convolutions, leaky ReLUs and a tanh."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(4, 16, 4, 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(16, affine=False)
        self.up2 = nn.ConvTranspose2d(16, 3, 3, 2, 1, output_padding=1)
        self.act = nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up2(self.act(self.bn(self.up1(x)))))


@zoo(randn(3, 20), name="conv1d_3d", tags="batchnorm")
class MixedDims(nn.Module):
    """1-D convolution and BatchNorm, then a 3-D convolution over a reshaped volume."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm1d(8, track_running_stats=False)
        self.conv3 = nn.Conv3d(1, 2, 3, padding=1)
        self.prelu = nn.PReLU(2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.softplus(self.bn(self.conv1(x)))
        volume = y.reshape(x.shape[0], 1, 4, 8, 5)
        return F.avg_pool3d(self.prelu(self.conv3(volume)), 2).flatten(1)


@zoo(randn(4, 12, 12), name="channels_last", tags="batchnorm")
class ChannelsLast(nn.Module):
    """A channels-last parameter layout, pixel shuffling and reflection padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 16, 3, padding=1, padding_mode="reflect")
        self.bn = nn.BatchNorm2d(16)
        self.out = nn.Conv2d(4, 2, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        y = F.relu(self.bn(self.conv(x)))
        return self.out(F.pixel_shuffle(y, 2))


@zoo(randn(3, 16, 16), name="wide_linear_chain", tags="plan", batch=2)
class WideLinearChain(nn.Module):
    """Large parameters behind small activations: gradients dominate the step's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*[nn.Linear(768, 768) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x
