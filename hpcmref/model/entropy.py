"""The probability model of symbols: the generalized Gaussian of y and z, from which the number of bits follows."""

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
    """max(x, bound). Below the bound, the gradient still passes if a descent step would raise x."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound  # type: ignore[attr-defined]
        return x.clamp(min=bound)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return _passed(grad, x, ctx.bound), None  # type: ignore[attr-defined]


def _passed(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    """The gradient of max(x, bound): zero where x is below the bound and a descent step would lower it further."""
    return grad * ((x >= bound) | (grad < 0))


def lower_bound(x: Tensor, bound: float) -> Tensor:
    """max(x, bound) with the gradient that the official code uses (base.py, LowerBound)."""
    return _LowerBound.apply(x, bound)  # type: ignore[no-untyped-call]


_TAIL = (
    -0.0272119913,
    0.0759356207,
    -0.0127920037,
    -0.128610247,
    0.0383355738,
    0.164812558,
    0.00336106483,
    -0.197519715,
    -0.141503436,
    0.127202086,
    0.370104298,
    0.227886004,
)
_CENTRE = 1.5
"""The polynomial of `upper_tail`, the highest power first, and the number in its argument."""


def upper_tail(distance: Tensor) -> Tensor:
    """Probability that a variable of the generalized Gaussian of scale 1 exceeds `distance`, which is not negative.

    In float64 this is the incomplete gamma function. In other types it is exp(-distance^1.5) times a polynomial in
    1 / (1.5 + sqrt(distance)), which is as accurate as PyTorch's incomplete gamma function in float32 (relative error
    below 3e-6 up to a distance of 8), and consists of operations that a compiler can fuse. The polynomial was fitted to
    values of the function in float64 (Chebyshev points, weights raised where the relative error was largest).
    """
    if distance.dtype == torch.float64:
        exponent = torch.full((), 1 / BETA, dtype=distance.dtype, device=distance.device)
        return torch.special.gammaincc(exponent, distance**BETA).mul_(0.5)
    root = distance.sqrt()
    position = 2 * _CENTRE / (root + _CENTRE) - 1
    polynomial = torch.full_like(position, _TAIL[0])
    for coefficient in _TAIL[1:]:
        polynomial = polynomial.mul_(position).add_(coefficient)
    return polynomial.mul_((root * distance).neg_().exp_())


class _Likelihood(torch.autograd.Function):
    """See `likelihood`. The gradient uses that the derivative of the cumulative distribution is the density."""

    @staticmethod
    def forward(ctx: FunctionCtx, residual: Tensor, scales: Tensor) -> Tensor:
        distance = residual.abs()
        ends = torch.stack((distance + 0.5, distance - 0.5)).div_(scales.clamp(min=SCALE_BOUND))
        beyond = upper_tail(ends.abs())
        probability = torch.where(ends[1] < 0, 1 - beyond[1], beyond[1]).sub_(beyond[0])
        ctx.save_for_backward(residual, scales, ends, probability)
        return probability.clamp(min=LIKELIHOOD_BOUND)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        residual, scales, ends, probability = ctx.saved_tensors  # type: ignore[attr-defined]
        grad = _passed(grad, probability, LIKELIHOOD_BOUND) / scales.clamp(min=SCALE_BOUND)
        distance = ends.abs()
        density = (distance * distance.sqrt()).neg_().sub_(math.lgamma(1 / BETA)).exp_().mul_(BETA / 2)
        of_residual = (density[0] - density[1]) * grad * residual.sign()
        upper, lower = density.mul_(ends)
        return of_residual, _passed((lower - upper) * grad, scales, SCALE_BOUND)


def likelihood(residual: Tensor, scales: Tensor) -> Tensor:
    """Probability of the unit interval around `residual` under the generalized Gaussian of `scales`.

    Both arguments have the same shape, which may be any. The result has that shape and is at least LIKELIHOOD_BOUND.
    The official entropy_models.py (GGM.forward) computes the same function. Here the probability is the difference of
    two values of the tail on the interval's own side, so that small probabilities are not lost to rounding. The bounds
    of scale and likelihood have the gradient of `lower_bound`.
    """
    return _Likelihood.apply(residual, scales)  # type: ignore[no-untyped-call]


def bits(likelihoods: Tensor) -> Tensor:
    """Bits of each image: likelihoods (B, ...) -> (B,)."""
    return -likelihoods.log2().flatten(1).sum(1)


def scale_index(scales: Tensor, thresholds: Tensor) -> Tensor:
    """Row of the CDF table for each scale, int32: the number of `thresholds` (ascending, (59,)) below the scale."""
    return torch.bucketize(scales.contiguous(), thresholds, out_int32=True)


def quantise(residual: Tensor) -> Tensor:
    """The symbol of a residual: rounded half to even, and clamped to the range of the file format."""
    return residual.round().clamp_(SYMBOL_MIN, SYMBOL_MAX)
