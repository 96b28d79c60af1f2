"""What replaces each layer of the entropy path? Twins that compute with integers held in float tensors.

Notation: x_int = clamp(round(x * 2^e)) is an integer in a float tensor; "Qe" says that a value is scaled by 2^e.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.errors import CheckpointError
from hpcmref.model.layers import RateTable

FLOAT32_BOUND = 2**24
FLOAT64_BOUND = 2**53
"""Below these, sums of integers are exact in float32 and float64, whatever their order."""

WEIGHT_BITS = 8
"""Resolution of attention weights: the largest is 2^8 - 1."""

TABLE_STEPS = 32
"""Entries of the exponential table per unit of the exponent."""

EXPONENTIAL = tuple(
    [255, 247, 240, 232, 225, 218, 211, 205, 199, 192, 187, 181, 175, 170, 165, 160]
)
