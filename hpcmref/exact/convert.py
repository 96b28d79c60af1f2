"""Convert a trained (float) entropy path into one that computes exactly.

A few images are passed through the network to record the range of every channel. The ranges determine the grids: an
exponent for every channel, so that values become integers (fixed-point numbers), and a limit to which they are
clamped. With its grids, each layer is replaced by its exact twin, a module that computes the same function on integers.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcmref.errors import CheckpointError
from hpcmref.exact import int16_matmul
from hpcmref.exact.layers import (
    BOUNDS,
    EXP_TABLE,
    EXPONENTS,
    ExactAttend,
    ExactConv,
    ExactQualityTable,
    integer_weights,
    is_pointwise,
    output_peaks,
    output_sums,
)
from hpcmref.exact.memory_bank import OF_MEMORY
from hpcmref.model.context import Attend, CrossAttentionCell
from hpcmref.model.hpcm import EntropyPath
from hpcmref.model.layers import QualityTable, ResidualBlock

Grids = dict[str, dict[str, Tensor]]
"""Module name -> name of a grid -> integers: the exponents and limits that `ExactConv` and `ExactAttend` need."""

Convolution = nn.Conv2d | nn.ConvTranspose2d

MARGIN = 1.25
"""Ranges are this many times the largest value seen. On photographs 1 and 1.25 give the same rate, 0.7 a higher one."""

FINENESS = 64
"""Where `Bits` does not fix the levels of inputs, inputs get this many times as many levels as weights.

On training tiles, the shipped model's rate at its lowest quality rises by 0.15 % with 16, 0.01 % with 64 and 0.04 %
with 256. If no layer uses INT16_INPUTS, it rises by 0.9 % with 4.
"""

INT16_LEVELS = int16_matmul.LIMIT - 127
"""The number of levels of 16-bit inputs."""


@dataclass(frozen=True)
class Bits:
    """How fine the grids of a convolution are.

    levels: the number of levels of the inputs; None stands for FINENESS times the number of levels of the weights.
    bound: all sums are smaller than this.
    evenness: used for 1x1 convolutions only. Multiplying an input channel by a power of two, and dividing its weights
    by it, changes the ranges of both. 1 makes the ranges of the input channels equal, 0 the magnitudes of their
    weights, and numbers in between are a compromise (in the log domain).
    """

    levels: int | None
    bound: int
    evenness: float


# With these settings the shipped model's rate on training tiles is within 0.03 % of its rate in floating point up to
# quality 16, and within 0.06 % above.
INT16_INPUTS = Bits(INT16_LEVELS, 2**31, 0.25)
"""16-bit inputs, for the adaptors and priors, which predict scales and means.

With FLOAT32_SUMS instead, the rate would be up to 0.1 % higher, and with INT8_INPUTS 1 to 18 %.
"""
FLOAT32_SUMS = Bits(None, BOUNDS[torch.float32], 0.25)
"""Sums that are exact in float32, for all other convolutions.

On a processor without int8 instructions, one float32 matrix product is then enough, instead of one for each int8 half.
"""
INT8_INPUTS = Bits(int16_matmul.WEIGHT_LIMIT - 1, BOUNDS[torch.float32], 0.5)
"""8-bit inputs, for the convolutions that make queries and keys; this raises the rate by 0.01 %.

