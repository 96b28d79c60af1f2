"""The exact twins that replace the parts of a memory bank.

They compute with integers, mostly in float64, since their planes are small. Contexts are rounded to integers Q10 ("Q"
is explained in `layers`). Values beyond +-1024 quantiser steps are clamped, alike in the encoder and the decoder. The
magnitudes of sums stay below these bounds:

    Pool           4 x 4 positions below 2^20, in float32                                              2^24
    CellMean       positions of s3 (2^28 pixels, padded, are fewer than 2^22) below 2^24               2^46
    Recall         2^10 products of two numbers below 2^21                                             2^52
    LinearAttend   phi below 2^18, values below 2^20, at most 9 contexts of 32 x 32 tokens (< 2^14)    2^52
                   softmax: phi below 2^8, tokens of a lattice of s1 fewer than 2^18                   2^46
                   read: phi below 2^18, means of values below 2^20 times 2^5, 2^8 channels            2^51

All other operations are single ones: divisions, and look-ups in the table of exponentials.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.errors import CheckpointError
from hpcmref.exact.layers import EXP_STEPS, EXP_TABLE
from hpcmref.model.memory_bank import CellMean, LinearAttend, Pool, Recall, top

FRACTION = 10
"""Contexts, keys, queries and values are integers Q FRACTION: they have this many fractional bits."""

CONTEXT_LIMIT, KEY_LIMIT, PHI_LIMIT = 2**20 - 1, 2**21 - 1, 2**18 - 1

SIMILARITY = 2**20
"""Cosines are integers in units of 1 / SIMILARITY."""

MEAN_FRACTION = 5
"""Means of values have this many fractional bits more."""


def _whole(x: Tensor, limit: int = CONTEXT_LIMIT) -> Tensor:
    """Integers Q FRACTION, float64."""
    return (x.double() * 2**FRACTION).round_().clamp_(-limit, limit)


class _WithTable(nn.Module):
    """A module that takes exponentials from a table."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.tensor(list(EXP_TABLE), dtype=torch.float32, device="cpu"))

    def _exponential(self, below: Tensor) -> Tensor:
        """round(255 exp(-below / EXP_STEPS)), float32; below: any shape, 0 or more."""
        return self.table[below.round().clamp_(max=len(EXP_TABLE) - 1).to(torch.int32)]


class ExactPool(nn.Module):
    """Twin of Pool: integers, whose sums stay below 2^24."""

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.cell = pool.cell

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) float32 -> (B, C, h/cell, w/cell), cell 1, 2 or 4."""
        x = (x * 2**FRACTION).round_().clamp_(-CONTEXT_LIMIT, CONTEXT_LIMIT)
        return F.avg_pool2d(x, self.cell) * 2.0**-FRACTION


class ExactCellMean(nn.Module):
    """Twin of CellMean: integers Q14, as ExactPool makes them, and one division."""

    def __init__(self, mean: CellMean) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w) float32 -> (B, C, min(side, h), min(side, w)) float32."""
        fraction, limit = FRACTION + 4, 2.0**24
        return (self.mean((x.double() * 2**fraction).round_().clamp_(-limit, limit)) * 2.0**-fraction).float()


