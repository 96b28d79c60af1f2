"""The loss of training: rate plus lambda times distortion, at the quality of each image."""

import math

import torch
from torch import Tensor, nn

from hpcmref.model import HPCM
from hpcmref.model.entropy import bits
from hpcmref.model.hpcm import Estimate
from hpcmref.model.layers import anchor_weights
from hpcmref.similarity import LAMBDA_POWER, ms_ssim


class Objective(nn.Module):
    """The model and its loss: rate + lambda distortion, over lambda^0.4 (of the MSE).

    The division gives every rate about the same relative weight. Distortion is 255^2 MSE, or 1 - MS-SSIM.
    """

    def __init__(self, model: HPCM, metric: str) -> None:
        super().__init__()
        self.model = model
        self.metric = metric
        log_lambdas = torch.tensor(model.config.lambdas).log()
        self.register_buffer("log_lambdas", log_lambdas, persistent=False)
        self.log_lambdas: Tensor

    def forward(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """x: (B, 3, H, W) in 0..1, quality: (B,) -> loss (), and bits per pixel and PSNR in dB of each image (2, B)."""
        out = self.model(x, quality)
        bpp = bits_per_pixel(out)
        mse = mean_squared_error(out["x_hat"], x)
        log_lambda = anchor_weights(quality, len(self.log_lambdas)) @ self.log_lambdas
        if self.metric == "ms-ssim":
            power = LAMBDA_POWER * (log_lambda - math.log(0.0018)) + math.log(2.40)
            distortion = power.exp() * (1 - ms_ssim(out["x_hat"], x))
        else:
            distortion = log_lambda.exp() * 255**2 * mse
        weight = (-0.4 * (log_lambda - self.log_lambdas.mean())).exp()
        return ((bpp + distortion) * weight).mean(), torch.stack((bpp, psnr(mse))).detach()


def bits_per_pixel(out: Estimate) -> Tensor:
    """(B,)."""
    _, _, height, width = out["x_hat"].shape
    return (bits(out["likelihoods"]["y"]) + bits(out["likelihoods"]["z"])) / (height * width)


def mean_squared_error(x_hat: Tensor, x: Tensor) -> Tensor:
    """Of each image: (B, 3, H, W) both -> (B,)."""
    return (x_hat - x).square().flatten(1).mean(1)


def psnr(mse: Tensor) -> Tensor:
    """Decibels, for pixels in 0..1."""
    return -10 * mse.clamp(min=1e-10).log10()
