"""How does a trained entropy path become an exact one? Images give ranges, ranges give grids, grids give twins."""

import copy
from collections.abc import Callable, Mapping
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

The shipped model's rate at its lowest quality rises by 0.9 % with 4, 0.24 % with 16, 0.06 % with 64, 0.22 % with 128
(training tiles).
"""

EVENNESS = 0.25
"""How much of the ranges of the inputs is evened out where inputs have 16 bits and weights 8; the rest is the weights'.
"""

LEVELS = 2**15 - 2**7
"""Levels of inputs with 16 bits."""


def calibrate(entropy: EntropyPath, run: Callable[[], None]) -> Grids:
    """Choose the grids of every layer: 1x1 convolutions are to fit `words`, all others to have sums in float32.

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
    for name, module in entropy.named_modules():
        if isinstance(module, Convolution):
            grids[name] = _convolution_grids(module, ranges[name][0])
        elif isinstance(module, CrossAttentionCell):
            attend = f"{name}.attend"
            # An attention that never runs (the last one of a model without s3 steps) has no ranges and needs none.
            grids[attend] = _attention_grids(module, *ranges[attend])
    return grids


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


def _convolution_grids(layer: Convolution, ranges: Tensor) -> dict[str, Tensor]:
    """Exponents per channel, from the largest magnitude of every input channel (C_in,)."""
    ranges = _usable(ranges)
    weight = layer.weight.detach().cpu().double()
    if not (weight.isfinite().all() and layer.bias is not None and layer.bias.isfinite().all()):
        raise CheckpointError("The model has weights that are not finite.")
    return _word_grids(layer, weight, ranges) if is_pointwise(layer) else _float_grids(layer, weight, ranges)


def _float_grids(layer: Convolution, weight: Tensor, ranges: Tensor) -> dict[str, Tensor]:
    """Exponents with which all sums stay below the bound of float32."""
    bound = BOUNDS[torch.float32] - 1
    shift = torch.round(ranges.log2())  # evens out the ranges of the input channels
    even = weight * torch.exp2(shift).view((-1, 1, 1, 1) if _is_input_first(layer) else (1, -1, 1, 1))
    terms = max(1.0, float((output_sums(layer, even) / output_peaks(layer, even).clamp(min=1e-12)).max()))
    inputs, limit = _input_grid(ranges, shift, (bound * FINENESS / terms) ** 0.5)
    unscaled, bias = integer_weights(layer, inputs, torch.full((layer.out_channels,), EXPONENTS))
    room = (bound / _magnitudes(layer, unscaled, bias, limit)).log2()

    def over(weight: Tensor, bias: Tensor) -> Tensor:
        return _magnitudes(layer, weight, bias, limit) > bound

    return _finest(layer, inputs, limit, EXPONENTS + 1 + torch.floor(room), over)


def _word_grids(layer: Convolution, weight: Tensor, ranges: Tensor) -> dict[str, Tensor]:
    """Exponents with which the layer fits `words`: weights of 8 bits, inputs of 16."""
    peaks = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-30)
    columns = (weight.abs() / peaks).amax((0, 2, 3)).clamp(min=1e-9)
    # Weights have half the bits, so above all they are evened out, and the inputs by what is left.
    inputs, limit = _input_grid(ranges, torch.round(EVENNESS * ranges.log2() - (1 - EVENNESS) * columns.log2()), LEVELS)
    unscaled, _ = integer_weights(layer, inputs, torch.full((layer.out_channels,), EXPONENTS))
    room = (words.WEIGHT_LIMIT / output_peaks(layer, unscaled).clamp(min=1)).log2()

    def over(weight: Tensor, bias: Tensor) -> Tensor:
        return ~words.fits(weight, bias, limit)

    return _finest(layer, inputs, limit, EXPONENTS + 1 + torch.floor(room), over)


def _input_grid(ranges: Tensor, shift: Tensor, levels: float) -> tuple[Tensor, int]:
    """Exponents of the inputs, -shift and what brings the largest up to `levels`; and the limit."""
    spread = float((ranges * torch.exp2(-shift)).max())
    finest = int(torch.floor(torch.log2(torch.tensor(levels / spread))))
    return _whole(finest - shift), int(spread * 2.0**finest) + 1


def _finest(
    layer: Convolution, inputs: Tensor, limit: int, exponents: Tensor, over: Callable[[Tensor, Tensor], Tensor]
) -> dict[str, Tensor]:
    """The grids with the finest weights of every output channel, from `exponents` down, that are not `over`.

    over: of integer weights and biases, which output channels they are too large for.
    """
    outputs = _whole(exponents)
    while (large := over(*integer_weights(layer, inputs, outputs))).any():
        if outputs[large].min() <= -EXPONENTS:
            raise CheckpointError("The weights are too large for exact arithmetic.")
        outputs = outputs - large.to(torch.int8)
    return {"input": inputs, "output": outputs, "limit": torch.tensor(limit, dtype=torch.int32)}


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
        "limits": torch.tensor([limit, value_limit], dtype=torch.int32),
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