For values it would rise by 0.1 %, and for the output convolution of attention by up to 8 %.
"""


def calibrate(entropy: EntropyPath, run: Callable[[], None]) -> Grids:
    """Choose the grids of every layer.

    The integers of 1x1 convolutions then fit `int16_matmul`, and the sums of all other layers are exact in float32.

    run: a function that passes typical images through `entropy` (in its float form). Raises CheckpointError if weights
    or values are not finite, or too large.
    """
    ranges: dict[str, tuple[Tensor, ...]] = {}
    hooks = []
    for name, module in entropy.named_modules():
        if isinstance(module, Convolution | Attend):
            hooks.append(module.register_forward_pre_hook(_recorder(ranges, name)))
    try:
        with torch.inference_mode():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    grids: Grids = {}
    bits = _bits(entropy)
    for name, module in entropy.named_modules():
        if isinstance(module, Convolution):
            of_module = bits.get(module, FLOAT32_SUMS) if is_pointwise(module) else FLOAT32_SUMS
            grids[name] = _convolution_grids(module, ranges[name][0], of_module)
        elif isinstance(module, CrossAttentionCell):
            attend = f"{name}.attend"
            # An attention that never runs (the last one of a model without s3 steps) has no ranges and needs none.
            grids[attend] = _attention_grids(module, *ranges[attend])
    return grids


def _bits(entropy: EntropyPath) -> dict[nn.Module, Bits]:
    """The settings of the 1x1 convolutions that do not use FLOAT32_SUMS (and of modules that ignore them)."""
    context = entropy.context
    adaptors = (context.adaptor_s1, context.adaptor_s2, context.adaptor_s3)
    networks = (*adaptors, context.prior_s1_s2, context.prior_s3)
    predicting = {each: INT16_INPUTS for network in networks for each in network.modules()}
    cells = [module for module in entropy.modules() if isinstance(module, CrossAttentionCell)]
    return predicting | {each: INT8_INPUTS for cell in cells for each in (cell.conv_q, cell.conv_k)}


def attach(entropy: EntropyPath, grids: Grids) -> EntropyPath:
    """Return the exact twin of `entropy`, which must be float32 and on the CPU, and is not changed.

    Raises CheckpointError if a grid is missing or damaged, or no type holds the sums of a layer.
    """
    convolutions = {name: module for name, module in entropy.named_modules() if isinstance(module, Convolution)}
    # Convolutions hold nearly all of the weights. They are not copied, because they are replaced.
    entropy = copy.deepcopy(entropy, {id(module): module for module in convolutions.values()})
    for name, module in convolutions.items():
        entropy.set_submodule(name, ExactConv(module, grids.get(name, {}), name))
    for name, module in list(entropy.named_modules()):
        if isinstance(module, QualityTable):
            entropy.set_submodule(name, ExactQualityTable(module, name))
        elif type(module) in OF_MEMORY:
            entropy.set_submodule(name, OF_MEMORY[type(module)](module))
    for name, module in list(entropy.named_modules()):
        if isinstance(module, CrossAttentionCell):
            _attach_attention(module, grids.get(f"{name}.attend", {}), f"{name}.attend")
        elif isinstance(module, ResidualBlock):
            # LeakyReLU commutes with powers of two, so a layer can already scale its output as the next one needs it.
            _hand_over(module.expand, module.project)
            _hand_over(module.spatial, module.expand)
            module.wide = int16_matmul.WIDE
    return entropy.eval()


def _attach_attention(cell: CrossAttentionCell, grids: Mapping[str, Tensor], name: str) -> None:
    layers: dict[str, Any] = {"query": cell.conv_q, "key": cell.conv_k, "value": cell.conv_v}
    channels = len(layers["query"].bias)
    cell.attend = ExactAttend(channels, cell.heads, grids, cell.tokens, name)  # type: ignore[assignment]
    for operand, layer in layers.items():
        layer.scale_output(grids[operand])


def _hand_over(before: nn.Module, after: nn.Module) -> None:
    if isinstance(before, ExactConv) and isinstance(after, ExactConv):
        before.fuse_scale_into(after)


def _recorder(ranges: dict[str, tuple[Tensor, ...]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that records the largest magnitude of every channel of every input tensor in `ranges`."""

    def record(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, Attend):  # (B, windows, heads, tokens, channels)
            seen = tuple(x.abs().amax((0, 1, 3)).flatten() for x in inputs[:3])
        else:
            seen = (inputs[0].abs().amax((0, 2, 3)),)
        old = ranges.get(name, seen)
        ranges[name] = tuple(torch.maximum(x, y) for x, y in zip(seen, old, strict=True))

    return record


