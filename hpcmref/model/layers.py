"""The building blocks of every network: convolutions, the two residual blocks, and what depends on the rate."""

import torch
from torch import Tensor, nn

from hpcmref.model.config import QUALITIES

SLOPE = 0.01
"""Negative slope of every LeakyReLU (official src/layers)."""


def conv1x1(inputs: int, outputs: int) -> nn.Conv2d:
    """Pointwise convolution."""
    return nn.Conv2d(inputs, outputs, 1)


def down(inputs: int, outputs: int, kernel: int = 2) -> nn.Conv2d:
    """Convolution that halves the resolution: kernel 2, or kernel 4 with padding 1."""
    return nn.Conv2d(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)


def up(inputs: int, outputs: int, kernel: int = 2) -> nn.ConvTranspose2d:
    """Transposed convolution that doubles the resolution: kernel 2, or kernel 4 with padding 1."""
    return nn.ConvTranspose2d(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)


class PartialConv(nn.Module):
    """3x3 convolution of the first quarter of the channels; the others pass."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.part = channels // 4
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); the result has the same shape."""
        mixed, passed = x.tensor_split((self.part,), dim=1)
        return torch.cat((self.conv(mixed), passed), dim=1)


class ResidualBlock(nn.Module):
    """x + 1x1(LeakyReLU(1x1(spatial(x)))): the frame of PConvRB and DWConvRB."""

    def __init__(self, channels: int, spatial: nn.Module, ratio: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.expand = conv1x1(channels, channels * ratio)
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)
        self.project = conv1x1(channels * ratio, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); the result has the same shape."""
        return x + self.project(self.activation(self.expand(self.spatial(x))))


class PConvRB(ResidualBlock):
    """Residual block whose spatial part is a partial convolution (transforms and hyper transforms)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels, PartialConv(channels), ratio)


class DWConvRB(ResidualBlock):
    """Residual block whose spatial part is a depthwise 3x3 convolution (spatial priors)."""

    def __init__(self, channels: int, ratio: int = 2) -> None:
        super().__init__(channels, nn.Conv2d(channels, channels, 3, padding=1, groups=channels), ratio)


def anchor_weights(quality: Tensor, anchors: int) -> Tensor:
    """Weights (B, anchors) that interpolate linearly between the two rate anchors around each quality (B,) in 0..63."""
    if anchors == 1:
        return torch.ones_like(quality)[:, None]
    position = quality * ((anchors - 1) / (QUALITIES - 1))
    distance = (position[:, None] - torch.arange(anchors, device=quality.device)).abs()
    return (1 - distance).clamp_(min=0)


class RateTable(nn.Module):
    """One number per channel that depends on the quality: learned at the rate anchors, linear between them."""

    def __init__(self, anchors: Tensor, channels: int) -> None:
        """anchors: (A,), where the numbers of every channel start."""
        super().__init__()
        self.values = nn.Parameter(anchors.view(-1, 1, 1, 1).repeat(1, channels, 1, 1))

    def forward(self, quality: Tensor) -> Tensor:
        """quality: (B,) in 0..63 -> (B, channels, 1, 1)."""
        return torch.einsum("ba,achw->bchw", anchor_weights(quality, len(self.values)), self.values)
