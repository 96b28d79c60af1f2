"""The exact twins that replace the layers of the entropy path. They add up integers, most of them in float tensors.

"Qe" means that a value is a fixed-point number: an integer times 2^-e. The package's docstring explains why the results
are exact.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref.errors import CheckpointError
from hpcmref.exact import int16_matmul
from hpcmref.model.config import QUALITIES
from hpcmref.model.layers import QualityTable, pointwise

BOUNDS = {torch.float32: 2**24, torch.float64: 2**53}
"""If the magnitudes of integers add up to less than this, their sum is exact in this type in every order."""

EXPONENTS = 40
"""The exponents of grids are within +- this number, so that no value overflows and none is denormal."""

ROW_LIMIT, ROW_EXPONENT = 2**15, 24
"""Numbers that depend on the quality have a magnitude of at most ROW_LIMIT, and are rounded to Q ROW_EXPONENT.

So none of them is denormal.
"""

EXP_STEPS = 32
"""Entries of the exponential table per unit of the exponent."""

EXP_TABLE = bytes.fromhex(
    "fff7f0e8e1dad3cdc7c0bbb5afaaa5a09b96918d8884807c7875716e6a6764615e5b585553504e4b49474543403e3d3b3937"
    "353432312f2e2c2b2a28272625242321201f1e1e1d1c1b1a191818171616151414131212111110100f0f0e0e0e0d0d0c0c0c"
    "0b0b0b0a0a0a0909090808080807070707070606060606050505050505050404040404040404030303030303030303030202"
    "0202020202020202020202020202020101010101010101010101010101010101010101010101010101010101010101010101"
    "00"
)
"""Entry i is round(255 exp(-i / EXP_STEPS)); all entries after the last would be 0."""


def power_of_two(exponents: Tensor) -> Tensor:
    """2^exponents, float32, for integers within -126..127; exponents may have any shape, which the result has too.

    The numbers are made from their bits, as pow and ldexp are not guaranteed to be exact.
    """
    return (exponents.to(torch.int32) + 127 << 23).view(torch.float32)


def float_type(magnitude: float, name: str) -> torch.dtype:
    """The float type in which sums up to `magnitude` are exact. Raises CheckpointError if there is none."""
    for dtype, bound in BOUNDS.items():
        if magnitude < bound:
            return dtype
    raise CheckpointError(f"{name} cannot be computed exactly: its sums reach {magnitude:.3g}, and 2^53 is too much.")


def grid(grids: Mapping[str, Tensor], key: str, shape: tuple[int, ...], low: int, high: int, owner: str) -> Tensor:
    """The integers of one grid of a checkpoint, as int32.

    grids: the grids of one layer by key. low, high: the smallest and the largest permitted integer. owner: the layer,
    for the message. Raises CheckpointError if the grid is missing, or if its shape or range is wrong.
    """
    if key not in grids:
        raise CheckpointError(f"The checkpoint lacks the grid {key} of {owner}.")
    values = grids[key]
    integers = values.dtype in (torch.int8, torch.int32) and values.shape == shape
    if not integers or values.min() < low or values.max() > high:
        raise CheckpointError(f"The grid {key} of {owner} is damaged: it must be {shape} integers, {low} to {high}.")
    return values.to(torch.int32)


def _exponents(grids: Mapping[str, Tensor], key: str, channels: int, owner: str) -> Tensor:
    return grid(grids, key, (channels,), -EXPONENTS, EXPONENTS, owner)


class ExactConv(nn.Module):
    """Twin of a Conv2d or ConvTranspose2d.

    The input is rounded to integers, Q input[c] in channel c, and clamped to +-limit. Weights are integers
    Q (output[o] - input[c]) and the bias is Q output[o], so the sums are integers Q output[o]. For 1x1 convolutions
    that fit, they are computed by int8 matrix products (see `int16_matmul`), and otherwise in float32 or float64. The
    result is the sum, rounded to float32, times a power of two. Weights and biases held as floats are already
    multiplied by that power. This is exact: a power of two that multiplies all terms of a sum changes only their
    exponents.
    """

    weight: Tensor
    bias: Tensor
    input_scale: Tensor | None
    output_scale: Tensor | None

    def __init__(self, layer: nn.Conv2d | nn.ConvTranspose2d, grids: Mapping[str, Tensor], name: str) -> None:
        """grids: "input" (C_in,), "output" (C_out,) exponents and "limit" (), all integers. Raises CheckpointError."""
        super().__init__()
        self.out_channels = layer.out_channels
        self._outputs_first = not isinstance(layer, nn.ConvTranspose2d)
        self._convolve = _convolution_of(layer, name)
        inputs = _exponents(grids, "input", layer.in_channels, name)
        outputs = _exponents(grids, "output", layer.out_channels, name)
        self.limit = int(grid(grids, "limit", (), 1, BOUNDS[torch.float32] - 1, name))
        weight, bias = integer_weights(layer, inputs, outputs)
        magnitude = float((output_sums(layer, weight) * self.limit + bias.abs()).max())
        self._narrow = magnitude < BOUNDS[torch.float32]
        output_scale = None
        if is_pointwise(layer) and int16_matmul.fits(weight, bias, self.limit).all():
            self.register_buffer("weight", weight[:, :, 0, 0].T.to(torch.int8).contiguous())
            self.register_buffer("bias", bias.to(torch.int32))
            output_scale = torch.ones(layer.out_channels, dtype=torch.float32, device="cpu")
        else:
            dtype = float_type(magnitude, name)
            self.register_buffer("weight", weight.to(dtype))
            self.register_buffer("bias", bias.to(dtype))
        self.register_buffer("output_scale", output_scale)
        self.scale_output(-outputs)
        self._inputs = inputs
        self.register_buffer("input_scale", power_of_two(inputs).view(1, -1, 1, 1))

    def scale_output(self, exponents: Tensor) -> None:
        """Make this layer multiply its output channel o by 2^exponents[o] from now on; exponents: (C_out,) integers."""
        scale = power_of_two(exponents)
        if self.output_scale is not None:
            self.output_scale *= scale
            return
        scale = scale.to(self.weight.dtype)
        self.weight *= scale.view((-1, 1, 1, 1) if self._outputs_first else (1, -1, 1, 1))
        self.bias *= scale

    def fuse_scale_into(self, consumer: "ExactConv") -> None:
        """Make this layer scale its output as `consumer` needs its input, so that `consumer` need not scale it.

        `consumer` then owns its input, and overwrites it, so no other layer may read the output. A LeakyReLU may be in
        between.
        """
        self.scale_output(consumer._inputs)
        consumer.input_scale = None

    @property
    def owns_input(self) -> bool:
        """Whether `forward` overwrites its input, because another layer has made and scaled it for this one alone."""
        return self.input_scale is None

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C_in, h, w) float32 -> (B, C_out, h', w') float32.

        x is overwritten if `owns_input` is set (see `fuse_scale_into`).
        """
        if self.input_scale is not None:
            x = x * self.input_scale
        x = x.round_().clamp_(-self.limit, self.limit)
        if self.output_scale is None:
            return self._convolve(x.to(self.weight.dtype), self.weight, self.bias).float()
        rows = x.permute(0, 2, 3, 1)
        sums = int16_matmul.product(rows.flatten(0, 2), self.weight, self.limit, self._narrow).add_(self.bias)
        return sums.float().mul_(self.output_scale).view(*rows.shape[:3], -1).permute(0, 3, 1, 2)


