"""Train in bfloat16: factors of matrix products and the inner layers of residual blocks, with sums in float32.

Values between residual blocks stay in float32. Latents reach values of a hundred quantiser steps, more than the 8 bits
of bfloat16 can hold to half a step.

On a GPU, only the inner layers are in bfloat16: everything else is in TF32, which has the same speed with more bits. On
a CPU there is no TF32, and float32 has a fourth of the speed of bfloat16. So there every matrix product has factors in
bfloat16, and a residual block is one operation with its own backward pass (`hpcmref/model/rounded.py`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from hpcmref.model import rounded
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.layers import Down, Pointwise, ResidualBlock, Up


def train_in_bfloat16(networks: nn.Module, device: str) -> None:
    """Let networks compute in bfloat16 in train mode. On a CPU, call them within `matmul_in_bfloat16`, backwards too.

    device: "cpu" or "cuda".
    """
    for module in networks.modules():
        if isinstance(module, CrossAttentionCell) or (isinstance(module, ResidualBlock) and device != "cpu"):
            module.forward = _inside(module.forward, device)  # type: ignore[method-assign]
        elif isinstance(module, ResidualBlock):
            module.forward = partial(_block, module)  # type: ignore[method-assign]
        elif isinstance(module, Pointwise | Down | Up) and device == "cpu":
            module.linear = partial(rounded.linear, dtype=torch.bfloat16)


def _inside(forward: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            result = forward(*inputs)
        return result.float()

    return run


def _block(block: ResidualBlock, x: Tensor) -> Tensor:
    return rounded.residual_block(block, x, torch.bfloat16) if block.training else type(block).forward(block, x)
