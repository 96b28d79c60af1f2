"""What replaces each layer of the entropy path? Twins that add up integers held in float tensors.

"Qe" says that a value is an integer times 2^-e. See the package's docstring for why the twins are exact.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.errors import CheckpointError
from hpcmref.model.config import QUALITIES
from hpcmref.model.layers import RateTable

BOUNDS = {torch.float32: 2**24, torch.float64: 2**53}
"""A sum of integers whose magnitudes add up to less is exact in this type, in whatever order it is computed."""

EXP_STEPS = 32
"""Entries of the exponential table per unit of the exponent."""

EXP_TABLE = bytes.fromhex(
    "fff7f0e8e1dad3cdc7c0bbb5afaaa5a09b96918d8884807c7875716e6a6764615e5b585553504e4b49474543403e3d3b3937"
    "353432312f2e2c2b2a28272625242321201f1e1e1d1c1b1a191818171616151414131212111110100f0f0e0e0e0d0d0c0c0c"
    "0b0b0b0a0a0a0909090808080807070707070606060606050505050505050404040404040404030303030303030303030202"
    "0202020202020202020202020202020101010101010101010101010101010101010101010101010101010101010101010101"
    "00"
)
"""round(255 exp(-i / EXP_STEPS)), and 0 for all that follow."""


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents: (n,) integers -> (n,) float32. Exact, which pow and exp2 do not promise."""
    return torch.ldexp(torch.ones(len(exponents)), exponents.to(torch.int32))


def container(magnitude: float, name: str) -> torch.dtype:
    """The float type in which sums up to `magnitude` are exact. Raises CheckpointError if there is none."""
    for dtype, bound in BOUNDS.items():
        if magnitude < bound:
            return dtype
    raise CheckpointError(f"{name} cannot be computed exactly: its sums reach {magnitude:.3g}, over 2^53.")


class ExactConv(nn.Module):
    """Twin of a Conv2d or ConvTranspose2d.

    The input becomes integers, Q input[c] in channel c, clamped to +-limit. Weights are integers Q output[o] - input[c]
    and the bias Q output[o]; so the sums are integers Q output[o], exact in float32 or float64.
    """

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None
    output_scale: Tensor

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, grids: dict[str, Tensor], name: str) -> None:
        """grids: "input" (C_in,), "output" (C_out,) exponents and "limit" (), all integers. Raises CheckpointError."""
        super().__init__()
        assert layer.bias is not None
        if isinstance(layer, nn.ConvTranspose2d):
            if layer.stride != layer.kernel_size or any(layer.padding):
                raise CheckpointError(f"{name} is a transposed convolution whose outputs overlap.")
            self._convolve: Callable[..., Tensor] = F.conv_transpose2d
        else:
            self._convolve = F.conv2d
        self.options: dict[str, Any] = {"stride": layer.stride, "padding": layer.padding, "groups": layer.groups}
        weight, bias = integer_weights(layer, grids["input"], grids["output"])
        self.limit = int(grids["limit"])
        dtype = container(float((output_sums(layer, weight) * self.limit + bias.abs()).max()), name)
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.register_buffer("input_scale", power_of_two(grids["input"]).view(1, -1, 1, 1))
        self.register_buffer("output_scale", power_of_two(-grids["output"]).view(1, -1, 1, 1))

    def take_over(self, scale: Tensor) -> None:
        """Multiply the output by `scale` (1, C_out, 1, 1), powers of two, on behalf of the layer that reads it."""
        self.output_scale = self.output_scale * scale

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, h, w) float32 -> (B, C_out, h', w') float32."""
        x = x.clone() if self.input_scale is None else x * self.input_scale
        x = x.round_().clamp_(-self.limit, self.limit).to(self.weight.dtype)
        y = self._convolve(x, self.weight, self.bias, **self.options)
        return y.mul_(self.output_scale).float()


def integer_weights(
    layer: nn.Conv2d | nn.ConvTranspose2d, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight and bias as integers, float64: round(w 2^(output - input)) and round(b 2^output).

    inputs: (C_in,), outputs: (C_out,) exponents; scaling by powers of two is exact, so there is one rounding.
    """
    assert layer.bias is not None
    scale_in, scale_out = power_of_two(-inputs).double(), power_of_two(outputs).double()
    if isinstance(layer, nn.ConvTranspose2d):
        scale = scale_in[:, None, None, None] * scale_out[None, :, None, None]
    elif layer.groups == 1:
        scale = scale_out[:, None, None, None] * scale_in[None, :, None, None]
    else:
        scale = (scale_out * scale_in)[:, None, None, None]
    weight = (layer.weight.detach().cpu().double() * scale).round()
    return weight, (layer.bias.detach().cpu().double() * scale_out).round()


