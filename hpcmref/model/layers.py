"""The building blocks of all networks: convolutions, the two residual blocks, and tables that depend on the rate."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.model.config import QUALITIES

SLOPE = 0.01
"""Negative slope of every LeakyReLU (official src/layers)."""


WIDE = 2**21
"""A residual block holds about this many numbers of its wide middle layer at a time: few enough for a cache."""


Linear = Callable[..., Tensor]
"""`torch.nn.functional.linear`, or how training computes it (`hpcmref/training/bfloat16.py`)."""


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """1x1 convolution: x (B, C, H, W), weight (C', C, 1, 1), bias (C',) -> (B, C', H, W).

    With one thread, PyTorch uses a kernel of half the speed for batches of fewer than 16 images. So the positions are
    then arranged as a batch of 16 images of one row, if their number can be divided by 16.
    """
    batch, channels, height, width = x.shape
    if torch.get_num_threads() > 1 or batch * height * width % 16:
        return F.conv2d(x, weight, bias)
    rows = x.permute(0, 2, 3, 1).reshape(16, 1, -1, channels).permute(0, 3, 1, 2)
    return F.conv2d(rows, weight, bias).permute(0, 2, 3, 1).reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class Pointwise(nn.Conv2d):
    """1x1 convolution. In eval mode it runs in the type of its weights, whatever the type of its input."""

    linear: Linear = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> (B, C', H, W)."""
        if self.training:
            return self.as_matmul(x)
        return pointwise(x.to(self.weight.dtype), self.weight, self.bias)

    def as_matmul(self, x: Tensor, linear: Linear | None = None) -> Tensor:
        """As `forward`, computed as a matrix product: forward and backward are up to 3 times as fast on a CPU.

        linear: what computes it instead of `self.linear`.
        """
        return (linear or self.linear)(x.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def conv1x1(inputs: int, outputs: int) -> Pointwise:
    """Pointwise convolution."""
    return Pointwise(inputs, outputs, 1)


class Down(nn.Conv2d):
    """Convolution that halves the resolution: kernel 2, or kernel 4 with padding 1."""

    linear: Linear = staticmethod(F.linear)

    def __init__(self, inputs: int, outputs: int, kernel: int = 2) -> None:
        super().__init__(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, 2h, 2w) -> (B, C', h, w)."""
        if not self.training or self.kernel_size != (2, 2):
            return super().forward(x)
        # As a matrix product, as in `Pointwise`: the four pixels of a cell are the input.
        cells = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
        return self.linear(cells.flatten(3), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias).permute(0, 3, 1, 2)


class Up(nn.ConvTranspose2d):
    """Transposed convolution that doubles the resolution: kernel 2, or kernel 4 with padding 1."""

    linear: Linear = staticmethod(F.linear)

    def __init__(self, inputs: int, outputs: int, kernel: int = 2) -> None:
        super().__init__(inputs, outputs, kernel, stride=2, padding=kernel // 2 - 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """x: (B, C, h, w) -> (B, C', 2h, 2w)."""
        if not self.training or self.kernel_size != (2, 2):
            return super().forward(x, output_size)
        return self.as_matmul(x)

    def as_matmul(self, x: Tensor, linear: Linear | None = None) -> Tensor:
        """As `forward`, computed as a matrix product: the four pixels of a cell are the output. Kernel 2 only."""
        cells = (linear or self.linear)(x.permute(0, 2, 3, 1), self.weight.permute(2, 3, 1, 0).flatten(0, 2))
        cells = cells.unflatten(3, (2, 2, -1)).transpose(2, 3) + self.bias
        return cells.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)


class PartialConv(nn.Module):
    """3x3 convolution of the first quarter of the channels. The other channels are unchanged."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.part = channels // 4
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); the result has the same shape."""
        mixed, passed = x.split((self.part, x.shape[1] - self.part), dim=1)
        return torch.cat((self.conv(mixed), passed), dim=1)


class ResidualBlock(nn.Module):
    """The common base of PConvRB and DWConvRB: x + 1x1(LeakyReLU(1x1(spatial(x)))).

    wide: in eval mode, strips of rows are computed such that the wide middle layer has about so many numbers.
    spatial: must give a new tensor, since the result overwrites it in eval mode.
    """

    def __init__(self, channels: int, spatial: nn.Module, ratio: int) -> None:
        super().__init__()
        self.wide = WIDE
        self.spatial = spatial
        self.expand = conv1x1(channels, channels * ratio)
        self.activation = nn.LeakyReLU(SLOPE, inplace=True)
        self.project = conv1x1(channels * ratio, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); the result has the same shape."""
        mixed = self.spatial(x)
        if self.training:
            # Not in place: autograd would then copy the tensors before and after the operation.
            return x + self.project(F.leaky_relu(self.expand(mixed), SLOPE))
        rows = max(1, self.wide // (self.expand.out_channels * len(x) * x.shape[3]))
        for start in range(0, x.shape[2], rows):
            strip = (slice(None), slice(None), slice(start, start + rows))
            torch.add(x[strip], self._residual(mixed[strip]), out=mixed[strip])
        return mixed

    def _residual(self, mixed: Tensor) -> Tensor:
        return self.project(self.activation(self.expand(mixed)))


class PConvRB(ResidualBlock):
    """Residual block whose spatial part is a partial convolution (transforms and hyper transforms)."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels, PartialConv(channels), ratio)


class DWConvRB(ResidualBlock):
    """Residual block whose spatial part is a depthwise 3x3 convolution (spatial priors)."""

    def __init__(self, channels: int, ratio: int = 2) -> None:
        super().__init__(channels, nn.Conv2d(channels, channels, 3, padding=1, groups=channels), ratio)


def in_bfloat16(network: nn.Module) -> None:
    """Convert the inner 1x1 convolutions of residual blocks to bfloat16, in which they run in eval mode.

    Values between the blocks stay in float32. Latents reach values of a hundred quantiser steps, which the 8 bits of
    bfloat16 cannot hold to half a step.
    """
    for block in network.modules():
        if isinstance(block, ResidualBlock):
            block.expand.bfloat16()
            block.project.bfloat16()


def anchor_weights(quality: Tensor, anchors: int) -> Tensor:
    """Weights (B, anchors) of linear interpolation between the two quality anchors around a quality (B,) in 0..63."""
    if anchors == 1:
        return torch.ones_like(quality)[:, None]
    position = quality * ((anchors - 1) / (QUALITIES - 1))
    distance = (position[:, None] - torch.arange(anchors, device=quality.device)).abs()
    return (1 - distance).clamp_(min=0)


class QualityTable(nn.Module):
    """One number per channel that depends on the quality. Learned at the quality anchors, and linear in between."""

    def __init__(self, anchors: Tensor, channels: int) -> None:
        """anchors: (A,), the initial numbers at the anchors, alike for all channels."""
        super().__init__()
        self.values = nn.Parameter(anchors.view(-1, 1, 1, 1).expand(-1, channels, 1, 1).contiguous())

    def forward(self, quality: Tensor) -> Tensor:
        """quality: (B,) in 0..63 -> (B, channels, 1, 1)."""
        return torch.einsum("ba,achw->bchw", anchor_weights(quality, len(self.values)), self.values)
