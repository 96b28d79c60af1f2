"""Decode a small preview of a file in less than half the time: with fewer steps of s3, and without the network g_s.

Most of the time of decoding is that of the networks that predict the latents of s3, step by step. A preview of at most
1/12 of the size stops after step 7 of the 11 (FORMAT.md): then half of the positions have the lowest frequencies, and
the others are interpolated. Of the network g_s only the linear part is used, averaged over 8 x 8 pixels. For transforms
that are initialised as a DCT, its result is within 45 dB of that of the network (`research/thumbnail.py` measures
both). The checksum of s2 is compared, but the symbols read from s3 are not verified.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hpcmref.model.coders import SymbolReader
from hpcmref.model.hpcm import HPCM
from hpcmref.model.schedule import S1, S2, STEPS_S3, Step
from hpcmref.model.transforms import BLOCK

FEW_STEPS = 12
"""Decoding stops early if the picture is at least this many times as large as the preview, in pixels a side."""
_LAST = STEPS_S3[1]
_LATTICES = {1: S1, 2: S2}
_LOWEST = 4
"""One in this many channels, those of the lowest frequencies, are interpolated. The others hardly change averages."""


class _Enough(Exception):  # noqa: N818  no error
    """Ends the entropy path after the last step that the preview needs."""


class PreviewReader(SymbolReader):
    """A reader that stops after `_LAST`, step 7, and stores the decoded latents.

    y_hat: (1, M, h, w) on the lattice of `scale`, 0 where no latent is known. known: (1, M, h, w), 1 for known latents
    and else 0.
    """

    y_hat: Tensor
    known: Tensor
    scale = 0

    def run(self, entropy: torch.nn.Module, quality: Tensor, size: tuple[int, int]) -> None:
        """Run the entropy path until the last step that is needed has been read. The results are `y_hat` and `known`.

        entropy: the entropy path. quality: (1,) float32. size: rows and columns of z. Raises the errors of the decoder.
        """
        try:
            entropy(quality, size, self)
        except _Enough:
            return
        raise AssertionError  # there are steps after _LAST, so the loop cannot end

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        """Read the latents of a step and store them. Arguments and result are those of `Coder.code`."""
        values = super().code(step, scales, means)
        if step is not None:
            self._keep(step, values)
        if step is _LAST:
            raise _Enough
        return values

    def _keep(self, step: Step, values: Tensor) -> None:
        if not self.scale:
            batch, channels, height, width = values.shape
            self.y_hat = values.new_zeros(batch, channels * step.groups, height, width)
            self.known = torch.zeros_like(self.y_hat)
            self.scale = 1
        while self.scale < step.scale:
            lattice = _LATTICES[self.scale]
            self.y_hat, self.known = lattice.up(self.y_hat), lattice.up(self.known)
            self.scale += 1
        step.put_(self.y_hat, values)
        step.put_(self.known, torch.ones_like(values))


def interpolated(y_hat: Tensor, known: Tensor) -> Tensor:
    """Interpolate the channels of the lowest frequencies of y_hat (1, M, h, w) at positions where `known` is 0.

    If all four neighbours are known, the pair (horizontal or vertical) that differs less has the larger weight, which
    preserves edges. Otherwise the result is the average of the known ones among the eight neighbours.
    """
    lowest = y_hat.shape[1] // _LOWEST
    values, mask = y_hat[:, :lowest].clone(), known[:, :lowest] > 0
    values *= mask
    left, right, above, below = _neighbours(values)
    all_known = torch.stack(_neighbours(mask.float())).amin(0) > 0
    across, down = 1 / ((left - right).abs() + 0.1), 1 / ((above - below).abs() + 0.1)
    between = (across * (left + right) + down * (above + below)) / (2 * (across + down))
    values = torch.where(~mask & all_known, between, values)
    mask = mask | all_known
    around = values.new_tensor([[0.5, 1, 0.5], [1, 0, 1], [0.5, 1, 0.5]]).expand(lowest, 1, 3, 3)
    while not mask.all():
        weights = F.conv2d(mask.to(values), around, padding=1, groups=lowest)
        if not weights.any():  # no position of these channels is known
            break
        average = F.conv2d(values * mask, around, padding=1, groups=lowest) / weights.clamp(min=0.5)
        reached = ~mask & (weights > 0)
        if not reached.any():
            break
        values, mask = torch.where(reached, average, values), mask | reached
    return torch.cat([values, y_hat[:, lowest:]], dim=1)


def _neighbours(plane: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the left, right, upper and lower neighbours of all positions of a plane; outside of it they are 0."""
    padded = F.pad(plane, (1, 1, 1, 1))
    inner = slice(1, -1)
    return padded[..., inner, :-2], padded[..., inner, 2:], padded[..., :-2, inner], padded[..., 2:, inner]


class LinearSynthesis:
    """The linear part of g_s at y_hat = 0, averaged over blocks of 8 x 8 pixels: from y_hat to an eighth of the
    picture.

    g_s is run on one impulse for each latent channel, and the averaged answers are the kernels of one transposed
    convolution.
    """

    def __init__(self, model: HPCM, size: float = 0.2, batch: int = 64) -> None:
        """Measure the answers of g_s. size: the height of the impulses, in units of g_s; batch: how many at a time."""
        channels = model.config.M
        probe = next(model.g_s.parameters())
        impulses = torch.zeros(channels, channels, 3, 3, dtype=torch.float32, device=probe.device)
        impulses[range(channels), range(channels), 1, 1] = size
        answers = [
            F.avg_pool2d(model.g_s(part).float(), BLOCK) - F.avg_pool2d(model.g_s(-part).float(), BLOCK)
            for part in impulses.split(batch)
        ]
        self._kernel = torch.cat(answers) / (2 * size)
        nothing = F.avg_pool2d(model.g_s(torch.zeros_like(impulses[:1])).float(), BLOCK)
        self._offset = nothing[:, :, 2:4, 2:4].mean((2, 3), keepdim=True)

    def __call__(self, latents: Tensor) -> Tensor:
        """Map latents (1, M, h, w) in the units of g_s to a small picture (1, 3, 2h, 2w), about 0..1."""
        return F.conv_transpose2d(latents.float(), self._kernel, stride=2, padding=2) + self._offset
