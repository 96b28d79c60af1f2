"""Linear layers and residual blocks with gradients, that compute in a type of fewer bits and round each tensor once.

Weights may be constants, as in a search for better latents. Then their gradients are not computed.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hpcmref.model.layers import SLOPE, ResidualBlock


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    """As `torch.nn.functional.linear` for float32, with a backward pass in `dtype`."""
    out: Tensor = _Product.apply(x.flatten(0, -2), weight, dtype)  # type: ignore[no-untyped-call]
    return (out if bias is None else out + bias).view(*x.shape[:-1], -1)


def residual_block(
    block: ResidualBlock, x: Tensor, dtype: torch.dtype, branch: type[torch.autograd.Function] | None = None
) -> Tensor:
    """As block(x) for x (B, C, H, W) float32, whose result is float32 too. Between both, all is in `dtype`.

    branch: what computes the block from its rows and weights, for blocks with another activation.
    """
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        mixed = block.spatial(x.to(dtype))
    layers = (part for layer in (block.expand, block.project) for part in (layer.weight.flatten(1), layer.bias))
    rows = (plane.permute(0, 2, 3, 1).flatten(0, 2) for plane in (x, mixed))
    out: Tensor = (branch or _Branch).apply(*rows, *layers)
    batch, _, height, width = x.shape
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


class _Product(torch.autograd.Function):
    """x (n, C) @ weight (C', C)^T, both float32 -> (n, C') float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        ctx.save_for_backward(x.to(dtype) if ctx.needs_input_grad[1] else None, weight.to(dtype))
        return x @ weight.t()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.to(ctx.dtype)
        return (
            (grad @ weight).float() if ctx.needs_input_grad[0] else None,
            (grad.t() @ x).float() if ctx.needs_input_grad[1] else None,
            None,
        )


class _Branch(torch.autograd.Function):
    """x + project(LeakyReLU(expand(mixed))): x (n, C) float32, mixed (n, C) -> (n, C) float32, in the type of mixed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mixed: Tensor, expand: Tensor, expand_bias: Tensor, project: Tensor, project_bias: Tensor
    ) -> Tensor:
        dtype = mixed.dtype
        expand, project = expand.to(dtype), project.to(dtype)
        wide = F.leaky_relu_(F.linear(mixed, expand, expand_bias.to(dtype)), SLOPE)
        ctx.save_for_backward(mixed if ctx.needs_input_grad[2] else None, wide, expand, project)
        return x + F.linear(wide, project, project_bias.to(dtype)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mixed, wide, expand, project = ctx.saved_tensors
        rounded = grad.to(wide.dtype)
        # The sign of LeakyReLU's result is that of its input, so the input need not be kept.
        inner = torch.ops.aten.leaky_relu_backward(rounded @ project, wide, SLOPE, True)
        towards_weights: tuple[Tensor | None, ...] = None, None, None, None
        if mixed is not None:
            expand_grads = (inner.t() @ mixed).float(), inner.sum(0).float()
            project_grads = (rounded.t() @ wide).float(), rounded.sum(0).float()
            towards_weights = *expand_grads, *project_grads
        return grad, inner @ expand, *towards_weights
