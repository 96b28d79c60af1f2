"""Compute the squared error of the output of g_s, and its gradient with respect to the latents.

    y_hat -> g_s -> x_hat -> sum of weight (x_hat - x)^2 -> gradient with respect to y_hat

Weights are constants, so the backward pass of a residual block needs only the values of its wide middle layer. The
picture is computed in strips. This limits the memory, and changes only the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hpcmref.model import rounded
from hpcmref.model.hpcm import HPCM
from hpcmref.model.layers import Pointwise, ResidualBlock, Up
from hpcmref.model.transforms import halo
from hpcmref.similarity import ms_ssim

POSITIONS = 2**12
"""Positions of the 1/16 latent lattice in a strip: one megapixel, about 200 MB."""


def _through(network: nn.Sequential, x: Tensor) -> Tensor:
    """network(x) with gradients for x alone.

    If the inner 1x1 convolutions of residual blocks are in bfloat16, these blocks are inside, and so is the backward
    pass everywhere. Between blocks, the forward pass is in float32.
    """
    blocks = (module for module in network if isinstance(module, ResidualBlock))
    dtype = next((block.expand.weight.dtype for block in blocks), torch.float32)
    for module in network:
        if isinstance(module, ResidualBlock):
            x = rounded.residual_block(module, x, dtype)
        elif isinstance(module, Pointwise) or (isinstance(module, Up) and module.kernel_size == (2, 2)):
            x = module.as_matmul(x, partial(rounded.linear, dtype=dtype))
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
