"""Matrix products of 16-bit inputs and 8-bit weights, computed as two int8 matrix products.

Each input x is split into two halves, both int8:

    x = 256 high + low        -127 <= high <= 127, -128 <= low <= 127
    sum w x = 256 sum w high + sum w low

The int8 instructions of a processor (such as AVX-512 VNNI) are four times as fast as float32 arithmetic. So both int8
products together take half the time of one product in float32. They are exact, since they add up in 32-bit integers.
Where a processor has no such instructions, or they saturate (AVX2 without VNNI), the same two products are computed in
float32, in which they are exact too. If the whole sum is exact in float32, a single float32 product is enough there.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpcmref.model.layers import pointwise
from hpcmref.runtime.torch_names import has_int8_units, int_mm

LIMIT = 127 * 256 + 127
"""The largest magnitude of x that can be split into two int8 halves in this way."""

WEIGHT_LIMIT = 127

WIDE = 2**20
"""The number of sums that residual blocks hold at a time (see `ResidualBlock.wide`).

It is smaller than for float layers, because each sum here needs more intermediate values.
"""


def fits(weight: Tensor, bias: Tensor, limit: int) -> Tensor:
    """For which output channels the integers are small enough for `product`: (C_out,) bool.

    weight: (C_out, C_in, 1, 1); bias: (C_out,); both integers in any type. The inputs have |x| <= limit.
    """
    weight = weight.abs().flatten(1)
    sums = weight.sum(1)
    in_int8 = (weight.amax(1) <= WEIGHT_LIMIT) & (limit <= LIMIT)
    return in_int8 & (128 * sums < 2**24) & (sums * limit + bias.abs() < 2**31)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low half of x, both int8 and in the shape of x.

    x: integers of any type and shape, of magnitude up to LIMIT.
    """
    x = x.to(torch.int16)
    # The conversion of int16 to int8 keeps the lowest 8 bits, which are x - 256 high in two's complement.
    return (x + 128).bitwise_right_shift_(8).to(torch.int8), x.to(torch.int8)


def product(x: Tensor, weight: Tensor, limit: int, narrow: bool = False) -> Tensor:
    """The matrix product of x (n, C_in), integers up to `limit` held as float32, and weight (C_in, C_out) int8.

    narrow: all sums are below 2^24, even with the bias that is added later. Only then may the result be float32;
    otherwise it is int32.
    """
    fast = has_units(x.device.type)
    if narrow and not fast:
        return _in_float32(x, weight)
    multiply = int_mm if fast else _in_float32
    if limit <= WEIGHT_LIMIT:
        return multiply(x.to(torch.int8), weight).to(torch.int32)
    high, low = split(x)
    return multiply(low, weight).to(torch.int32).add_(multiply(high, weight).to(torch.int32), alpha=256)


def _in_float32(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.float().T[None, :, None]
    return pointwise(rows, weight.T.float()[:, :, None, None], None)[0, :, 0].T


def has_units(device: str) -> bool:
    """Whether this device has int8 instructions that are used here and are exact; device: "cpu" or "cuda"."""
    return device == "cpu" and bool(torch.backends.mkldnn.enabled) and _multiplies_int8()


@lru_cache(maxsize=1)
def _multiplies_int8() -> bool:
    """Whether the processor has int8 instructions, and PyTorch computes known answers correctly with them.

    This is checked once per process.
    """
    if not has_int8_units() or not torch.backends.mkldnn.is_available():
        return False
    random = np.random.RandomState(0)
    for rows, inputs, outputs in ((1, 64, 40), (77, 200, 129), (256, 1920, 64)):
        x, w = (random.choice([-128, -127, 127, 3], size) for size in ((rows, inputs), (inputs, outputs)))
        x[0], w[:, 0] = 127, 127  # sums that saturate 16 bits
        found = int_mm(*(torch.from_numpy(each.astype(np.int8)) for each in (x, w)))
        if not np.array_equal(found.numpy(), x @ w):
            return False
    return True