def output_sums(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """sum |w| over what one output reads: (C_out,), for a transposed convolution the largest of its output phases.

    Transposed convolutions of the entropy path have a stride as large as their kernel: an output reads one position.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.abs().sum(0).amax((1, 2))
    return weight.abs().sum((1, 2, 3))


def output_peaks(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """max |w| over what one output reads: (C_out,)."""
    return weight.abs().amax((0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else (1, 2, 3))


class ExactAttend(nn.Module):
    """Twin of Attend: both products on integers, the exponential from a table, one division.

    query, key and value arrive scaled to their grids (see `convert.attach`).
    """

    step: Tensor
    table: Tensor
    value_scale: Tensor

    def __init__(self, heads: int, grids: dict[str, Tensor], tokens: int, name: str) -> None:
        """grids: "query", "key", "value" exponents (C,) and "limits" (2,) of query and key, and of value, integers."""
        super().__init__()
        channels = len(grids["query"]) // heads
        score = (grids["query"].int() + grids["key"].int()).view(heads, channels)
        if (score != score[:, :1]).any():
            raise CheckpointError(f"{name} is damaged: the grids of query and key do not match.")
        self.limit, self.value_limit = (int(limit) for limit in grids["limits"])
        container_of_scores = container(float(channels * self.limit**2), name)
        container_of_values = container(float(tokens * max(EXP_TABLE) * self.value_limit), name)
        if {container_of_scores, container_of_values} != {torch.float32}:
            raise CheckpointError(f"{name} is damaged: attention is exact in float32 or not at all.")
        # One multiplication by a float32 number, correctly rounded: scores to table steps, with the 1/sqrt(channels).
        step = power_of_two(-score[:, 0]) * torch.tensor(EXP_STEPS / channels**0.5, dtype=torch.float32)
        self.register_buffer("step", step.view(heads, 1, 1))
        self.register_buffer("table", torch.tensor(list(EXP_TABLE), dtype=torch.float32))
        self.register_buffer("value_scale", power_of_two(-grids["value"]).view(heads, 1, channels))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        """All (B, windows, heads, tokens, channels); inside: which keys count, (windows, 1, 1, tokens) bool, or all."""
        query = query.round().clamp_(-self.limit, self.limit)
        key = key.round().clamp_(-self.limit, self.limit)
        value = value.round().clamp_(-self.value_limit, self.value_limit)
        scores = query @ key.transpose(-1, -2)
        if inside is not None:
            scores = scores.masked_fill(~inside, -float(BOUNDS[torch.float32]))
        below = (scores.amax(-1, keepdim=True) - scores).mul_(self.step).round_().clamp_(max=len(EXP_TABLE) - 1)
        weights = self.table[below.to(torch.int32)]
        if inside is not None:
            weights = weights * inside
        return (weights @ value).div_(weights.sum(-1, keepdim=True)).mul_(self.value_scale)


class ExactRateTable(nn.Module):
    """Twin of RateTable: the numbers of every whole quality, float32, interpolated in float64 and rounded once."""

    rows: Tensor

    def __init__(self, table: RateTable) -> None:
        super().__init__()
        values = table.values.detach().cpu().double()
        anchors = len(values)
        rows = []
        for quality in range(QUALITIES if anchors > 1 else 1):
            left, part = divmod(quality * (anchors - 1), QUALITIES - 1)
            right = min(left + 1, anchors - 1)
            weight = torch.tensor(part / (QUALITIES - 1), dtype=torch.float64)
            low, high = values[left] * (1 - weight), values[right] * weight
            rows.append(low + high)
        self.register_buffer("rows", torch.stack(rows).float())

    def forward(self, quality: Tensor) -> Tensor:
        """quality: (B,) whole numbers -> (B, channels, 1, 1)."""
        return self.rows[quality.long()]
