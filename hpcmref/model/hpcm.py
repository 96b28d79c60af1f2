"""The HPCM model, which combines the transforms and the entropy path."""

import math
from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor, nn

from hpcmref.model.coders import Coder, Estimator
from hpcmref.model.config import HPCMConfig
from hpcmref.model.context import ContextModel
from hpcmref.model.layers import QualityTable
from hpcmref.model.memory_bank import banks, state
from hpcmref.model.strips import POSITIONS, in_strips
from hpcmref.model.transforms import g_a, g_s, h_a, h_s, halo, hyper_halo, start_as_dct

STRIDE = 64
"""Image sides must be multiples of this: g_a divides them by 16, h_a by 4 more."""


def _same(x: Tensor) -> Tensor:
    return x


def to_bytes_(x: Tensor) -> Tensor:
    """0..1 -> 0..255 uint8. x is overwritten."""
    return x.clamp_(0, 1).mul_(255).round_().to(torch.uint8)


class Estimate(TypedDict):
    """What `HPCM.forward` returns."""

    x_hat: Tensor
    likelihoods: dict[str, Tensor]


class EntropyPath(nn.Module):
    """The networks that predict the scales and means of the next symbols from the symbols decoded so far.

    They are the prior of z, h_s and the context model. They must give the same numbers in the encoder and in the
    decoder. No other part of the model has to.
    """

    def __init__(self, config: HPCMConfig) -> None:
        super().__init__()
        self.N = config.N
        self.symbols_per_position = config.N + 16 * config.M
        """Symbols of z and y for every position of z."""
        self.halo = hyper_halo(config)
        self.means_hyper = QualityTable(torch.zeros(config.anchors), config.N)
        self.scales_hyper = QualityTable(torch.ones(config.anchors), config.N)
        self.h_s = h_s(config)
        self.context = ContextModel(config, banks(config), state(config))

    def forward(self, quality: Tensor, size: tuple[int, int], coder: Coder) -> Tensor:
        """Code one batch. quality: (B,); size: (h, w) of z. Returns y_hat (B, M, 4h, 4w)."""
        shape = (len(quality), self.N, *size)
        z_hat = coder.code(None, self.scales_hyper(quality).expand(shape), self.means_hyper(quality).expand(shape))
        hyper = in_strips(self.h_s, z_hat, halo=self.halo, positions=POSITIONS // 16, whole=self.training)
        return self.context(hyper, quality, coder)


class HPCM(nn.Module):
    """The networks of the learned image codec HPCM (arXiv 2507.19125), for a single rate or for a range of rates.

    A model with quality anchors (`config.lambdas`) multiplies y by a gain per channel before quantisation, and y_hat by
    an inverse gain after it. Both gains are interpolated in the log domain between the two anchors around the quality.

    Train mode is for gradients: each input is computed as a whole, and nothing is overwritten. Eval mode is for coding:
    large inputs are computed in strips, and layers overwrite intermediate results of their own, which autograd refuses.
    So run a model in eval mode under `torch.inference_mode` or `torch.no_grad`.
    """

    def __init__(self, config: HPCMConfig) -> None:
        super().__init__()
        self.config = config
        self.g_a = g_a(config)
        self.g_s = g_s(config)
        self.h_a = h_a(config)
        self.entropy = EntropyPath(config)
        self.log_gain: QualityTable | None = None
        self.log_inverse_gain: QualityTable | None = None
        if config.lambdas:
            # The initial quantiser step is 0.47, in units of the 0..1 pixel range, at lambda 0.0018. It is proportional
            # to 1 / sqrt(lambda), as rate-distortion theory predicts.
            start = [0.75 + 0.5 * math.log(each / 0.0018) for each in config.lambdas]
            self.log_gain = QualityTable(torch.tensor(start), config.M)
            self.log_inverse_gain = QualityTable(torch.tensor([-each for each in start]), config.M)

    def initialise(self) -> "HPCM":
        """Initialise untrained weights: the dct transforms become a DCT, and predicted scales start near 1."""
        if self.config.transform == "dct":
            start_as_dct(self.g_a, self.g_s)
        context = self.entropy.context
        with torch.no_grad():
            for part in (self.entropy.h_s, context.prior_s1_s2, context.prior_s3):
                *_, head = (module for module in part.modules() if isinstance(module, nn.Conv2d))
                assert head.bias is not None
                head.weight[: 2 * self.config.M].mul_(0.1)  # the outputs for scales and means, not those for a state
                head.bias[: self.config.M].fill_(1)
        return self

    def features(self, x: Tensor, convert: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """Apply g_a to an image (B, 3, H, W), strip by strip; the result is (B, M, H/16, W/16).

        convert: makes numbers in 0..1 of a strip of the image.
        """

        def strip(part: Tensor) -> Tensor:
            return self.g_a(convert(part))

        rows = halo(self.config, self.config.stages)
        return in_strips(strip, x, halo=rows, unit=16, positions=POSITIONS * 256, whole=self.training)

    def latents(self, features: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Features (B, M, h, w), quality (B,) -> y (B, M, h, w) and z (B, N, h/4, w/4), before quantisation."""
        y = features if self.log_gain is None else features * self.log_gain(quality).exp()
        return y, self.hyper_latents(y)

    def hyper_latents(self, y: Tensor) -> Tensor:
        """h_a: y (B, M, h, w) -> z (B, N, h/4, w/4)."""
        return in_strips(self.h_a, y, halo=hyper_halo(self.config), unit=4, whole=self.training)

    def analyse(self, x: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Image x (B, 3, H, W) in 0..1, quality (B,) -> y (B, M, H/16, W/16), z (B, N, H/64, W/64), not quantised."""
        return self.latents(self.features(x), quality)

    def synthesise(self, y_hat: Tensor, quality: Tensor, convert: Callable[[Tensor], Tensor] = _same) -> Tensor:
        """y_hat (B, M, H/16, W/16), quality (B,) -> image (B, 3, H, W), not clamped.

        convert: applied to each strip of the image.
        """
        gain = None if self.log_inverse_gain is None else self.log_inverse_gain(quality).exp()

        def strip(part: Tensor) -> Tensor:
            return convert(self.g_s(part if gain is None else part * gain))

        return in_strips(strip, y_hat, halo=halo(self.config, self.config.synthesis), whole=self.training)

    def picture(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        """What a decoder shows: y_hat (B, M, H/16, W/16), quality (B,) -> (B, 3, H, W) uint8."""
        return self.synthesise(y_hat, quality, to_bytes_)

    def forward(self, x: Tensor, quality: Tensor | None = None) -> Estimate:
        """Estimate rate and reconstruction.

        x: (B, 3, H, W) in 0..1, H and W multiples of 64; quality: (B,) in 0..63, the middle one by default. Returns
        {"x_hat": (B, 3, H, W), not clamped, "likelihoods": {"y": (B, elements), "z": (B, elements)}} in coding order.
        """
        if quality is None:
            quality = x.new_full((len(x),), (self.config.qualities - 1) / 2)
        y, z = self.analyse(x, quality)
        estimator = Estimator(y, z, noise=self.training)
        y_hat = self.entropy(quality, (z.shape[2], z.shape[3]), estimator)
        return {
            "x_hat": self.synthesise(y_hat, quality),
            "likelihoods": {"y": estimator.y_likelihoods, "z": estimator.z_likelihoods},
        }
