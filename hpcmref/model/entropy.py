"""How many bits does a symbol cost? The generalized Gaussian of y and z."""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BETA = 1.5
"""Shape of the generalized Gaussian (official src/entropy_models: GGM)."""

SCALE_BOUND = 0.11999999731779099
"""Smallest scale: 0.12 as the official code holds it, in float32."""

LIKELIHOOD_BOUND = 9.999999717180685e-10
"""Smallest likelihood: 1e-9 in float32."""

SYMBOL_MIN, SYMBOL_MAX = -(2**15), 2**15 - 1
"""Range of a coded symbol; the file format holds 16 bits."""


class _LowerBound(torch.autograd.Function):
    """max(x, bound), whose gradient also passes below the bound where it would raise x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound  # type: ignore[attr-defined]
        return x.clamp(min=bound)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * ((x >= ctx.bound) | (grad < 0)), None  # type: ignore[attr-defined]


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) with the gradient that the official code uses (base.py, LowerBound)."""
    return _LowerBound.apply(x, bound)


class _Cdf(torch.autograd.Function):
    """Cumulative distribution of the unit generalized Gaussian; its gradient is the density."""

    @staticmethod
    def forward(ctx: FunctionCtx, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        power = v.abs().pow_(BETA)
        return torch.special.gammainc(torch.full_like(v[:0].sum(), 1 / BETA), power).mul_(v.sign()).add_(1).mul_(0.5)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> Tensor:
        (v,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return grad * v.abs().pow_(BETA).neg_().sub_(math.lgamma(1 / BETA)).exp_().mul_(BETA / 2)


def likelihood(residual: Tensor, scales: Tensor) -> Tensor:
    """Probability of the unit interval around `residual` under the generalized Gaussian of `scales`.

    Both of any one shape; the result has that shape and is at least LIKELIHOOD_BOUND. Same formula as the official
    entropy_models.py (GGM.forward), which does not fold to one tail: use float64 where the bits themselves matter.
    """
    scales = lower_bound(scales, SCALE_BOUND)
    upper = _Cdf.apply((residual + 0.5) / scales)
    lower = _Cdf.apply((residual - 0.5) / scales)
    return lower_bound(upper - lower, LIKELIHOOD_BOUND)


def bits(likelihoods: Tensor) -> Tensor:
    """Bits of each image: likelihoods (B, ...) -> (B,)."""
    return -likelihoods.log2().flatten(1).sum(1)


def scale_index(scales: Tensor, thresholds: Tensor) -> Tensor:
    """Row of the CDF table of each scale: the number of `thresholds` (ascending, (59,)) below it, int32."""
    return torch.bucketize(scales.contiguous(), thresholds, out_int32=True)


def quantise(residual: Tensor) -> Tensor:
    """The symbol of a residual: rounded half to even, within what the file format holds."""
    return residual.round().clamp_(SYMBOL_MIN, SYMBOL_MAX)
