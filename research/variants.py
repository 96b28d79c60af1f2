"""The changes of nano that `from_start` compares: memory banks, networks, and recipes of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcmref.model import HPCM, PRESETS, HPCMConfig, rounded
from hpcmref.model.coders import Coder, Estimator
from hpcmref.model.config import MEMORY_BANKS
from hpcmref.model.context import ContextModel, CrossAttentionCell, Known, SpatialPrior
from hpcmref.model.hpcm import Estimate
from hpcmref.model.layers import DWConvRB, PartialConv, ResidualBlock, conv1x1
from hpcmref.model.memory_bank import StateBank
from hpcmref.model.schedule import S1, S2, Step
from hpcmref.training import Trainer
from hpcmref.training.data import Tiles

NANO = PRESETS["nano"]
LIGHT = MEMORY_BANKS["light"]
STATE = MEMORY_BANKS["state"]


class GatedState(StateBank):
    """Half of what a prior writes are gates: the other half is multiplied by their sigmoid, and then added.

    The channels of the state that belong to gates stay zero, so only half of its width is used.
    """

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        values, gates = written.chunk(2, dim=1)
        return state + torch.cat((values * gates.sigmoid(), torch.zeros_like(gates)), dim=1)

    write_ = write


class LastReferences(StateBank):
    """The last four references side by side instead of a sum: a quarter of the width is new, and the rest moves on."""

    COUNT = 4

    def write(self, state: Tensor, written: Tensor) -> Tensor:
        newest = self.width // self.COUNT
        return torch.cat((written[:, :newest], state[:, : self.width - newest]), dim=1)

    write_ = write


class Depthwise5x5(ResidualBlock):
    """The residual block of the transforms with a depthwise 5x5 convolution, as in recent codecs for intra frames."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__(channels, nn.Conv2d(channels, channels, 5, padding=2, groups=channels), ratio)


class Gated(nn.Module):
    """The residual block of the transforms with products of two halves of its middle layer, and no other activation.

    It has as many multiplications as the block with LeakyReLU.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        wide = round(2 * ratio * channels / 3)
        self.spatial = PartialConv(channels)
        self.expand = conv1x1(channels, 2 * wide)
        self.project = conv1x1(wide, channels)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); the result has the same shape. In train mode, it computes in bfloat16."""
        if not self.training:
            one, other = self.expand(self.spatial(x)).chunk(2, dim=1)
            residual: Tensor = self.project(one * other)
            return x + residual
        return rounded.residual_block(self, x, torch.bfloat16, _GatedBranch)  # type: ignore[arg-type]


