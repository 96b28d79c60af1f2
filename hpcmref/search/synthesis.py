"""Compute the squared error of the output of g_s, and its gradient with respect to the latents.

    y_hat -> g_s -> x_hat -> sum of weight (x_hat - x)^2 -> gradient with respect to y_hat

Weights are constants, so the backward pass of a residual block needs only the values of its wide middle layer. The
picture is computed in strips. This limits the memory, and changes only the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcmref.model.hpcm import HPCM
from hpcmref.model.layers import SLOPE, PartialConv, Pointwise, ResidualBlock, Up
from hpcmref.model.transforms import halo
from hpcmref.similarity import ms_ssim

POSITIONS = 2**12
"""Positions of the 1/16 latent lattice in a strip: one megapixel, about 200 MB."""


class _Block(torch.autograd.Function):
    """A residual block of g_s with constant weights, inside in the type of its 1x1 convolutions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: ResidualBlock) -> Tensor:
        """x: (B, C, H, W) float32; the result has that shape."""
        ctx.block, dtype = block, block.expand.weight.dtype
        inside = x.to(dtype)
        part, kernel, bias = _spatial(block)
        mixed = inside.clone()
        mixed[:, :part] = F.conv2d(inside[:, :part], kernel.to(dtype), bias.to(dtype), padding=1)
        expand, project = block.expand, block.project
        wide = F.leaky_relu_(F.linear(_rows(mixed), expand.weight.flatten(1), expand.bias), SLOPE)
        ctx.save_for_backward(wide)
        return x + _planes(F.linear(wide, project.weight.flatten(1), project.bias).float(), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (activated,) = ctx.saved_tensors
        block, dtype = ctx.block, activated.dtype
        wide = _rows(grad.to(dtype)) @ block.project.weight.flatten(1)
        wide = torch.ops.aten.leaky_relu_backward(wide, activated, SLOPE, True)
        mixed = _planes(wide @ block.expand.weight.flatten(1), grad)
        part, kernel, _ = _spatial(block)
        mixed[:, :part] = F.conv_transpose2d(mixed[:, :part], kernel.to(dtype), padding=1)
        return grad + mixed.float(), None


def _spatial(block: ResidualBlock) -> tuple[int, Tensor, Tensor]:
    """The channels that the spatial convolution of a block mixes, its kernel, and its bias."""
    assert isinstance(block.spatial, PartialConv)
    convolution = block.spatial.conv
    assert convolution.bias is not None
    return block.spatial.part, convolution.weight, convolution.bias


def _rows(planes: Tensor) -> Tensor:
    """(B, C, H, W) -> (B H W, C)."""
    return planes.permute(0, 2, 3, 1).reshape(-1, planes.shape[1])


def _planes(rows: Tensor, like: Tensor) -> Tensor:
    """(B H W, C) -> (B, C, H, W), the shape of `like`."""
    batch, _, height, width = like.shape
    return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    """x (..., C) @ weight (C', C)^T + bias with a constant weight. The backward pass multiplies in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return (grad.to(ctx.dtype) @ ctx.weight.to(ctx.dtype)).float(), None, None, None


def _through(network: nn.Sequential, x: Tensor) -> Tensor:
    """network(x) with gradients for x alone.

    If the inner 1x1 convolutions of residual blocks are in bfloat16, these blocks are inside, and so is the backward
    pass everywhere. Between blocks, the forward pass is in float32.
    """
    blocks = (module for module in network if isinstance(module, ResidualBlock))
    dtype = next((block.expand.weight.dtype for block in blocks), torch.float32)

    def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out: Tensor = _Product.apply(x, weight, bias, dtype)  # type: ignore[no-untyped-call]
        return out

    for module in network:
        if isinstance(module, ResidualBlock):
            x = _Block.apply(x, module)  # type: ignore[no-untyped-call]
        elif isinstance(module, Pointwise) or (isinstance(module, Up) and module.kernel_size == (2, 2)):
            x = module.as_matmul(x, linear)
        else:
            x = module(x)
    return x


class Target:
    """The picture that latents should become: error and gradient of any y_hat, for one image and quality.

    The error is the sum of squared errors, over 3, in grey levels^2.
    """

    def __init__(
        self, model: HPCM, quality: Tensor, x: Tensor, size: Sequence[int], grey: bool, seen: Tensor | None = None
    ) -> None:
        """x: (1, 3, H, W) uint8, of which the first `size` (height, width) are in the picture. grey: channels are
        averaged. seen: (height, width) bool, the pixels whose error counts; None is all.
        """
        self._model, self._quality = model, quality
        with torch.inference_mode(False), torch.no_grad():  # autograd could not use an inference tensor
            self._gain = None if model.log_inverse_gain is None else model.log_inverse_gain(quality.clone()).exp()
        self._halo = halo(model.config, model.config.synthesis)
        self._height, self._width = size
        self._x = x[:, :, : self._height, : self._width]
        self._grey = grey
        self._seen = None if seen is None else seen[None, None]

    def error(self, y_hat: Tensor) -> float:
        """Of the picture that a decoder shows: y_hat (1, M, h, w)."""
        return self._error(self._model.picture(y_hat, self._quality)[:, :, : self._height, : self._width])

    def gradient(self, y_hat: Tensor) -> Tensor:
        """Of the error before rounding to bytes: y_hat (1, M, h, w) float32; the result has that shape.

        The error is that of clamped pixels, but the gradient passes as if they were not clamped.
        """
        gradient = torch.zeros_like(y_hat)
        pull = self._pull_for(y_hat)
        rows = max(1, POSITIONS // y_hat.shape[3])
        for start in range(0, -(-self._height // 16), rows):
            stop = min(start + rows, y_hat.shape[2])
            top, bottom = max(0, start - self._halo), min(stop + self._halo, y_hat.shape[2])
            with torch.inference_mode(False), torch.enable_grad():
                part = y_hat[:, :, top:bottom].clone(memory_format=torch.channels_last).requires_grad_()
                shown = _through(self._model.g_s, part if self._gain is None else part * self._gain)
                of_shown = torch.zeros_like(shown)
                first, last = 16 * start, min(16 * stop, self._height)
                seen = (slice(None), slice(None), slice(first - 16 * top, last - 16 * top), slice(self._width))
                of_shown[seen] = pull(shown.detach()[seen], slice(first, last))
                (of_part,) = torch.autograd.grad(shown, part, of_shown)
            gradient[:, :, top:bottom] += of_part
        return gradient

    def _error(self, shown: Tensor) -> float:
        """Of what is seen of a decoded picture: (1, 3, height, width) uint8."""
        total = 0
        for top in range(0, self._height, 64):  # in parts, for the memory
            rows = (slice(None), slice(None), slice(top, top + 64))
            squares = (self._averaged(shown[rows]).int() - self._x[rows].int()).square_()
            total += int((squares if self._seen is None else squares * self._seen[rows]).sum())
        return total / 3

    def _pull_for(self, y_hat: Tensor) -> Pull:
        """What gives the gradient of the error with respect to rows of the picture."""
        return self._pull

    def _pull(self, shown: Tensor, rows: slice) -> Tensor:
        error = shown.clamp(0, 1).mul_(255).sub_(self._x[:, :, rows])
        if self._grey:
            error = error.mean(1, keepdim=True).expand_as(error)
        if self._seen is not None:
            error = error * self._seen[:, :, rows]
        return error * (2 * 255 / 3)

    def _averaged(self, shown: Tensor) -> Tensor:
        """A decoded picture (1, 3, H, W) uint8 as it is shown: (1, 1, H, W) if it is grey."""
        return (shown.int().sum(1, keepdim=True) + 1) // 3 if self._grey else shown


Pull = Callable[[Tensor, slice], Tensor]
"""Pixels of some rows (1, 3, rows, width), before they are clamped to 0..1, and which rows -> gradient with respect to
them."""


class SimilarTarget(Target):
    """As `Target`, for another error: (1 - MS-SSIM) * pixels. It needs MS_SSIM_LEAST_SIDE pixels a side,
    and all pixels count."""

    def _error(self, shown: Tensor) -> float:
        seen, x = (each.float().div_(255) for each in (self._averaged(shown), self._wanted()))
        similarity = sum(float(ms_ssim(seen[:, [channel]], x[:, [channel]])) for channel in range(seen.shape[1]))
        return (1 - similarity / seen.shape[1]) * self._height * self._width

    def _pull_for(self, y_hat: Tensor) -> Pull:
        """MS-SSIM needs the whole picture, so its gradient comes first; channel by channel, which takes less memory."""
        shown = self._model.synthesise(y_hat, self._quality)[:, :, : self._height, : self._width].clamp_(0, 1)
        if self._grey:
            shown = shown.mean(1, keepdim=True)
        x = self._wanted()
        planes: list[Tensor] = []
        for channel in range(shown.shape[1]):
            with torch.inference_mode(False), torch.enable_grad():
                plane = shown[:, [channel]].clone().requires_grad_()
                similarity = ms_ssim(plane, x[:, [channel]].clone().float() / 255).sum()
                planes += torch.autograd.grad(similarity, plane)
        gradient = torch.cat(planes, 1).mul_(-self._height * self._width / 3)

        def pull(pixels: Tensor, rows: slice) -> Tensor:
            towards = gradient[:, :, rows].expand_as(pixels)
            beyond = ((pixels > 1) & (towards < 0)) | ((pixels < 0) & (towards > 0))
            return towards.masked_fill(beyond, 0)

        return pull

    def _wanted(self) -> Tensor:
        return self._x[:, :1] if self._grey else self._x
