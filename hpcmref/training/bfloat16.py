"""Train in bfloat16: factors of matrix products and the inner layers of residual blocks, with sums in float32.

Values between residual blocks stay in float32. Latents reach values of a hundred quantiser steps, more than the 8 bits
of bfloat16 can hold to half a step.

On a GPU, only the inner layers are in bfloat16: everything else is in TF32, which has the same speed with more bits. On
a CPU there is no TF32, and float32 has a fourth of the speed of bfloat16. So there every matrix product has factors in
bfloat16, and a residual block is one operation with its own backward pass, which rounds each tensor only once.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.layers import SLOPE, Down, Pointwise, ResidualBlock, Up


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
            module.linear = _linear


def _inside(forward: Callable[..., Tensor], device: str) -> Callable[..., Tensor]:
    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            result = forward(*inputs)
        return result.float()

    return run


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `torch.nn.functional.linear`, for float32 tensors."""
    out: Tensor = _Product.apply(x.flatten(0, -2), weight)  # type: ignore[no-untyped-call]
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    """x (n, C) @ weight (C', C)^T, both float32 -> (n, C') float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x.bfloat16(), weight.bfloat16())
        return x @ weight.t()  # whose factors `matmul_in_bfloat16` rounds, but not the result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor]:
        x, weight = ctx.saved_tensors
        grad = grad.bfloat16()
        return (grad @ weight).float() if ctx.needs_input_grad[0] else None, (grad.t() @ x).float()


def _block(block: ResidualBlock, x: Tensor) -> Tensor:
    """The forward pass of a residual block: x (B, C, H, W) float32, and so is the result."""
    if not block.training:
        return type(block).forward(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = block.spatial(x.bfloat16())
    layers = (part for layer in (block.expand, block.project) for part in (layer.weight.flatten(1), layer.bias))
    rows = (plane.permute(0, 2, 3, 1).flatten(0, 2) for plane in (x, mixed))
    out: Tensor = _Block.apply(*rows, *layers)  # type: ignore[no-untyped-call]
    batch, _, height, width = x.shape
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


class _Block(torch.autograd.Function):
    """x + project(LeakyReLU(expand(mixed))): x (n, C) float32, mixed (n, C) bfloat16 -> (n, C) float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, expand: Tensor, expand_bias: Tensor, project: Tensor, project_bias: Tensor
    ) -> Tensor:
        expand, project = expand.bfloat16(), project.bfloat16()
        wide = F.leaky_relu_(F.linear(mixed, expand, expand_bias.bfloat16()), SLOPE)
        ctx.save_for_backward(mixed, wide, expand, project)
        return x + F.linear(wide, project, project_bias.bfloat16()).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        mixed, wide, expand, project = ctx.saved_tensors
        rounded = grad.bfloat16()
        # The sign of LeakyReLU's result is that of its input, so the input need not be kept.
        inner = torch.ops.aten.leaky_relu_backward(rounded @ project, wide, SLOPE, True)
        expand_grads = (inner.t() @ mixed).float(), inner.sum(0).float()
        project_grads = (rounded.t() @ wide).float(), rounded.sum(0).float()
        return grad, inner @ expand, *expand_grads, *project_grads
