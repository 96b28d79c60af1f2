"""Improve latents by stochastic annealing between the two neighbouring values of each, with fixed predictions.

Source: Yang, Bamler and Mandt, "Improving inference for neural image compression" (arXiv 2006.04240), section 3.2. Each
latent v lies between two values mean + symbol and mean + symbol + 1. The loss is computed from a random mixture of the
two: its bits, and the picture that g_s makes from it. The nearer value has the higher probability. The lower the
temperature, the closer is a mixture to one of the two values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcmref.format.rangecoder import symbol_bits
from hpcmref.model.coders import Part
from hpcmref.model.schedule import S1, S2
from hpcmref.search.synthesis import Target

LIMIT = 255
"""Symbols of a larger magnitude are taken to have as many bits as this. Their gradient then comes from g_s alone."""

OWN_BITS = 0.75
"""The part of the bits of a symbol that counts in the gradient. The predictions are fixed, so the gradient does not
show that a symbol with more information also makes later predictions better. Found on six held-out training tiles with
nano-2 and effort 3: -3.4 % of the rate with 1, -3.6 with 0.9, -3.8 with 0.75, -3.8 with 0.6."""

EDGE = 1e-4
"""The closest that a latent may be to one of its neighbours, since atanh is infinite at 1."""

BETAS = 0.9, 0.99


@dataclass(frozen=True)
class Predictions:
    """What the context model said of y when it was last coded: means, and rows of the table of bits (int32)."""

    means: Tensor
    rows: Tensor


def predictions(parts: Iterable[Part], y_hat: Tensor) -> Predictions:
    """From what was coded in each step, and y_hat (1, M, h, w)."""
    planes: dict[int, list[Tensor]] = {}
    for step, *coded in parts:
        if step is not None:
            wide = 2 ** (3 - step.scale)
            shape = (1, y_hat.shape[2] // wide, y_hat.shape[3] // wide, y_hat.shape[1])
            known = planes.setdefault(step.scale, [each.new_zeros(shape).permute(0, 3, 1, 2) for each in coded])
            planes[step.scale] = [step.put_(plane, each) for plane, each in zip(known, coded, strict=True)]
    symbols, rows = (S2.put_(s3, S1.put_(s2, s1)) for s1, s2, s3 in zip(planes[1], planes[2], planes[3], strict=True))
    return Predictions(y_hat - symbols, rows.int().mul_(2 * LIMIT).add_(LIMIT))


@dataclass(frozen=True)
class Schedule:
    """One round: learning rates in quantiser steps, and temperatures, both at its start and at its end."""

    iterations: int
    learning_rate: Sequence[float]
    temperature: Sequence[float]


class Annealer:
    """y on its way to a better one. `y` (1, M, h, w) is continuous; rounding it around its means gives its symbols."""

    def __init__(self, target: Target, weight: float, y: Tensor, seed: int = 0) -> None:
        """weight: bits that a unit of the picture's error is worth, lambda."""
        self.target = target
        self.weight = weight
        self.y = y.clone()
        self._mean, self._square = torch.zeros_like(y), torch.zeros_like(y)
        self._count = 0
        self._random = torch.Generator(y.device).manual_seed(seed)
        bits = torch.from_numpy(symbol_bits(LIMIT)).to(y.device)
        self._dearer = OWN_BITS * bits.diff(dim=1).flatten()  # bits of symbol + 1 above those of symbol

    def round(self, known: Predictions, schedule: Schedule) -> Iterator[None]:
        """Anneal with these predictions; yields after every iteration."""
        for index in range(schedule.iterations):
            part = index / schedule.iterations
            low, high = (math.log(each) for each in schedule.temperature)
            gradient = self._gradient(known, math.exp(low + part * (high - low)))
            first, last = schedule.learning_rate
            self._step(gradient, first + part * (last - first))
            yield

    def _gradient(self, known: Predictions, temperature: float) -> Tensor:
        """Of bits + lambda * squared error with respect to y, through one random mixture."""
        residual = self.y - known.means
        symbols = residual.floor()
        up = residual.sub_(symbols).clamp_(EDGE, 1 - EDGE)
        down = 1 - up
        noise = torch.empty_like(up).uniform_(generator=self._random).clamp_(1e-6, 1 - 1e-6).logit_()
        share = (up.atanh() - down.atanh()).div_(temperature).add_(noise).div_(temperature).sigmoid_()
        index = known.rows + symbols.clamp(-LIMIT, LIMIT - 1).int()
        mixture = symbols.add_(share).add_(known.means)
        gradient = self.target.gradient(mixture).mul_(self.weight).add_(self._dearer[index])
        slope = 1 / (1 - up.square()) + 1 / (1 - down.square())
        return gradient.mul_(share * (1 - share)).mul_(slope).div_(temperature**2)

    def _step(self, gradient: Tensor, learning_rate: float) -> None:
        """One step of Adam."""
        self._count += 1
        first, second = BETAS
        self._mean.lerp_(gradient, 1 - first)
        self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        size = (self._square / (1 - second**self._count)).sqrt_().add_(1e-12)
        self.y.addcdiv_(self._mean, size, value=-learning_rate / (1 - first**self._count))
