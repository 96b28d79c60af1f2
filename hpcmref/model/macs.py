"""Count the multiplications that a model needs, with forward hooks and tensors on the meta device (without data)."""

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from hpcmref.model.config import HPCMConfig
from hpcmref.model.context import Attend
from hpcmref.model.hpcm import HPCM, STRIDE

PARTS = ("g_a", "h_a", "h_s", "context", "g_s")


def macs_per_pixel(config: HPCMConfig, side: int = 4 * STRIDE) -> dict[str, float]:
    """Multiply-accumulates per pixel of each part of a model with this configuration, for side x side pixels.

    Convolutions and the two matrix products of attention are counted. Elementwise operations are not.
    """
    with torch.device("meta"):
        model = HPCM(config).eval()
    entropy = model.entropy
    modules = dict(zip(PARTS, (model.g_a, model.h_a, entropy.h_s, entropy.context, model.g_s), strict=True))
    counts: Counter[str] = Counter()
    for part, module in modules.items():
        for child in module.modules():
            if isinstance(child, nn.Conv2d | nn.ConvTranspose2d | Attend):
                child.register_forward_hook(_counting(counts, part))
    with torch.device("meta"), torch.no_grad():
        model(torch.empty(1, 3, side, side), torch.zeros(1))
    return {part: counts[part] / side**2 for part in PARTS}


def _counting(counts: Counter[str], part: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if isinstance(module, Attend):
            query, key, *_ = inputs
            counts[part] += 2 * query.numel() * key.shape[3]
        else:
            assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
            # A transposed convolution multiplies every input by the kernel, a convolution every output.
            positions = inputs[0] if isinstance(module, nn.ConvTranspose2d) else output
            counts[part] += module.weight.numel() * prod(positions.shape[2:]) * len(output)

    return count