class ExactSigmoid(_WithTable):
    """Twin of Sigmoid: 1 / (1 + exp(-x)) with the exponential from the table."""

    def __init__(self, _: nn.Sigmoid) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Any shape, float32."""
        small = self._exponential(x.abs() * EXP_STEPS)
        one = float(EXP_TABLE[0])
        return torch.where(x >= 0, one, small) / (small + one)


class ExactRecall(_WithTable):
    """Twin of Recall. Similarities are integers, and their exponentials are too."""

    def __init__(self, recall: Recall) -> None:
        super().__init__()
        self.topk = recall.topk
        self.steps = EXP_STEPS / (recall.temperature * SIMILARITY)

    def forward(self, query: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
        """query and every key: (B, d, h, w) or (B, d, 1, 1); values: (B, C, H, W); all float32, also the result.

        Raises CheckpointError if d is above 1024, where the sums would not be exact.
        """
        if query.shape[1] > 2**10:
            raise CheckpointError(f"keys of {query.shape[1]} channels cannot be compared exactly: 1024 is the most")
        asked = _whole(query, KEY_LIMIT)
        similarity = torch.stack([_cosine(asked, _whole(key, KEY_LIMIT)) for key in keys], dim=1)
        below = (similarity.amax(1, keepdim=True) - similarity) * self.steps
        weights = self._exponential(below).double() * top(similarity, self.topk)
        shares = (weights * similarity / (weights.sum(1, keepdim=True) * SIMILARITY)).float()
        recalled = shares[:, 0, None] * values[0]
        for index in range(1, len(values)):
            recalled = recalled + shares[:, index, None] * values[index]
        return recalled


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """The cosine similarity of integers (B, d, h, w): (B, h, w), integers in units of 1 / SIMILARITY."""
    return ((a * b).sum(1) / (_root((a * a).sum(1)) * _root((b * b).sum(1))) * SIMILARITY).round_()


def _root(n: Tensor) -> Tensor:
    """Approximate the square roots of integers below 2^52 alike on every machine. The result is at least 1.

    PyTorch's own square root of float64 is not always correctly rounded (MKL's on x86). So only its whole part is used,
    which an integer test corrects, and one step of Newton's method refines it.
    """
    whole = n.sqrt().floor_()
    whole = whole - (whole * whole > n).double()
    whole = (whole + ((whole + 1) * (whole + 1) <= n).double()).clamp_(min=1)
    return ((whole + n / whole) * 0.5).clamp_(min=1)


class ExactLinearAttend(_WithTable):
    """Twin of LinearAttend. The sums over several contexts are integers held in float64."""

    def __init__(self, attend: LinearAttend) -> None:
        super().__init__()
        self.attend = attend

    def summary(self, key: Tensor, value: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
        """As LinearAttend.summary: key (B, d, h, w), value (B, e, h, w) and sharpness (B, heads, 1, 1), all float32.

        Returns integers held as float64: phi(key)^T value (B, heads, d/heads, e/heads), and the sum of phi(key)
        (B, heads, d/heads, 1).
        """
        key, value = self.attend.tokens(key) * sharpness, _whole(self.attend.tokens(value))
        if self.attend.feature_map != "softmax":
            phi = self._phi(key)
            return phi.transpose(2, 3) @ value, phi.sum(2)[..., None]
        phi = self._exponential((key.amax(2, keepdim=True) - key) * EXP_STEPS).double()
        means = (phi.transpose(2, 3) @ value / phi.sum(2)[..., None]).round_()
        return means, torch.ones_like(means[..., :1])

    def forward(self, query: Tensor, values: Tensor, weights: Tensor, sharpness: Tensor) -> Tensor:
        """As LinearAttend.forward: query (B, d, h, w) and sharpness (B, heads, 1, 1) are float32.

        values, weights: the integers that `summary` returns, or sums of them. Returns (B, e, h, w) float32. Raises
        CheckpointError if d/heads is above 256, where the sums would not be exact.
        """
        query_tokens = self.attend.tokens(query) * sharpness
        if self.attend.feature_map == "elu":  # the factor cancels; it keeps exponentials from all rounding to 0
            query_tokens = query_tokens - query_tokens.amax(3, keepdim=True).clamp_(max=0)
        phi = self._phi(query_tokens)
        if phi.shape[3] > 2**8:
            raise CheckpointError(f"heads of {phi.shape[3]} channels cannot be summed exactly: 256 is the most")
        total = weights.sum(2, keepdim=True).clamp(min=1)
        values = (values / total * 2**MEAN_FRACTION).round_()
        weights = (weights / total * 2 ** (FRACTION + MEAN_FRACTION)).round_()
        result = (phi @ values) / (phi @ weights).clamp_(min=1)
        return self.attend.plane(result.float(), query.shape)

    def _phi(self, x: Tensor) -> Tensor:
        """Integers, float64: 255 times the feature map."""
        one = EXP_TABLE[0]
        if self.attend.feature_map == "softmax":  # of a query; its sum cancels
            return self._exponential((x.amax(3, keepdim=True) - x) * EXP_STEPS).double()
        positive = (x.double().clamp_(min=0) * one).round_()
        if self.attend.feature_map == "elu":
            positive += self._exponential(x.clamp(max=0) * -EXP_STEPS)
        return positive.clamp_(max=PHI_LIMIT)


OF_MEMORY: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    Pool: ExactPool,
    CellMean: ExactCellMean,
    nn.Sigmoid: ExactSigmoid,
    Recall: ExactRecall,
    LinearAttend: ExactLinearAttend,
}
"""The twin of each part of a memory bank that is not a convolution."""
