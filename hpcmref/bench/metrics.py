"""How close is a decoded image to its original? PSNR and MS-SSIM of 8-bit RGB pixels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


def psnr(original: Pixels, decoded: Pixels) -> float:
    """RGB PSNR in dB (peak 255, one mean over the three channels); inf for equal images. (H, W, 3) uint8 both."""
    difference = original.astype(np.int32) - decoded
    error = float(np.mean(np.square(difference), dtype=np.float64))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ms_ssim(original: Pixels, decoded: Pixels) -> float | None:
    """MS-SSIM in 0..1 on RGB; None for images too small to have one. (H, W, 3) uint8 both."""
    import torch

    from hpcmref import similarity

    if min(original.shape[:2]) < similarity.MS_SSIM_LEAST_SIDE:
        return None
    x, y = (torch.from_numpy(np.array(each)).permute(2, 0, 1)[None].float() / 255 for each in (original, decoded))
    with torch.inference_mode():
        return float(similarity.ms_ssim(x, y))


def decibels(similarity: float | None) -> float | None:
    """MS-SSIM of 0..1 in dB, -10 log10(1 - x), the scale on which learned codecs report it; inf for 1."""
    if similarity is None:
        return None
    return -10 * math.log10(1 - similarity) if similarity < 1 else math.inf