def is_pointwise(layer: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether the layer is a 1x1 convolution, which is a matrix product."""
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.groups)
    return isinstance(layer, nn.Conv2d) and shape == ((1, 1), (1, 1), (0, 0), 1)


def _convolution_of(layer: nn.Conv2d | nn.ConvTranspose2d, name: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The function of (x, weight, bias) that the layer computes."""
    if isinstance(layer, nn.ConvTranspose2d):
        if layer.stride != layer.kernel_size or any((*layer.padding, *layer.output_padding, layer.groups - 1)):
            raise CheckpointError(f"{name} is a transposed convolution whose outputs overlap.")
        return partial(F.conv_transpose2d, stride=layer.stride)
    if is_pointwise(layer):
        return pointwise
    if layer.groups == 1:
        return partial(F.conv2d, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
    if (layer.groups, layer.kernel_size, layer.stride, layer.padding) != (layer.in_channels, (3, 3), (1, 1), (1, 1)):
        raise CheckpointError(f"{name} is a convolution in groups, and not a depthwise one of 3x3.")
    return depthwise


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """3x3 convolution of every channel with its own kernel: x (B, C, h, w), weight (C, 1, 3, 3), bias (C,).

    Where oneDNN or CUDA is used, this calls PyTorch's convolution. Without them, PyTorch's own CPU kernels process the
    channels one by one, or on ARM (macOS) use Winograd, which rounds (Convolution.cpp, use_cpu_depthwise3x3_winograd).
    So there the convolution is computed as the sum of nine shifted planes, each multiplied by one weight per channel.
    """
    onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled and x.dtype == torch.float32
    if onednn or x.is_cuda:
        return F.conv2d(x, weight, bias, padding=1, groups=len(weight))
    height, width = x.shape[2:]
    x = F.pad(x, (1, 1, 1, 1))
    terms = [
        (x[:, :, row : row + height, column : column + width], weight[:, 0, row, column, None, None])
        for row in range(3)
        for column in range(3)
    ]
    # The first sum makes a new tensor: an expanded bias might share the memory of the model's own bias, which must not
    # be overwritten.
    result = torch.addcmul(bias[:, None, None], *terms[0])
    for plane, factor in terms[1:]:
        result.addcmul_(plane, factor)
    return result


def integer_weights(layer: nn.Conv2d | nn.ConvTranspose2d, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias as integers, float64: round(w 2^(output - input)) and round(b 2^output).

    inputs: (C_in,) and outputs: (C_out,) exponents. Scaling by powers of two is exact, so each number is rounded once.
    """
    assert layer.bias is not None
    scale, scale_out = _weight_scales(layer, inputs, outputs)
    weight = (layer.weight.detach().cpu().double() * scale).round()
    return weight, (layer.bias.detach().cpu().double() * scale_out).round()


def float_weights(
    layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor, bias: Tensor, inputs: Tensor, outputs: Tensor
) -> tuple[Tensor, Tensor]:
    """The exact inverse of `integer_weights`: the weight and bias, float64, from which it makes these integers.

    layer: only its type and groups are used. weight, bias: the integers, in the shapes of those of `layer`. inputs:
    (C_in,) and outputs: (C_out,) exponents.
    """
    scale, scale_out = _weight_scales(layer, inputs, outputs)
    return weight.double() / scale, bias.double() / scale_out


def _weight_scales(layer: nn.Conv2d | nn.ConvTranspose2d, inputs: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """The float64 factors by which weight (in a shape that broadcasts) and bias (C_out,) become integers."""
    scale_in, scale_out = power_of_two(-inputs).double(), power_of_two(outputs).double()
    if isinstance(layer, nn.ConvTranspose2d):
        return scale_in[:, None, None, None] * scale_out[None, :, None, None], scale_out
    if layer.groups == 1:
        return scale_out[:, None, None, None] * scale_in[None, :, None, None], scale_out
    return (scale_out * scale_in)[:, None, None, None], scale_out


def output_sums(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """sum |w| over the inputs of one output: (C_out,).

    In the entropy path the stride of a transposed convolution equals its kernel size, so an output reads one position
    of the input. There the result is the largest sum over the output phases.
    """
    if isinstance(layer, nn.ConvTranspose2d):
        return weight.abs().sum(0).amax((1, 2))
    return weight.abs().sum((1, 2, 3))


def output_peaks(layer: nn.Conv2d | nn.ConvTranspose2d, weight: Tensor) -> Tensor:
    """max |w| over the inputs of one output: (C_out,)."""
    return weight.abs().amax((0, 2, 3) if isinstance(layer, nn.ConvTranspose2d) else (1, 2, 3))


class ExactAttend(nn.Module):
    """Twin of Attend. Both matrix products are of integers, a table gives the exponential, and one division follows.

    The layers before scale query, key and value to their grids (see `convert.attach`). All three are overwritten, since
    the caller has handed them over (see `Attend`).
    """

    step: Tensor
    table: Tensor
    value_scale: Tensor

    def __init__(self, channels: int, heads: int, grids: Mapping[str, Tensor], tokens: int, name: str) -> None:
        """grids: integers. "query", "key" and "value" are exponents (C,).

        "limits" (2,) has first the limit of query and key, and second that of value. tokens: the number of keys in a
        window. Raises CheckpointError.
        """
        super().__init__()
        query, key, value = (_exponents(grids, each, channels, name) for each in ("query", "key", "value"))
        per_head = channels // heads
        score = (query + key).view(heads, per_head)
        if (score != score[:, :1]).any():
            raise CheckpointError(f"{name} is damaged: the grids of query and key do not match.")
        limits = grid(grids, "limits", (2,), 1, BOUNDS[torch.float32] - 1, name)
        self.limit, self.value_limit = limits.tolist()
        for magnitude in (per_head * self.limit**2, tokens * max(EXP_TABLE) * self.value_limit):
            if float_type(magnitude, name) != torch.float32:
                raise CheckpointError(f"{name} cannot be computed exactly: its sums reach {magnitude}, over 2^24.")
        # One correctly rounded float32 factor converts scores to steps of the table; it includes the 1/sqrt(channels).
        step = power_of_two(-score[:, 0]) * torch.tensor(
            EXP_STEPS / math.sqrt(per_head), dtype=torch.float32, device="cpu"
        )
        self.register_buffer("step", step.view(heads, 1, 1))
        self.register_buffer("table", torch.tensor(list(EXP_TABLE), dtype=torch.float32, device="cpu"))
        self.register_buffer("value_scale", power_of_two(-value).view(heads, 1, per_head))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, inside: Tensor | None) -> Tensor:
        """query, key, value and the result: (B, windows, heads, tokens, channels).

        inside: which keys count, (windows, 1, 1, tokens) bool; None if all do.
        """
        query = query.round_().clamp_(-self.limit, self.limit)
        key = key.round_().clamp_(-self.limit, self.limit)
        value = value.round_().clamp_(-self.value_limit, self.value_limit)
        scores = query @ key.transpose(-1, -2)
        if inside is not None:
            scores = scores.masked_fill_(~inside, -float(BOUNDS[torch.float32]))
        below = (scores.amax(-1, keepdim=True) - scores).mul_(self.step).round_().clamp_(max=len(EXP_TABLE) - 1)
        weights = self.table.index_select(0, below.to(torch.int32).flatten()).view(below.shape)
        if inside is not None:
            weights = weights.mul_(inside)
        return (weights @ value).div_(weights.sum(-1, keepdim=True)).mul_(self.value_scale)


class ExactQualityTable(nn.Module):
    """Twin of QualityTable: the float32 numbers of every integer quality, each computed by single IEEE operations."""

    rows: Tensor

    def __init__(self, table: QualityTable, name: str) -> None:
        """Raises CheckpointError if a number is not finite or too large."""
        super().__init__()
        values = table.values.detach().cpu().double()
        if not (values.abs() <= ROW_LIMIT).all():
            raise CheckpointError(f"{name} cannot be computed exactly: it has numbers over {ROW_LIMIT}.")
        last, whole = len(values) - 1, QUALITIES - 1
        rows = []
        for quality in range(QUALITIES if last else 1):
            left, part = divmod(quality * last, whole)
            right = min(left + 1, last)
            rows.append((values[left] * (whole - part) + values[right] * part) / whole)
        fine = 2.0**ROW_EXPONENT
        self.register_buffer("rows", (torch.stack(rows) * fine).round().div(fine).float())

    def forward(self, quality: Tensor) -> Tensor:
        """quality: (B,) whole numbers -> (B, channels, 1, 1)."""
        return self.rows[quality.long()]
