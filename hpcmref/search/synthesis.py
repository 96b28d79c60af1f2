"""How wrong is the picture, and which way should each latent go? The squared error of g_s's output, and its gradient.

    y_hat -> g_s -> x_hat -> sum of weight (x_hat - x)^2 -> gradient with respect to y_hat

Weights are constants, so of a residual block the backward pass needs no more than its wide middle. The picture is
computed in strips, which bounds the memory and changes nothing but the order of sums.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcmref.model.hpcm import HPCM
from hpcmref.model.layers import SLOPE, ResidualBlock
from hpcmref.model.transforms import halo

POSITIONS = 2**12
"""Positions of the 1/16 latent lattice in a strip: one megapixel, about 200 MB."""


class _Residual(torch.autograd.Function):
    """1x1(LeakyReLU(1x1(x))) with constant weights, in their type: what `ResidualBlock` adds to its input."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, expand: nn.Conv2d, project: nn.Conv2d) -> Tensor:
        """rows: (positions, C) float32; the result has that shape."""
        wide = F.linear(rows.to(expand.weight.dtype), expand.weight.flatten(1), expand.bias)
        ctx.expand, ctx.project = expand.weight.flatten(1), project.weight.flatten(1)
        wide = F.leaky_relu_(wide, SLOPE)
        ctx.save_for_backward(wide)
        return F.linear(wide, ctx.project, project.bias).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (activated,) = ctx.saved_tensors
        wide = grad.to(ctx.project.dtype) @ ctx.project
        wide = torch.ops.aten.leaky_relu_backward(wide, activated, SLOPE, True)
        return (wide @ ctx.expand).float(), None, None


def _through(network: nn.Sequential, x: Tensor) -> Tensor:
    """network(x) with gradients for x alone."""
    for module in network:
        if isinstance(module, ResidualBlock):
            mixed = module.spatial(x).permute(0, 2, 3, 1)
            rows = _Residual.apply(mixed.reshape(-1, mixed.shape[3]), module.expand, module.project)
            x = x + rows.view(mixed.shape).permute(0, 3, 1, 2)
        else:
            x = module(x)
    return x


class Picture:
    """The picture that latents should become: error and gradient of any y_hat, for one image and quality."""

    def __init__(self, model: HPCM, quality: Tensor, x: Tensor, size: tuple[int, int], grey: bool) -> None:
        """x: (1, 3, H, W) uint8, of which the first `size` (height, width) are seen. grey: channels are averaged."""
        self._model, self._quality = model, quality
        with torch.inference_mode(False), torch.no_grad():  # autograd could not use an inference tensor
            self._gain = None if model.log_inverse_gain is None else model.log_inverse_gain(quality.clone()).exp()
        self._halo = halo(model.config, model.config.synthesis)
        self._x = x
        self._height, self._width = size
        self._grey = grey

    def error(self, y_hat: Tensor) -> float:
        """The sum of squared errors, over 3, in grey levels^2, of the picture that a decoder shows."""
        shown = self._model.picture(y_hat, self._quality)[0, :, : self._height, : self._width]
        total = 0
        for part, x in zip(shown.split(64, 1), self._x[0, :, : self._height, : self._width].split(64, 1), strict=True):
            seen = part.int()
            if self._grey:
                seen = (seen.sum(0, keepdim=True) + 1) // 3
            total += int((seen - x.int()).square_().sum())
        return total / 3

    def gradient(self, y_hat: Tensor) -> tuple[float, Tensor]:
        """The sum of squared errors, over 3, in grey levels^2, and its gradient: y_hat (1, M, h, w) float32."""
        total, gradient = 0.0, torch.zeros_like(y_hat)
        rows = max(1, POSITIONS // y_hat.shape[3])
        for start in range(0, y_hat.shape[2], rows):
            stop = min(start + rows, y_hat.shape[2])
            top, bottom = max(0, start - self._halo), min(stop + self._halo, y_hat.shape[2])
            with torch.inference_mode(False), torch.enable_grad():
                part = y_hat[:, :, top:bottom].clone(memory_format=torch.channels_last).requires_grad_()
                shown = _through(self._model.g_s, part if self._gain is None else part * self._gain)
                error = self._error(shown.detach(), top, start, stop)
                (of_part,) = torch.autograd.grad(shown, part, error * (2 * 255 / 3))
            total += float(error.square().sum()) / 3
            gradient[:, :, top:bottom] += of_part
        return total, gradient

    def _error(self, shown: Tensor, top: int, start: int, stop: int) -> Tensor:
        """x_hat - x in grey levels, zero outside the latent rows `start` to `stop` and where nobody looks.

        Clamped values count as what they are clamped to; their gradient is that of the value before.
        """
        error = torch.zeros_like(shown)
        first, last = 16 * (start - top), 16 * (stop - top)
        last = min(last, self._height - 16 * top)
        if last <= first:
            return error
        region = (slice(None), slice(None), slice(first, last), slice(0, self._width))
        x = self._x[:, :, 16 * top + first : 16 * top + last, : self._width]
        part = shown[region].clamp(0, 1).mul_(255).sub_(x)
        error[region] = part.mean(1, keepdim=True) if self._grey else part
        return error