class _GatedBranch(torch.autograd.Function):
    """x + project(one * other), with (one, other) = expand(mixed): x (n, C) float32 and mixed (n, C) bfloat16.

    It is one operation, as the block with LeakyReLU is in training (`hpcmref/model/rounded.py`).
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, expand: Tensor, expand_bias: Tensor, project: Tensor, project_bias: Tensor
    ) -> Tensor:
        expand, project = expand.to(mixed.dtype), project.to(mixed.dtype)
        wide = F.linear(mixed, expand, expand_bias.to(mixed.dtype))
        one, other = wide.chunk(2, dim=1)
        product = one * other
        ctx.save_for_backward(mixed, wide, product, expand, project)
        return x + F.linear(product, project, project_bias.to(mixed.dtype)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        mixed, wide, product, expand, project = ctx.saved_tensors
        rounded = grad.to(wide.dtype)
        of_product = (rounded @ project).repeat(1, 2)
        inner = of_product.mul_(torch.cat(wide.chunk(2, dim=1)[::-1], dim=1))
        expand_grads = (inner.t() @ mixed).float(), inner.sum(0).float()
        project_grads = (rounded.t() @ product).float(), rounded.sum(0).float()
        return grad, inner @ expand, *expand_grads, *project_grads


class FourPriors(ContextModel):
    """Four instead of six evaluations of the prior of s3: two pairs of steps use one prediction each."""

    SHARED = 3, 5
    """The steps of s3 that use the prediction of the step before."""

    def _scale(
        self,
        steps: tuple[Step, ...],
        known: Known,
        coder: Coder,
        adaptors: nn.ModuleList,
        prior: SpatialPrior,
        quant_steps: list[Tensor],
        attention: CrossAttentionCell | None,
    ) -> Known:
        context, y_hat, state, bank = known
        assert attention is None
        assert self.state is not None
        assert state is not None
        for index, (step, adaptor, quant_step) in enumerate(zip(steps, adaptors, quant_steps, strict=True)):
            if step.scale != 3 or index not in self.SHARED:
                out = prior(adaptor(torch.cat((context, y_hat, state), dim=1)), quant_step)
                context, written = self.state.split(out)
                state = self.state.write(state, written)
            y_hat = self._code(step, context, y_hat, coder)
        return Known(context, y_hat, state, bank)


class _Recorder(Estimator):
    """Keeps the scales and means of every step of y, without their gradients."""

    def __init__(self, y: Tensor, z: Tensor, noise: bool) -> None:
        super().__init__(y, z, noise)
        self._steps: list[tuple[Step, Tensor, Tensor]] = []

    def code(self, step: Step | None, scales: Tensor, means: Tensor) -> Tensor:
        if step is not None:
            self._steps.append((step, scales.detach(), means.detach()))
        return super().code(step, scales, means)

    def predictions(self, like: Tensor) -> list[Tensor]:
        """The scales and the means of all latents, each (B, M, h, w) as `like`."""
        batch, channels, height, width = like.shape
        planes = {
            scale: [like.new_zeros(batch, channels, height >> (3 - scale), width >> (3 - scale)) for _ in range(2)]
            for scale in (1, 2, 3)
        }
        for step, *values in self._steps:
            planes[step.scale] = [step.put(*each) for each in zip(planes[step.scale], values, strict=True)]
        return [S2.put(s3, S1.put(s2, s1)) for s1, s2, s3 in zip(planes[1], planes[2], planes[3], strict=True)]


class LatentResidual(HPCM):
    """Adds to y_hat, for g_s alone, what a small network predicts of the rounding error (latent residual prediction).

    Source: Minnen and Singh 2020, arXiv 2007.08739. The network sees y_hat and all scales and means.
    """

    def __init__(self, config: HPCMConfig) -> None:
        super().__init__(config)
        width = config.context_width
        self.residual = nn.Sequential(conv1x1(3 * config.M, width), DWConvRB(width), conv1x1(width, config.M))
        with torch.no_grad():
            self.residual[2].weight.mul_(0.1)  # type: ignore[operator]

    @staticmethod
    def multiplications(config: HPCMConfig) -> float:
        """Of the additional network, per pixel."""
        width = config.context_width
        return (4 * config.M * width + 9 * width + 4 * width**2) / 256

    def forward(self, x: Tensor, quality: Tensor | None = None) -> Estimate:
        """See HPCM."""
        assert quality is not None
        y, z = self.analyse(x, quality)
        estimator = _Recorder(y, z, noise=self.training)
        y_hat = self.entropy(quality, (z.shape[2], z.shape[3]), estimator)
        error = self.residual(torch.cat((y_hat, *estimator.predictions(y_hat)), dim=1)).tanh() / 2
        return {
            "x_hat": self.synthesise(y_hat + error, quality),
            "likelihoods": {"y": estimator.y_likelihoods, "z": estimator.z_likelihoods},
        }


class _Sampled(Trainer):
    """A trainer with another distribution of qualities; equal to other weights of the loss at each quality."""

    def spread(self, part: Tensor) -> Tensor:
        """Uniform numbers in 0..1 -> qualities over 63."""
        raise NotImplementedError

    def sample(self, tiles: Tiles) -> tuple[Tensor, Tensor]:
        """See Trainer."""
        x, quality = super().sample(tiles)
        highest = self.model.config.qualities - 1
        return x, highest * self.spread(quality / highest)


class MoreLow(_Sampled):
    """Half of all crops have a quality below 22."""

    def spread(self, part: Tensor) -> Tensor:
        """See _Sampled."""
        return part**1.5


class MoreHigh(_Sampled):
    """Half of all crops have a quality above 41."""

    def spread(self, part: Tensor) -> Tensor:
        """See _Sampled."""
        return 1 - (1 - part) ** 1.5


@dataclass(frozen=True)
class Variant:
    """One change of nano.

    model: its configuration. parts: names in the package, and the classes that take their place. bank: a memory bank
    that is none of the package's. batch, crop: crops a step and their side in pixels. average: see TrainingConfig.ema.
    besides: multiplications per pixel of networks that nano does not have.
    """

    model: HPCMConfig = NANO
    parts: Mapping[str, type] = field(default_factory=dict)
    bank: type[StateBank] | None = None
    trainer: type[Trainer] = Trainer
    learning_rate: float = 1e-3
    batch: int = 8
    crop: int = 128
    average: float = 0.999
    besides: float = 0

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within this context, the preset nano is this variant."""
        with ExitStack() as stack:
            stack.enter_context(mock.patch.dict(PRESETS, nano=self.model))
            for name, part in self.parts.items():
                stack.enter_context(mock.patch(name, part))
            yield


