"""How does a trained entropy path become an exact one? Images give ranges, ranges give grids, grids give twins."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hpcmref.errors import CheckpointError
from hpcmref.exact import words
from hpcmref.exact.layers import (
    BOUNDS,
    EXP_TABLE,
    EXPONENTS,
    ExactAttend,
    ExactConv,
    ExactRateTable,
    integer_weights,
    is_pointwise,
    output_peaks,
    output_sums,
)
from hpcmref.exact.memory import OF_MEMORY
from hpcmref.model.context import Attend, CrossAttentionCell
from hpcmref.model.hpcm import EntropyPath
from hpcmref.model.layers import RateTable, ResidualBlock

Grids = dict[str, dict[str, Tensor]]
"""Module name -> name -> integers: what `ExactConv` and `ExactAttend` need."""

Convolution = nn.Conv2d | nn.ConvTranspose2d

MARGIN = 1.25
"""Ranges are this much wider than the largest value seen (1 and 1.25 cost the same rate on photographs, 0.7 more)."""

FINENESS = 64
"""Inputs get this many times the levels of weights.

The shipped model's rate at its lowest quality rises by 0.15 % with 16, 0.01 % with 64 and 0.04 % with 256, where there
are no WORDS by 0.9 % with 4 (training tiles).
"""

WORD_LEVELS = words.LIMIT - 127
"""Levels of inputs of 16 bits."""


@dataclass(frozen=True)
class Bits:
    """How fine the grids of a convolution are.

    levels: of the inputs, or None for FINENESS times those of the weights. bound: of the sums. evenness: how much of
    the ranges of its inputs is evened out in a 1x1 convolution; the rest is the weights'.
    """

    levels: int | None
    bound: int
    evenness: float


# With these the shipped model's rate on training tiles is within 0.03 % of that in float up to quality 16, and 0.06 %
# above.
WORDS = Bits(WORD_LEVELS, 2**31, 0.25)
"""Of what predicts scales and means. With FLOATS up to 0.1 % more, with BYTES 1 to 18 %."""
FLOATS = Bits(None, BOUNDS[torch.float32], 0.25)
"""Of all else. Where there are no units for bytes, one product is enough, as sums are exact in float32."""
BYTES = Bits(words.WEIGHT_LIMIT - 1, BOUNDS[torch.float32], 0.5)
"""Of queries and keys: costs 0.01 %. For values it would be 0.1 %, and for attention's other convolution up to 8 %."""


