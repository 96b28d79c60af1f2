"""Small models and images that several test files use."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from hpcmref.model import HPCM, PRESETS, HPCMConfig, context, hpcm, memory_bank
from hpcmref.model.config import MEMORY_BANKS
from hpcmref.model.strips import all_in_strips, in_strips

TINY = dataclasses.replace(
    PRESETS["nano"],
    M=32,
    N=16,
    stages=((48, 1),),
    synthesis=((48, 1),),
    context_width=40,
    heads=4,
    memory=None,
)
"""All parts of nano, a hundredth of its size, with attention in the place of its state."""

STATE = dataclasses.replace(TINY, heads=0, memory=dataclasses.replace(MEMORY_BANKS["state"], width=12))
"""As tiny, with a state as nano has it."""

TRAINABLE = dataclasses.replace(TINY, stages=((192, 1),), synthesis=((192, 1),))
"""As tiny, with the width that the DCT start needs."""


def model_of(config: HPCMConfig = TINY, seed: int = 0, **changes: Any) -> HPCM:
    """An untrained model in eval mode whose scales, means and attention all vary: ordinary random weights."""
    torch.manual_seed(seed)
    model = HPCM(dataclasses.replace(config, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "quant_steps" in name or "hyper" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def in_few_rows(monkeypatch: pytest.MonkeyPatch) -> list[Callable[..., Any]]:
    """Makes strips one unit high, as if images were large; the list records what ran in them."""
    ran: list[Callable[..., Any]] = []

    def narrow(apply: Callable[..., Any]) -> Callable[..., Any]:
        def run(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> Any:
            if inputs[0].shape[2] > options.get("unit", 1):
                ran.append(function)
            return apply(function, *inputs, **options | {"positions": 1})

        return run

    for module in (context, hpcm, memory_bank):
        for apply in (in_strips, all_in_strips):
            if hasattr(module, apply.__name__):
                monkeypatch.setattr(module, apply.__name__, narrow(apply))
    return ran


def latents_of(
    model: HPCM, batch: int, size: tuple[int, int], spread: float = 4.0, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """Random y (B, M, 4h, 4w) and z (B, N, h, w) for a model."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    config = model.config
    y = torch.randn(batch, config.M, 4 * size[0], 4 * size[1], generator=generator, dtype=dtype)
    z = torch.randn(batch, config.N, *size, generator=generator, dtype=dtype)
    return spread * y, spread * z


def tensor_of(image: Image.Image) -> Tensor:
    """(1, 3, H, W) in 0..1, float32, cropped to multiples of 64."""
    pixels = np.asarray(image.convert("RGB"))
    height, width = (side // 64 * 64 for side in pixels.shape[:2])
    return torch.from_numpy(pixels[:height, :width] / np.float32(255)).permute(2, 0, 1)[None].contiguous()


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Decibels, over all channels of two 8-bit images of one size."""
    error = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return float(10 * np.log10(255**2 / np.square(error).mean()))