def _state(width: int) -> HPCMConfig:
    return replace(NANO, memory=replace(STATE, width=width))


_BLOCK = "hpcmref.model.transforms.PConvRB"

VARIANTS: dict[str, Variant] = {
    "state 64": Variant(),
    "none": Variant(replace(NANO, memory=None)),
    "state 32": Variant(_state(32)),
    "state 128": Variant(_state(128)),
    "state 256": Variant(_state(256)),
    "state 64, gated": Variant(_state(128), bank=GatedState),
    "4 references of 32": Variant(_state(128), bank=LastReferences),
    "light": Variant(replace(NANO, memory=LIGHT)),
    "light, before the prior": Variant(replace(NANO, memory=replace(LIGHT, before_prior=True))),
    "global": Variant(replace(NANO, memory=MEMORY_BANKS["global"])),
    "cross": Variant(replace(NANO, memory=MEMORY_BANKS["cross"])),
    "4 priors in s3": Variant(parts={"hpcmref.model.hpcm.ContextModel": FourPriors}),
    "priors with 3 blocks": Variant(replace(NANO, prior_s1_s2=(3, 1), prior_s3=(3, 1))),
    "priors with 1 block": Variant(replace(NANO, prior_s1_s2=(1, 1), prior_s3=(1, 1))),
    "g_s with 6 blocks": Variant(replace(NANO, synthesis=((192, 6),))),
    "g_a and g_s with 6 blocks": Variant(replace(NANO, stages=((192, 6),), synthesis=((192, 6),))),
    "g_a and g_s with 3 blocks": Variant(replace(NANO, stages=((192, 3),), synthesis=((192, 3),))),
    "g_a and g_s of width 256, 3 blocks": Variant(replace(NANO, stages=((256, 3),), synthesis=((256, 3),))),
    "transforms with depthwise 5x5": Variant(parts={_BLOCK: Depthwise5x5}),
    "transforms with gated blocks": Variant(parts={_BLOCK: Gated}),
    "latent residual prediction": Variant(
        parts={"hpcmref.training.loop.HPCM": LatentResidual}, besides=LatentResidual.multiplications(NANO)
    ),
    "M = 192": Variant(replace(NANO, M=192)),
    "M = 256": Variant(replace(NANO, M=256)),
    "learning rate 2e-3": Variant(learning_rate=2e-3),
    "learning rate 5e-4": Variant(learning_rate=5e-4),
    "16 crops, learning rate 1.4e-3": Variant(learning_rate=1.4e-3, batch=16),
    "4 crops, learning rate 7e-4": Variant(learning_rate=7e-4, batch=4),
    "32 crops of 64": Variant(batch=32, crop=64),
    "2 crops of 256": Variant(batch=2, crop=256),
    "more low qualities": Variant(trainer=MoreLow),
    "more high qualities": Variant(trainer=MoreHigh),
    "no average of weights": Variant(average=0.0),
}  # fmt: skip