def calibrate(entropy: EntropyPath, run: Callable[[], None]) -> Grids:
    """Choose the grids of every layer: 1x1 convolutions fit `words`, and all others have sums in float32.

    run: passes typical images through `entropy` (in its float form). Raises CheckpointError if there are weights or
    values that are not finite, or too large.
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
            of_module = bits.get(module, FLOATS) if is_pointwise(module) else FLOATS
            grids[name] = _convolution_grids(module, ranges[name][0], of_module)
        elif isinstance(module, CrossAttentionCell):
            attend = f"{name}.attend"
            # An attention that never runs (the last one of a model without s3 steps) has no ranges and needs none.
            grids[attend] = _attention_grids(module, *ranges[attend])
    return grids


def _bits(entropy: EntropyPath) -> dict[nn.Module, Bits]:
    """Of the 1x1 convolutions that do not get FLOATS."""
    context = entropy.context
    adaptors = (context.adaptor_s1, context.adaptor_s2, context.adaptor_s3)
    predicting = {each: WORDS for part in (*adaptors, context.prior_s1_s2, context.prior_s3) for each in part.modules()}
    cells = [module for module in entropy.modules() if isinstance(module, CrossAttentionCell)]
    return predicting | {each: BYTES for cell in cells for each in (cell.conv_q, cell.conv_k)}


def attach(entropy: EntropyPath, grids: Grids) -> EntropyPath:
    """The exact twin of `entropy` (float32, on the CPU), which stays as it is.

    Raises CheckpointError if a grid is missing or damaged, or no type holds the sums of a layer.
    """
    convolutions = {name: module for name, module in entropy.named_modules() if isinstance(module, Convolution)}
    # Convolutions, nearly all of the weights, are not copied: they are replaced.
    entropy = copy.deepcopy(entropy, {id(module): module for module in convolutions.values()})
    for name, module in convolutions.items():
        entropy.set_submodule(name, ExactConv(module, grids.get(name, {}), name))
    for name, module in list(entropy.named_modules()):
        if isinstance(module, RateTable):
            entropy.set_submodule(name, ExactRateTable(module, name))
        elif type(module) in OF_MEMORY:
            entropy.set_submodule(name, OF_MEMORY[type(module)](module))
    for name, module in list(entropy.named_modules()):
        if isinstance(module, CrossAttentionCell):
            _attach_attention(module, grids.get(f"{name}.attend", {}), f"{name}.attend")
        elif isinstance(module, ResidualBlock):
            # LeakyReLU commutes with powers of two, so a layer can scale its output for the next one.
            _hand_over(module.expand, module.project)
            _hand_over(module.spatial, module.expand)
            module.wide = words.WIDE
    return entropy.eval()


def _attach_attention(cell: CrossAttentionCell, grids: Mapping[str, Tensor], name: str) -> None:
    layers: dict[str, Any] = {"query": cell.conv_q, "key": cell.conv_k, "value": cell.conv_v}
    channels = len(layers["query"].bias)
    cell.attend = ExactAttend(channels, cell.heads, grids, cell.tokens, name)  # type: ignore[assignment]
    for operand, layer in layers.items():
        layer.scale_output(grids[operand])


def _hand_over(before: nn.Module, after: nn.Module) -> None:
    if isinstance(before, ExactConv) and isinstance(after, ExactConv):
        before.feed(after)


def _recorder(ranges: dict[str, tuple[Tensor, ...]], name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that keeps the largest magnitude of every channel of every input tensor."""

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
    in_bytes = is_pointwise(layer)
    shift = ranges.log2()  # evens out the ranges of the input channels
    if in_bytes:  # and also the weights, which have few bits
        peaks = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
        columns = (weight.abs() / peaks).amax((0, 2, 3)).clamp(min=1e-9)
        shift = bits.evenness * shift - (1 - bits.evenness) * columns.log2()
    shift = torch.round(shift)
    even = weight * torch.exp2(shift).view((-1, 1, 1, 1) if _is_input_first(layer) else (1, -1, 1, 1))
    terms = max(1.0, float((output_sums(layer, even) / output_peaks(layer, even).clamp(min=1e-12)).max()))
    levels = bits.levels or min((bits.bound * FINENESS / terms) ** 0.5, WORD_LEVELS)
    spread = float((ranges * torch.exp2(-shift)).max())
    finest = int(torch.floor(torch.log2(torch.tensor(levels / spread, dtype=torch.float32, device="cpu"))))
    inputs, limit = _whole(finest - shift), int(spread * 2.0**finest) + 1
    # Every output channel gets the finest weights with which its sums stay in their bound: first estimated, then tried.
    unscaled, bias = integer_weights(layer, inputs, torch.full((layer.out_channels,), EXPONENTS, device="cpu"))
    room = (bits.bound / _magnitudes(layer, unscaled, bias, limit)).log2()
    if in_bytes:
        room = room.minimum((words.WEIGHT_LIMIT / output_peaks(layer, unscaled).clamp(min=1)).log2())
    outputs = _whole(EXPONENTS + 1 + torch.floor(room))
    while (over := _over(layer, *integer_weights(layer, inputs, outputs), limit, bits.bound)).any():
        if outputs[over].min() <= -EXPONENTS:
            raise CheckpointError("The weights are too large for exact arithmetic.")
        outputs = outputs - over.to(torch.int8)
    return {"input": inputs, "output": outputs, "limit": torch.tensor(limit, dtype=torch.int32, device="cpu")}


def _over(layer: Convolution, weight: Tensor, bias: Tensor, limit: int, bound: int) -> Tensor:
    """Which outputs have integers that are too large: (C_out,) bool."""
    over = _magnitudes(layer, weight, bias, limit) >= bound
    return over | ~words.fits(weight, bias, limit) if is_pointwise(layer) else over


def _attention_grids(cell: CrossAttentionCell, query: Tensor, key: Tensor, value: Tensor) -> dict[str, Tensor]:
    """Exponents per channel; those of query and key add up to one number per head, the grid of its scores."""
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
    """Magnitudes with a margin, as float64; channels that are (nearly) always zero get a thousandth of the largest."""
    magnitudes = magnitudes.detach().cpu().double()
    if not magnitudes.isfinite().all():
        raise CheckpointError("The model computes numbers that are not finite.")
    return (magnitudes * MARGIN).clamp(min=max(float(magnitudes.max()) * 1e-3, 1e-9))


def _is_input_first(layer: Convolution) -> bool:
    """The first dimension of the weight is the input channel."""
    return isinstance(layer, nn.ConvTranspose2d) or layer.groups > 1