def _convolution_grids(layer: Convolution, ranges: Tensor, bits: Bits) -> dict[str, Tensor]:
    """Exponents per channel, from the largest magnitude of every input channel (C_in,)."""
    ranges = _usable(ranges)
    weight = layer.weight.detach().cpu().double()
    if not (weight.isfinite().all() and layer.bias is not None and layer.bias.isfinite().all()):
        raise CheckpointError("The model has weights that are not finite.")
    in_int8 = is_pointwise(layer)
    shift = ranges.log2()  # makes the ranges of all input channels equal
    if in_int8:  # a compromise with equal ranges of the weights, which have only 8 bits (see Bits.evenness)
        peaks = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
        columns = (weight.abs() / peaks).amax((0, 2, 3)).clamp(min=1e-9)
        shift = bits.evenness * shift - (1 - bits.evenness) * columns.log2()
    shift = torch.round(shift)
    even = weight * torch.exp2(shift).view((-1, 1, 1, 1) if _is_input_first(layer) else (1, -1, 1, 1))
    terms = max(1.0, float((output_sums(layer, even) / output_peaks(layer, even).clamp(min=1e-12)).max()))
    levels = bits.levels or min((bits.bound * FINENESS / terms) ** 0.5, INT16_LEVELS)
    spread = float((ranges * torch.exp2(-shift)).max())
    finest = int(torch.floor(torch.log2(torch.tensor(levels / spread, dtype=torch.float32, device="cpu"))))
    inputs, limit = _whole(finest - shift), int(spread * 2.0**finest) + 1
    # Every output channel gets the finest weights whose sums stay below the bound. The exponents are estimated first,
    # and lowered where rounding the weights has taken the sums over the bound.
    unscaled, bias = integer_weights(layer, inputs, torch.full((layer.out_channels,), EXPONENTS, device="cpu"))
    room = (bits.bound / _magnitudes(layer, unscaled, bias, limit)).log2()
    if in_int8:
        room = room.minimum((int16_matmul.WEIGHT_LIMIT / output_peaks(layer, unscaled).clamp(min=1)).log2())
    outputs = _whole(EXPONENTS + 1 + torch.floor(room))
    while (over := _over(layer, *integer_weights(layer, inputs, outputs), limit, bits.bound)).any():
        if outputs[over].min() <= -EXPONENTS:
            raise CheckpointError("The weights are too large for exact arithmetic.")
        outputs = outputs - over.to(torch.int8)
    return {"input": inputs, "output": outputs, "limit": torch.tensor(limit, dtype=torch.int32, device="cpu")}


def _over(layer: Convolution, weight: Tensor, bias: Tensor, limit: int, bound: int) -> Tensor:
    """Which output channels have weights or sums that are too large: (C_out,) bool."""
    over = _magnitudes(layer, weight, bias, limit) >= bound
    return over | ~int16_matmul.fits(weight, bias, limit) if is_pointwise(layer) else over


def _attention_grids(cell: CrossAttentionCell, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Exponents per channel, and limits.

    The exponents of query and key add up to the same number in all channels of a head: the exponent of its scores.
    """
    bound = BOUNDS[torch.float32] - 1
    query, key, value = (_usable(x).view(cell.heads, -1) for x in (query, key, value))
    limit = int((bound / query.shape[1]) ** 0.5)
    value_limit = bound // (cell.tokens * max(EXP_TABLE))
    scores = torch.floor((limit**2 / (query * key)).log2().amin(1, keepdim=True))
    of_query = torch.round((scores + (key / query).log2()) / 2)
    of_value = torch.floor((value_limit / value).log2())
    return {
        "query": _whole(of_query.flatten()),
        "key": _whole((scores - of_query).flatten()),
        "value": _whole(of_value.flatten()),
        "limits": torch.tensor([limit, value_limit], dtype=torch.int32, device="cpu"),
    }


def _magnitudes(layer: Convolution, weight: Tensor, bias: Tensor, limit: int) -> Tensor:
    """The largest sum that each output channel can reach: (C_out,) float64."""
    return (output_sums(layer, weight) * limit + bias.abs()).clamp(min=1)


def _whole(exponents: Tensor) -> Tensor:
    return exponents.clamp(-EXPONENTS, EXPONENTS).to(torch.int8)


def _usable(magnitudes: Tensor) -> Tensor:
    """Magnitudes times MARGIN, as float64.

    Channels that are always or nearly always zero get a thousandth of the largest magnitude.
    """
    magnitudes = magnitudes.detach().cpu().double()
    if not magnitudes.isfinite().all():
        raise CheckpointError("The model computes numbers that are not finite.")
    return (magnitudes * MARGIN).clamp(min=max(float(magnitudes.max()) * 1e-3, 1e-9))


def _is_input_first(layer: Convolution) -> bool:
    """Whether the first dimension of the weight is the input channel."""
    return isinstance(layer, nn.ConvTranspose2d) or layer.groups > 1
