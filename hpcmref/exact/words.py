"""How are integers of 16 bits multiplied with integers of 8? As two bytes each, in units that multiply bytes.

    x = 256 high + low        -127 <= high <= 127, -128 <= low <= 127
    sum w x = 256 sum w high + sum w low

Processors multiply bytes four times as fast as float32 numbers, so both products together take half the time of one in
float32, and neither loses a bit: they are added up in 32 bits. Where there are no such units, or they saturate (AVX2
without VNNI), the same two products are computed in float32, in which they are exact too; or one, if that is.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from hpcmref.model.layers import pointwise
from hpcmref.runtime.torch_names import has_byte_units, int_mm

LIMIT = 127 * 256 + 127
"""The largest magnitude that two bytes hold so."""

WEIGHT_LIMIT = 127

WIDE = 2**20
"""Sums that residual blocks hold at a time: less than in float, as there are more numbers on the way to each."""


def fits(weight: Tensor, bias: Tensor, limit: int) -> Tensor:
    """For which outputs the integers may be used here: weight (C_out, C_in, 1, 1), bias (C_out,), |x| <= limit."""
    weight = weight.abs().flatten(1)
    sums = weight.sum(1)
    in_bytes = (weight.amax(1) <= WEIGHT_LIMIT) & (limit <= LIMIT)
    return in_bytes & (128 * sums < 2**24) & (sums * limit + bias.abs() < 2**31)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low bytes, int8, of integers up to LIMIT in any type."""
    words = x.to(torch.int16)
    high = (words + 128).bitwise_right_shift_(8)
    return high.to(torch.int8), torch.sub(words, high, alpha=256).to(torch.int8)


def product(x: Tensor, weight: Tensor, limit: int, narrow: bool = False) -> Tensor:
    """The sums of rows x (n, C_in), integers up to `limit` held as float32, times weight (C_in, C_out) int8.

    narrow: all of them, with the bias that follows, are below 2^24. Only then may they come as float32, else as int32.
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
    """Whether this device multiplies bytes in units of their own, and exactly; device: "cpu" or "cuda"."""
    return device == "cpu" and bool(torch.backends.mkldnn.enabled) and _multiplies_bytes()


@lru_cache(maxsize=1)
def _multiplies_bytes() -> bool:
    """The processor has such units, and PyTorch finds the known answers with them; asked once per process."""
    if not has_byte_units() or not torch.backends.mkldnn.is_available():
        return False
    random = np.random.RandomState(0)
    for rows, inputs, outputs in ((1, 64, 40), (77, 200, 129), (256, 1920, 64)):
        x, w = (random.choice([-128, -127, 127, 3], size) for size in ((rows, inputs), (inputs, outputs)))
        x[0], w[:, 0] = 127, 127  # sums that saturate 16 bits
        found = int_mm(*(torch.from_numpy(each.astype(np.int8)) for each in (x, w)))
        if not np.array_equal(found.numpy(), x @ w):
            return False
    return True
