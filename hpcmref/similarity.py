"""MS-SSIM of two images, on tensors. Training and measurements use the same code."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

MS_SSIM_LEAST_SIDE = 161
"""The smallest side in pixels. MS-SSIM halves the image four times, and must then still exceed its window of 11."""

LAMBDA_POWER = math.log(220 / 2.40) / math.log(0.18 / 0.0018)
"""The exponent p in: lambda of MS-SSIM = 2.40 (lambda of MSE / 0.0018)^p.

It is fitted to the first and the last pair of lambdas that HPCM (official README) and CompressAI (model zoo, up to 0.18
and 220) train with. The formula is within 2 % of the pairs between.
"""

_WINDOW, _SIGMA = 11, 1.5
_STABLE = (0.01**2, 0.03**2)
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""The exponents of the five scales (Wang, Simoncelli and Bovik, 2003)."""


def lambda_of_ms_ssim(of_mse: float) -> float:
    """Return the weight of 1 - MS-SSIM that leads to about the same rate as the weight `of_mse` of 255^2 MSE."""
    return float(2.40 * (of_mse / 0.0018) ** LAMBDA_POWER)


def ms_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Compute the MS-SSIM of each pair of images, averaged over channels: x, y (B, C, H, W) in 0..1 -> (B,) in 0..1.

    This is the definition that learned codecs report. The window is a Gaussian of 11 x 11 with sigma 1.5, without
    padding. There are five scales, each the 2 x 2 mean of the last. Negative terms are set to 0, and the result is a
    weighted product. It is differentiable. Sides must be at least MS_SSIM_LEAST_SIDE.
    """
    result = x.new_ones(x.shape[:2])
    for scale, weight in enumerate(_WEIGHTS):
        luminance, contrast = _ssim(x, y)
        last = scale == len(_WEIGHTS) - 1
        similarity = (luminance * contrast if last else contrast).mean((2, 3))
        # A power below one has no gradient at zero.
        term = similarity.clamp(min=1e-8) ** weight
        result = result * torch.where(similarity > 0, term, 0)
        if not last:
            odd = [side % 2 for side in x.shape[2:]]
            x, y = (F.avg_pool2d(each, 2, padding=odd) for each in (x, y))
    return result.mean(1)


def _ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return the luminance term, and the contrast times the structure term, at every position of the window."""
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    first, second = _STABLE
    luminance = (2 * mean_x * mean_y + first) / (mean_x**2 + mean_y**2 + first)
    return luminance, (2 * covariance + second) / (variance_x + variance_y + second)


def _blur(x: Tensor) -> Tensor:
    """Filter with the Gaussian window: x (B, C, H, W) -> (B, C, H - 10, W - 10)."""
    position = torch.arange(_WINDOW, device=x.device, dtype=x.dtype) - _WINDOW // 2
    window = (-(position**2) / (2 * _SIGMA**2)).exp()
    window = (window / window.sum()).expand(x.shape[1], 1, 1, -1)
    rows = F.conv2d(x, window.mT, groups=x.shape[1])
    return F.conv2d(rows, window, groups=x.shape[1])
