"""Is every exact layer what the integers say, and is everything refused that would not be exact?

The second implementation of each layer is Python integers and fractions: `round` of a Fraction rounds half to even,
and nothing in it can overflow or round.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coding import calibrated, there_and_back
from models import TINY, latents_of, model_of
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from hpcmref import checkpoints
from hpcmref.codec import Codec
from hpcmref.errors import CheckpointError, UnsupportedError
from hpcmref.exact import attach, exactly, guard, int16_matmul, repeatably
from hpcmref.exact.convert import (
    FLOAT32_SUMS,
    INT8_INPUTS,
    INT16_INPUTS,
    Bits,
    Grids,
    _attention_grids,
    _convolution_grids,
)
from hpcmref.exact.layers import (
    BOUNDS,
    EXP_STEPS,
    EXP_TABLE,
    EXPONENTS,
    ROW_EXPONENT,
    ExactAttend,
    ExactConv,
    ExactQualityTable,
    depthwise,
    power_of_two,
)
from hpcmref.format.rangecoder import scale_table
from hpcmref.model import HPCM, PRESETS
from hpcmref.model.coders import SymbolWriter
from hpcmref.model.context import Attend, CrossAttentionCell
from hpcmref.model.layers import QualityTable
from research.exactness_cost import bpp_and_psnr

CPU = torch.device("cpu")
FLOAT32, FLOAT64 = torch.float32, torch.float64

Convolution = nn.Conv2d | nn.ConvTranspose2d

LAYERS: dict[str, Callable[[], Convolution]] = {
    "1x1": lambda: nn.Conv2d(6, 5, 1),
    "3x3": lambda: nn.Conv2d(4, 3, 3, padding=1),
    "down": lambda: nn.Conv2d(3, 4, 2, stride=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6),
    "up": lambda: nn.ConvTranspose2d(4, 3, 2, stride=2),
}
EVERY_LAYER = pytest.mark.parametrize("kind", LAYERS)
EVERY_TYPE = pytest.mark.parametrize("dtype", BOUNDS, ids=["float32", "float64"])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# --- convolutions --------------------------------------------------------------------------------------------------


def whole(values: Tensor, exponents: Any) -> np.ndarray:
    """round(value 2^exponent) as Python integers; exponents of shapes that broadcast."""
    numbers, powers = np.broadcast_arrays(values.detach().double().numpy(), np.asarray(exponents))
    flat = [
        round(Fraction(number) * Fraction(2) ** power)
        for number, power in zip(numbers.ravel().tolist(), powers.ravel().tolist(), strict=True)
    ]
    return np.array(flat, dtype=object).reshape(numbers.shape)


def reference(layer: Convolution, grids: dict[str, Tensor], x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """What the twin of a layer computes, as integers (C_out, h', w') and as float32."""
    assert layer.bias is not None
    inputs, outputs = grids["input"].numpy().astype(int), grids["output"].numpy().astype(int)
    limit = int(grids["limit"])
    x_int = np.clip(whole(x, inputs[:, None, None]), -limit, limit)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = whole(layer.weight, (outputs[None] - inputs[:, None])[:, :, None, None])
    elif layer.groups > 1:
        weight = whole(layer.weight, (outputs - inputs)[:, None, None, None])
    else:
        weight = whole(layer.weight, (outputs[:, None] - inputs[None])[:, :, None, None])
    sums = convolved(layer, x_int, weight) + whole(layer.bias, outputs)[:, None, None]
    scaled = [np.float32(float(Fraction(int(s)) / Fraction(2) ** int(e))) for row, e in zip(sums, outputs, strict=True)
              for s in row.ravel()]  # fmt: skip
    return sums, np.array(scaled, np.float32).reshape(sums.shape)


def convolved(layer: Convolution, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """A convolution without bias, in the type of the arrays; x: (C_in, h, w)."""
    (rows, columns), stride = weight.shape[2:], layer.stride[0]
    if isinstance(layer, nn.ConvTranspose2d):
        y = np.zeros((weight.shape[1], rows * x.shape[1], columns * x.shape[2]), object)
        for row, column in np.ndindex(rows, columns):
            y[:, row::rows, column::columns] = np.tensordot(weight[:, :, row, column].T, x, 1)
        return y
    padding = layer.padding[0]
    assert isinstance(padding, int)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding)))
    height, width = ((side - kernel) // stride + 1 for side, kernel in zip(x.shape[1:], (rows, columns), strict=True))
    y = np.zeros((len(weight), height, width), object)
    for row, column in np.ndindex(rows, columns):
        part = x[:, row::stride, column::stride][:, :height, :width]
        tap = weight[:, :, row, column]
        y += tap[:, :1, None] * part if layer.groups > 1 else np.tensordot(tap, part, 1)
    return y


def random_layer(kind: str) -> tuple[Convolution, Tensor, Tensor]:
    """A layer, ranges of its input channels over four orders of magnitude, and an input of which some is beyond."""
    layer = LAYERS[kind]()
    ranges = 10 ** (4 * torch.rand(layer.in_channels) - 2)
    x = ranges.view(-1, 1, 1) * torch.randn(layer.in_channels, 4, 6)
    with torch.no_grad():
        shape = (-1, 1, 1, 1) if isinstance(layer, nn.ConvTranspose2d) or layer.groups > 1 else (1, -1, 1, 1)
        layer.weight /= ranges.view(shape)
    return layer, ranges, x


@pytest.fixture(params=["int8", "float32"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The int8 products run on int8 instructions, and where there are none in float32."""
    if request.param == "float32":
        monkeypatch.setattr(int16_matmul, "has_units", lambda device: False)
    elif not int16_matmul.has_units("cpu"):
        pytest.skip("there are no int8 instructions here")


EVERY_GRID = pytest.mark.parametrize(
    "bits", [INT8_INPUTS, FLOAT32_SUMS, INT16_INPUTS], ids=["int8", "float32", "int16"]
)


@EVERY_GRID
@EVERY_LAYER
def test_a_convolution_is_what_integers_say(kind: str, bits: Bits, units: None) -> None:
    layer, ranges, x = random_layer(kind)
    grids = _convolution_grids(layer, ranges, bits if kind == "1x1" else FLOAT32_SUMS)
    twin = ExactConv(layer, grids, kind)
    assert twin.weight.dtype == (torch.int8 if kind == "1x1" else FLOAT32)
    assert twin(x[None])[0].numpy().tolist() == reference(layer, grids, x)[1].tolist()


def extreme(kind: str, dtype: torch.dtype, over: int = 0) -> tuple[Convolution, dict[str, Tensor], Tensor]:
    """A layer whose weights are all as large as can be, and an input all at the limit: a sum is bound - 1 + over."""
    layer, bound = LAYERS[kind]().double(), BOUNDS[dtype]
    terms = layer.weight[0].numel() if isinstance(layer, nn.Conv2d) else layer.in_channels
    limit = 2**12 - 1 if dtype == FLOAT32 else 2**23 - 1
    each = (bound - 1) // (limit * terms)
    with torch.no_grad():
        layer.weight.fill_(each)
        assert layer.bias is not None
        layer.bias.fill_(bound - 1 - each * limit * terms)
        if isinstance(layer, nn.ConvTranspose2d):
            layer.weight[:, 1].neg_()
            layer.weight[::2, 2].neg_()
        else:
            layer.weight[1].neg_()
            layer.weight[2].mul_(torch.randint(0, 2, layer.weight[2].shape) * 2 - 1)
        layer.bias[1].neg_()
        layer.bias[0] += over
    zeros = {"input": torch.zeros(layer.in_channels), "output": torch.zeros(layer.out_channels)}
    grids = {name: exponents.to(torch.int8) for name, exponents in zeros.items()}
    return layer, grids | {"limit": torch.tensor(limit, dtype=torch.int32)}, torch.full((layer.in_channels, 4, 6), 1e9)


@EVERY_TYPE
@EVERY_LAYER
def test_a_convolution_is_exact_up_to_the_bound(kind: str, dtype: torch.dtype) -> None:
    layer, grids, x = extreme(kind, dtype)
    twin = ExactConv(layer, grids, kind)
    sums, expected = reference(layer, grids, x)
    assert twin.weight.dtype == dtype
    assert (sums.max(), sums.min()) == (BOUNDS[dtype] - 1, 1 - BOUNDS[dtype])
    assert twin(x[None])[0].numpy().tolist() == expected.tolist()
    x[::2].neg_()
    assert twin(x[None])[0].numpy().tolist() == reference(layer, grids, x)[1].tolist()


@EVERY_LAYER
def test_a_convolution_one_over_the_bound_is_not_exact(kind: str) -> None:
    layer, grids, _ = extreme(kind, FLOAT32, over=1)
    assert ExactConv(layer, grids, kind).weight.dtype == FLOAT64
    layer, grids, _ = extreme(kind, FLOAT64, over=1)
    with pytest.raises(CheckpointError, match="cannot be computed exactly"):
        ExactConv(layer, grids, kind)


def words_at_the_bound(over: int = 0) -> tuple[nn.Conv2d, dict[str, Tensor], Tensor]:
    """A layer whose weights and inputs all are at their limits, and whose sums reach 2^31 - 1 + over."""
    channels = (2**31 - 1) // (int16_matmul.WEIGHT_LIMIT * int16_matmul.LIMIT)
    layer = nn.Conv2d(channels, 3, 1).double()
    with torch.no_grad():
        layer.weight.fill_(int16_matmul.WEIGHT_LIMIT)
        layer.weight[1].neg_()
        layer.weight[2] *= torch.randint(0, 2, layer.weight[2].shape) * 2 - 1
        layer.bias.copy_(
            torch.tensor([1, -1, 1]) * (2**31 - 1 - int16_matmul.WEIGHT_LIMIT * int16_matmul.LIMIT * channels)
        )
        layer.bias[1] -= over
    grids = {"input": torch.zeros(channels, dtype=torch.int8), "output": torch.zeros(3, dtype=torch.int8)}
    limit = torch.tensor(int16_matmul.LIMIT, dtype=torch.int32)
    return layer, grids | {"limit": limit}, torch.full((channels, 5, 4), 1e9)


def test_words_are_exact_up_to_the_bound(units: None) -> None:
    layer, grids, x = words_at_the_bound()
    twin = ExactConv(layer, grids, "layer")
    assert twin.weight.dtype == torch.int8
    sums, expected = reference(layer, grids, x)
    assert (sums.max(), sums.min()) == (2**31 - 1, 1 - 2**31)
    assert twin(x[None])[0].numpy().tolist() == expected.tolist()
    x[::2].neg_()
    assert twin(x[None])[0].numpy().tolist() == reference(layer, grids, x)[1].tolist()


def test_a_bias_beyond_what_float32_holds_is_added_exactly(units: None) -> None:
    """To sums of int8 products, which float32 does hold."""
    layer = nn.Conv2d(64, 3, 1).double()
    with torch.no_grad():
        layer.weight.copy_(torch.randint(-127, 128, layer.weight.shape))
        layer.bias.copy_(torch.tensor([2**30 + 65, -(2**30) - 63, 2**25 + 3]))
    grids = {"input": torch.zeros(64, dtype=torch.int8), "output": torch.zeros(3, dtype=torch.int8)}
    grids["limit"] = torch.tensor(127, dtype=torch.int32)
    x = torch.randint(-127, 128, (64, 16, 16)).float()
    twin = ExactConv(layer, grids, "layer")
    assert twin.weight.dtype == torch.int8
    assert twin(x[None])[0].numpy().tolist() == reference(layer, grids, x)[1].tolist()


def test_what_does_not_fit_words_is_not_computed_in_them() -> None:
    layer, grids, x = words_at_the_bound(over=1)
    twin = ExactConv(layer, grids, "layer")
    assert twin.weight.dtype == FLOAT64
    assert twin(x[None])[0].numpy().tolist() == reference(layer, grids, x)[1].tolist()
    fitting, bias = torch.full((1, 4, 1, 1), 127.0), torch.zeros(1)
    assert int16_matmul.fits(fitting, bias, int16_matmul.LIMIT).all()
    assert not int16_matmul.fits(fitting + 1, bias, int16_matmul.LIMIT).any()
    assert not int16_matmul.fits(fitting, bias, int16_matmul.LIMIT + 1).any()
    assert not int16_matmul.fits(fitting, bias + 2**31, int16_matmul.LIMIT).any()
    assert not int16_matmul.fits(torch.full((1, 1033, 1, 1), 127.0), bias, 128).any()  # int8 inputs


def test_a_word_is_its_two_bytes() -> None:
    x = torch.arange(-int16_matmul.LIMIT, int16_matmul.LIMIT + 1)
    high, low = int16_matmul.split(x.float())
    assert torch.equal(256 * high.int() + low, x.int())
    assert (int(high.min()), int(high.max())) == (-127, 127)


def test_units_that_saturate_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of AVX2 do without VNNI: two products are added in 16 bits."""

    def saturating(x: Tensor, w: Tensor) -> Tensor:
        pairs = x.int()[:, :, None] * w.int()
        pairs = F.pad(pairs, (0, 0, 0, x.shape[1] % 2)).unflatten(1, (-1, 2)).sum(2)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(1).int()

    monkeypatch.setattr(torch, "_int_mm", saturating)
    assert not int16_matmul._multiplies_int8.__wrapped__()
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not int16_matmul.has_units("cpu")


@EVERY_LAYER
def test_a_convolution_is_close_to_its_float_twin(kind: str) -> None:
    """Within half a step of every input and every weight, for what is inside the ranges."""
    layer, ranges, x = random_layer(kind)
    x = torch.minimum(torch.maximum(x, -ranges.view(-1, 1, 1)), ranges.view(-1, 1, 1))
    grids = _convolution_grids(layer, ranges, FLOAT32_SUMS)
    difference = (ExactConv(layer, grids, kind)(x[None]) - layer(x[None])).abs()[0].detach().double()

    inputs, outputs = grids["input"].double(), grids["output"].double()
    dx = torch.exp2(-inputs - 1).view(-1, 1, 1).expand(x.shape)
    dw = torch.exp2(inputs - outputs.view(-1, 1) - 1)  # (C_out, C_in)
    if layer.groups > 1:
        dw = dw.diagonal()[:, None]
    dw = (dw.T if isinstance(layer, nn.ConvTranspose2d) else dw)[:, :, None, None].expand(layer.weight.shape)
    magnitude = layer.weight.detach().double().abs()
    bound = convolved(layer, dx.numpy(), (magnitude + dw).numpy()) + convolved(
        layer, x.abs().double().numpy(), dw.numpy()
    )
    bound = bound.astype(float) + torch.exp2(-outputs - 1).view(-1, 1, 1).numpy()
    assert (difference.numpy() <= bound + 1e-5 * bound.max()).all()
    assert bound.max() < 0.05 * float(layer(x[None]).detach().abs().max())


def test_the_order_of_a_sum_changes_nothing() -> None:
    layer = nn.Conv2d(256, 64, 1)
    x = torch.randn(1, 256, 12, 12) * 10 ** (2 * torch.rand(256, 1, 1))
    grids = _convolution_grids(layer, x.abs().amax((0, 2, 3)), INT16_INPUTS)
    twin, order = ExactConv(layer, grids, "layer"), torch.randperm(256)
    shuffled = nn.Conv2d(256, 64, 1)
    shuffled.load_state_dict({"weight": layer.weight[:, order], "bias": layer.bias})
    twin_of_shuffled = ExactConv(shuffled, grids | {"input": grids["input"][order]}, "shuffled")
    assert torch.equal(twin(x), twin_of_shuffled(x[:, order]))
    assert not torch.equal(layer(x), shuffled(x[:, order]))  # as it does in floating point
    assert twin.input_scale is not None
    assert twin.output_scale is not None
    rows = (x * twin.input_scale).round().clamp(-twin.limit, twin.limit)[0].flatten(1).T
    parts = [
        int16_matmul.product(rows[:, part::7], twin.weight[part::7], twin.limit) for part in torch.randperm(7).tolist()
    ]
    sums = torch.stack(parts).sum(0, dtype=torch.int32) + twin.bias
    assert torch.equal(twin(x)[0].flatten(1).T, sums * twin.output_scale)


@EVERY_TYPE
def test_both_depthwise_kernels_agree(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, _, x = extreme("depthwise", dtype)
    assert layer.bias is not None
    arguments = x[None].to(dtype).clamp(max=4000), layer.weight.to(dtype), layer.bias.to(dtype)
    expected = F.conv2d(*arguments, padding=1, groups=6)
    assert torch.equal(depthwise(*arguments), expected)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(F, "conv2d", None)
    assert torch.equal(depthwise(*arguments), expected)
    twice = torch.cat((arguments[0], -arguments[0]))
    assert torch.equal(depthwise(twice, *arguments[1:])[:1], expected)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(1, 1), (1, 5), (4, 1), (3, 3)])
@EVERY_TYPE
def test_depthwise_without_onednn_never_writes_into_the_model(
    dtype: torch.dtype, size: tuple[int, int], batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a plane of 1x1 positions an expanded bias is the bias itself: writing into it spoilt every later file."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    x, weight, bias = (torch.full(shape, 3.0, dtype=dtype) for shape in ((batch, 6, *size), (6, 1, 3, 3), (6,)))
    result = depthwise(x, weight, bias)
    assert result.shape == x.shape
    assert result[0, 0, 0, 0] == 3 + 9 * min(size[0], 2) * min(size[1], 2)
    result.zero_()
    for tensor in (x, weight, bias):
        assert (tensor == 3).all()


def test_a_layer_may_scale_its_output_for_the_next() -> None:
    first, second = (random_layer("1x1")[0] for _ in range(2))
    second = nn.Conv2d(5, 7, 1)
    x = torch.randn(1, 6, 8, 8)
    grids = [_convolution_grids(layer, torch.rand(layer.in_channels) + 0.5, INT16_INPUTS) for layer in (first, second)]
    alone = [ExactConv(layer, grid, "layer") for layer, grid in zip((first, second), grids, strict=True)]
    expected = alone[1](F.leaky_relu(alone[0](x), 0.01))
    alone[0].fuse_scale_into(alone[1])
    assert alone[1].owns_input
    assert torch.equal(alone[1](F.leaky_relu(alone[0](x), 0.01)), expected)


# --- attention -----------------------------------------------------------------------------------------------------

CHANNELS, HEADS, WINDOW = 24, 3, 2


def attention(spread: float) -> tuple[ExactAttend, dict[str, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A twin of Attend, its grids, and query, key and value (1, windows, heads, tokens, channels), some beyond them."""
    cell = CrossAttentionCell(CHANNELS, WINDOW, HEADS)
    operands = tuple(spread * torch.randn(1, 5, HEADS, WINDOW**2, CHANNELS // HEADS) for _ in range(3))
    ranges = [x.abs().amax((0, 1, 3)).flatten() / 1.2 for x in operands]
    grids = _attention_grids(cell, *ranges)
    return ExactAttend(CHANNELS, HEADS, grids, WINDOW**2, "attend"), grids, operands  # type: ignore[return-value]


def scaled(operands: tuple[Tensor, ...], grids: dict[str, Tensor]) -> list[Tensor]:
    """As the layers before the twin do it."""
    names = ("query", "key", "value")
    return [x * power_of_two(grids[name]).view(HEADS, 1, -1) for x, name in zip(operands, names, strict=True)]


def attended(grids: dict[str, Tensor], operands: tuple[Tensor, ...], inside: Tensor | None) -> np.ndarray:
    """What the twin computes: integer sums, and one float32 operation of NumPy where it has one."""
    limits = (grids["limits"][[0, 0, 1]]).tolist()
    exponents = [grids[name].numpy().astype(int).reshape(HEADS, 1, -1) for name in ("query", "key", "value")]
    query, key, value = (
        np.clip(whole(x[0], e), -limit, limit) for x, e, limit in zip(operands, exponents, limits, strict=True)
    )
    step = np.float32(EXP_STEPS / math.sqrt(CHANNELS // HEADS)) * np.float32(2.0) ** -(exponents[0] + exponents[1])
    result = np.empty(value.shape, np.float32)
    for window, head in np.ndindex(*value.shape[:2]):
        keys = np.arange(WINDOW**2) if inside is None else np.flatnonzero(inside[window].numpy())
        scores = query[window, head] @ key[window, head][keys].T
        below = (scores.max(1, keepdims=True) - scores).astype(np.float32) * step[head, 0, 0].astype(np.float32)
        weights = np.frombuffer(EXP_TABLE, np.uint8)[np.minimum(np.rint(below), len(EXP_TABLE) - 1).astype(int)]
        weights = weights.astype(object)
        sums = (weights @ value[window, head][keys]).astype(np.float32)
        quotients = sums / weights.sum(1, keepdims=True).astype(np.float32)
        result[window, head] = quotients * np.float32(2.0) ** -exponents[2][head]
    return result


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0, 1e4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_what_integers_say(spread: float, masked: bool) -> None:
    twin, grids, operands = attention(spread)
    inside = torch.rand(5, 1, 1, WINDOW**2) < 0.6 if masked else None
    if inside is not None:
        inside[..., 0] = True
    assert twin(*scaled(operands, grids), inside)[0].numpy().tolist() == attended(grids, operands, inside).tolist()


def test_attention_is_exact_up_to_the_bound() -> None:
    """Scores and sums of values as large as can be, of either sign."""
    twin, grids, operands = attention(1.0)
    for x in operands:
        x.fill_(1e6)
    operands[0][:, ::2].neg_()
    operands[2][..., ::2].neg_()
    assert CHANNELS // HEADS * twin.limit**2 < 2**24 <= CHANNELS // HEADS * (twin.limit + 1) ** 2
    assert WINDOW**2 * 255 * twin.value_limit < 2**24 <= WINDOW**2 * 255 * (twin.value_limit + 1)
    result = twin(*scaled(operands, grids), None)
    assert result[0].numpy().tolist() == attended(grids, operands, None).tolist()
    assert (result * power_of_two(grids["value"]).view(HEADS, 1, -1)).abs().unique().tolist() == [twin.value_limit]


def test_the_order_of_keys_changes_nothing() -> None:
    twin, grids, operands = attention(1.0)
    query, key, value = scaled(operands, grids)
    order = torch.randperm(WINDOW**2)
    shuffled = key[:, :, :, order].clone(), value[:, :, :, order].clone()
    assert torch.equal(twin(query.clone(), key, value, None), twin(query, *shuffled, None))


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_attention_is_close_to_its_float_twin(spread: float) -> None:
    """Within half a step of all operands, of the table's exponents and of its entries."""
    twin, grids, operands = attention(spread)
    query, key, value = (torch.clamp(x, *(sign * x.abs().amax((0, 1, 3), True) / 1.2 for sign in (-1, 1)))
                         for x in operands)  # fmt: skip
    difference = (twin(*scaled((query, key, value), grids), None) - Attend()(query, key, value, None)).abs()

    dq, dk, dv = (torch.exp2(-grids[name].float() - 1).view(HEADS, 1, -1) for name in ("query", "key", "value"))
    most_q, most_k, most_v = (x.abs().amax((0, 1, 3)).view(HEADS, 1, -1) for x in (query, key, value))
    score = (most_q * dk + most_k * dq + dq * dk).sum(-1, keepdim=True) / math.sqrt(CHANNELS // HEADS)
    ratio = torch.exp(2 * score + 1 / EXP_STEPS) * (1 + WINDOW**2 / 255) - 1  # of a weight to its float twin
    assert (difference <= 2 * ratio * most_v + dv).all()
    assert difference.mean() < 0.02 * spread  # and as a rule much less


# --- tables --------------------------------------------------------------------------------------------------------


def test_powers_of_two_are_exact() -> None:
    exponents = torch.arange(-126, 128, dtype=torch.int32)
    assert power_of_two(exponents).tolist() == [2.0**e for e in range(-126, 128)]
    assert power_of_two(exponents[80:160].to(torch.int8)).tolist() == [2.0**e for e in range(-46, 34)]


def test_the_exponential_table() -> None:
    assert list(EXP_TABLE) == [round(255 * math.exp(-i / EXP_STEPS)) for i in range(len(EXP_TABLE))]
    assert round(255 * math.exp(-len(EXP_TABLE) / EXP_STEPS)) == EXP_TABLE[-1] == 0


@pytest.mark.parametrize("anchors", [1, 2, 8])
def test_tables_of_the_quality_are_what_fractions_say(anchors: int) -> None:
    table = QualityTable(torch.ones(anchors), 5)
    nn.init.normal_(table.values)
    with torch.no_grad():
        table.values[:, 0] = 1e-30  # nearly a denormal, times a scale quite one
        table.values[:, 1] *= 1000
    rows = ExactQualityTable(table, "table").rows
    assert len(rows) == (64 if anchors > 1 else 1)
    values = table.values.detach()
    for quality in range(len(rows)):
        position = Fraction(quality * (anchors - 1), 63)
        left = min(int(position), max(anchors - 2, 0))
        right = min(left + 1, anchors - 1)
        for channel in range(5):
            low, high = (Fraction(float(values[anchor, channel])) for anchor in (left, right))
            expected = low + (high - low) * (position - left)
            found = Fraction(float(rows[quality, channel]))
            assert abs(found - expected) <= Fraction(1, 2**ROW_EXPONENT) + abs(expected) / 2**24
            assert found == 0 or abs(found) >= Fraction(1, 2**ROW_EXPONENT)


def test_thresholds_are_correctly_rounded_square_roots(codec: Codec) -> None:
    """As FORMAT.md says: the float32 number nearest to the square root of the product of two scales."""
    scales = [Fraction(float(scale)) for scale in scale_table()]
    thresholds = codec.latents.thresholds.cpu().numpy()
    for low, high, found in zip(scales, scales[1:], thresholds, strict=False):
        below, above = (np.nextafter(found, np.float32(limit)) for limit in (0, 100))
        half = Fraction(float(found)) / 2
        assert (half + Fraction(float(below)) / 2) ** 2 < low * high < (half + Fraction(float(above)) / 2) ** 2


# --- whole models --------------------------------------------------------------------------------------------------

SMALL: dict[str, dict[str, Any]] = {"M": 32, "N": 16, "context_width": 40}
MODELS = {
    "nano": TINY,
    "no attention": dataclasses.replace(TINY, heads=0),
    "base": dataclasses.replace(PRESETS["base"], **SMALL, heads=4, stages=((16, 1),) * 3, synthesis=((16, 1),) * 3),
    "phi": dataclasses.replace(PRESETS["phi"], **SMALL, stages=((16, 1),) * 3, synthesis=((16, 1),) * 3),
    "light": PRESETS["light"],
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_has_a_twin(name: str, codec: Codec) -> None:
    model = HPCM(PRESETS["light"]).initialise().eval() if name == "light" else model_of(MODELS[name])
    exact = attach(model.entropy, calibrated(model))
    twins = [module for module in exact.modules() if isinstance(module, ExactConv)]
    assert {twin.weight.dtype for twin in twins} == {torch.int8, FLOAT32}
    quality = 0 if model.config.qualities == 1 else 20
    y, z = latents_of(model, 2, (1, 2))  # those that it was calibrated with
    _, written, read = there_and_back(exact, y, z, quality)
    assert torch.equal(written.view(torch.int32), read.view(torch.int32))
    with torch.inference_mode():
        approximate = model.entropy(torch.full((2,), float(quality)), (1, 2), SymbolWriter(y, z, torch.empty(0), []))
    assert (written - approximate).abs().mean() < 0.03  # quantiser steps; latents differ by one where a mean is near .5


def test_the_model_stays_as_it_is() -> None:
    model = model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grids = calibrated(model)
    copies = {module: {name: grid.clone() for name, grid in each.items()} for module, each in grids.items()}
    attach(model.entropy, grids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(grid, copies[module][name]) for module, each in grids.items() for name, grid in each.items())


def test_channels_that_never_move_have_grids() -> None:
    model = model_of()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn_s2.conv_q" in name or "adaptor_s3.2.weight" in name or "h_s" in name:
                parameter.zero_()
    attach(model.entropy, calibrated(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_weights_that_no_grid_holds_are_refused(value: float) -> None:
    model = model_of()
    with torch.no_grad():
        model.entropy.get_parameter("context.adaptor_s3.2.weight")[3, 5] = value
    with pytest.raises(CheckpointError, match=r"finite|too large"):
        calibrated(model)


def test_exact_arithmetic_costs_less_than_half_a_percent(codec: Codec, sample: Image.Image) -> None:
    image = sample.crop((64, 0, 320, 256))
    plain = checkpoints.load(checkpoints.find(None)).model.entropy
    for quality in (0, 8, 40):
        (float_bpp, float_psnr), (bpp, psnr) = (
            bpp_and_psnr(codec, path, image, quality) for path in (plain, codec.latents.entropy)
        )
        assert bpp < 1.005 * float_bpp
        assert psnr > float_psnr - 0.02


# --- hostile checkpoints -------------------------------------------------------------------------------------------

CONV, ATTEND = "context.adaptor_s2.1", "context.attn_s2.attend"

HOSTILE: dict[str, tuple[str, str, Callable[[Tensor], Tensor | None]]] = {
    "missing": (CONV, "output", lambda grid: None),
    "missing of attention": (ATTEND, "limits", lambda grid: None),
    "too short": (CONV, "input", lambda grid: grid[1:]),
    "too many dimensions": (CONV, "input", lambda grid: grid[:, None]),
    "empty": (CONV, "limit", lambda grid: grid.new_empty(0)),
    "two limits": (CONV, "limit", lambda grid: grid.repeat(2)),
    "no number": (CONV, "input", lambda grid: torch.full(grid.shape, float("nan"))),
    "complex": (CONV, "output", lambda grid: grid.to(torch.complex64)),
    "true": (CONV, "output", lambda grid: grid.to(torch.bool)),
    "large exponents": (CONV, "input", lambda grid: torch.full_like(grid, 127)),
    "small exponents": (CONV, "output", lambda grid: torch.full_like(grid, -128)),
    "one exponent too many": (CONV, "output", lambda grid: torch.full_like(grid, EXPONENTS + 1)),
    "limit 0": (CONV, "limit", torch.zeros_like),
    "negative limit": (CONV, "limit", lambda grid: -grid),
    "limit that float32 cannot hold": (CONV, "limit", lambda grid: torch.full_like(grid, 2**24)),
    "largest limit": (CONV, "limit", lambda grid: torch.full_like(grid, 2**31 - 1)),
    "query without key": (ATTEND, "query", lambda grid: grid + (torch.arange(len(grid)) == 3).to(torch.int8)),
    "value of another size": (ATTEND, "value", lambda grid: grid.repeat(2)),
    "scores over the bound": (ATTEND, "limits", lambda grid: grid + torch.tensor([3000, 0], dtype=torch.int32)),
    "values over the bound": (ATTEND, "limits", lambda grid: grid + torch.tensor([0, 3000], dtype=torch.int32)),
    "negative limits": (ATTEND, "limits", lambda grid: -grid),
}


@pytest.fixture(scope="module")
def honest() -> tuple[HPCM, Grids]:
    torch.manual_seed(0)
    model = model_of()
    return model, calibrated(model)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grid_is_refused(name: str, honest: tuple[HPCM, Grids]) -> None:
    model, grids = honest
    module, key, change = HOSTILE[name]
    changed = change(grids[module][key].clone())
    rest = {each: grid for each, grid in grids[module].items() if each != key}
    grids = grids | {module: rest if changed is None else rest | {key: changed}}
    with pytest.raises(CheckpointError, match=module.replace(".", r"\.")):
        attach(model.entropy, grids)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38, 1e20])
@pytest.mark.parametrize("parameter", [f"{CONV}.weight", f"{CONV}.bias", "context.quant_steps.4.values"])
def test_hostile_weights_are_refused(parameter: str, value: float, honest: tuple[HPCM, Grids]) -> None:
    model, grids = honest
    entropy = model_of().entropy
    entropy.load_state_dict(model.entropy.state_dict())
    with torch.no_grad():
        entropy.get_parameter(parameter).view(-1)[7] = value
    with pytest.raises(CheckpointError, match="cannot be computed exactly"):
        attach(entropy, grids)


def test_a_hostile_checkpoint_is_refused(tmp_path: Path) -> None:
    """With a fingerprint and a checksum that fit: a grid that is out of range ends in one error."""
    from safetensors.numpy import save_file

    from hpcmref.format import tensorfile

    path = tmp_path / "model.safetensors"
    checkpoints.save(model_of(), path, "hostile", {})
    with tensorfile.opened(path) as file:
        arrays, metadata = file.read(), checkpoints._metadata(file)
    arrays[f"exact.{CONV}.limit"].fill(2**31 - 1)
    metadata["fingerprint"] = checkpoints._fingerprint(metadata["config"], arrays, 2).hex()
    metadata["sha256"] = checkpoints._checksum(metadata, arrays)
    save_file(arrays, path, {"hpcmref": json.dumps(metadata)})
    with pytest.raises(CheckpointError, match="limit"):
        Codec(checkpoints.load(path), "hostile", CPU)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(2, 2, 3, stride=2),
        nn.ConvTranspose2d(2, 2, 2, stride=2, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.Conv2d(4, 4, 5, padding=2, groups=4),
    ],
)
def test_a_layer_without_a_twin_is_refused(layer: Convolution) -> None:
    with pytest.raises(CheckpointError, match="the layer"):
        ExactConv(layer, {}, "the layer")


# --- the guard -----------------------------------------------------------------------------------------------------


def settings() -> dict[str, Any]:
    """Every switch that the guard touches, and those that depend on it."""
    backends: Any = torch.backends
    found = {
        "cudnn": backends.cudnn.enabled,
        "nnpack": torch._C._get_nnpack_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }
    if hasattr(backends.mkldnn, "matmul"):
        modes = {"cuda.matmul": backends.cuda.matmul, "mkldnn.matmul": backends.mkldnn.matmul}
        modes |= {"mkldnn.conv": backends.mkldnn.conv, "mkldnn": backends.mkldnn, "all": backends}
        found |= {name: mode.fp32_precision for name, mode in modes.items()}
    return found


@pytest.fixture
def _restored() -> Iterator[None]:
    """Puts precision modes back to what they are in a fresh process."""
    yield
    torch.set_float32_matmul_precision("highest")
    if hasattr(torch.backends.mkldnn, "matmul"):
        modes: Any = torch.backends
        for mode in (modes, modes.mkldnn.matmul, modes.mkldnn.conv, modes.cuda.matmul):
            mode.fp32_precision = "none"


def _set(precision: str, *path: str) -> Callable[[], None]:
    def change() -> None:
        mode: Any = torch.backends
        for part in path:
            mode = getattr(mode, part)
        mode.fp32_precision = precision

    return change


CHANGES: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "high": lambda: torch.set_float32_matmul_precision("high"),
}
if hasattr(torch.backends.mkldnn, "matmul"):  # torch 2.9 and later
    CHANGES |= {
        "TF32 everywhere": _set("tf32"),
        "bfloat16 in oneDNN": _set("bf16", "mkldnn", "conv"),
        "TF32 in CUDA": _set("tf32", "cuda", "matmul"),
    }


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("change", CHANGES)
def test_the_callers_settings_are_put_back(change: str) -> None:
    CHANGES[change]()
    before = settings()
    for error in (None, KeyboardInterrupt):
        try:
            with exactly(CPU):
                with exactly(CPU):
                    pass
                inside = settings()
                assert {inside[name] for name in ("cudnn", "nnpack", "autocast")} == {False}
                assert not {"tf32", "bf16"} & {
                    value for name, value in inside.items() if name.endswith((".matmul", ".conv"))
                }
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert settings() == before


@pytest.mark.usefixtures("_restored")
@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "matmul"), reason="older torch has one mode for all")
def test_a_mode_that_was_inherited_stays_inherited() -> None:
    backends: Any = torch.backends
    backends.fp32_precision = "tf32"
    with exactly(CPU):
        assert backends.mkldnn.conv.fp32_precision == "ieee"
    assert backends.mkldnn.conv.fp32_precision == "tf32"
    backends.fp32_precision = "ieee"
    assert backends.mkldnn.conv.fp32_precision == "ieee"


@pytest.mark.usefixtures("_restored")
def test_threads_do_not_put_settings_back_too_early() -> None:
    torch.set_float32_matmul_precision("medium")
    before = settings()
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with exactly(CPU):
            first_in.set()
            assert second_in.wait(10)
        first_out.set()

    def second() -> dict[str, Any]:
        assert first_in.wait(10)
        with exactly(CPU):
            second_in.set()
            assert first_out.wait(10)
            return settings()

    with ThreadPoolExecutor(2) as pool:
        one, other = pool.submit(first), pool.submit(second)
        one.result()
        inside = other.result()
    assert inside["cudnn"] is False
    assert inside["nnpack"] is False
    assert inside.get("mkldnn.matmul") in (None, "ieee")
    assert settings() == before


@pytest.mark.parametrize("entered", [exactly, repeatably])
@pytest.mark.parametrize("warn_only", [False, True])
def test_deterministic_algorithms_do_not_forbid_exact_products(
    entered: Callable[[torch.device], contextlib.AbstractContextManager[None]], warn_only: bool
) -> None:
    """Where the caller wants them, PyTorch refuses cuBLAS; exact sums need no such refusal."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with entered(CPU if entered is exactly else torch.device("cuda")):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def test_transforms_on_a_gpu_take_repeatable_kernels() -> None:
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.benchmark = True
    try:
        with repeatably(torch.device("cuda")), repeatably(torch.device("cuda")):
            assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
        assert (cudnn.deterministic, cudnn.benchmark) == (before[0], True)
        with repeatably(CPU):
            assert cudnn.benchmark
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def test_a_failed_check_puts_settings_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = settings()

    def fail(device: str) -> None:
        raise UnsupportedError("not exact")

    monkeypatch.setattr(guard, "check", fail)
    with pytest.raises(UnsupportedError), exactly(CPU):
        pytest.fail("entered")
    assert settings() == before


def _shortened(bits: int) -> Callable[..., Tensor]:
    """A convolution whose operands lose all but so many bits, as on units for TF32 (11) or bfloat16 (8)."""
    real = F.conv2d

    def shorten(x: Tensor) -> Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent)

    return lambda x, weight, *rest, **options: real(shorten(x), shorten(weight), *rest, **options)


def _winograd(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0, groups: int = 1) -> Tensor:
    """F(2x2, 3x3) in the type of x, for planes of even sides."""
    if weight.shape[2:] != (3, 3):
        return _CONV2D(x, weight, bias, padding=padding, groups=groups)
    to_weight, to_input, to_output = (
        torch.tensor(matrix, dtype=x.dtype)
        for matrix in (
            [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]],
            [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]],
            [[1, 1, 1, 0], [0, 1, -1, -1]],
        )
    )
    tiles = F.pad(x, (1, 1, 1, 1))[0].unfold(1, 4, 2).unfold(2, 4, 2)  # (C, rows, columns, 4, 4)
    transformed = to_input @ tiles @ to_input.T
    kernels = to_weight @ weight @ to_weight.T
    if groups > 1:
        products = transformed * kernels[:, 0, None, None]
    else:
        products = torch.einsum("oiab,ihwab->ohwab", kernels, transformed)
    y = to_output @ products @ to_output.T
    return y.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[None]


def _fourier(x: Tensor, weight: Tensor, bias: Tensor | None = None, padding: int = 0, groups: int = 1) -> Tensor:
    """A 3x3 convolution as a product of spectra, rounded to whole numbers afterwards."""
    if weight.shape[2:] != (3, 3) or groups > 1:
        return _CONV2D(x, weight, bias, padding=padding, groups=groups)
    size = (x.shape[2] + 4, x.shape[3] + 4)
    spectrum = torch.einsum("nihw,oihw->nohw", torch.fft.rfft2(F.pad(x, (1, 1, 1, 1)), size),
                            torch.fft.rfft2(weight.flip(2, 3), size))  # fmt: skip
    return torch.fft.irfft2(spectrum, size)[:, :, 2 : 2 + x.shape[2], 2 : 2 + x.shape[3]].round()


def _unordered(x: Tensor, weight: Tensor, *rest: Any, **options: Any) -> Tensor:
    """A convolution in half precision inside."""
    return _CONV2D(x.half(), weight.half(), *(each.half() for each in rest), **options).to(x.dtype)


_CONV2D = F.conv2d


@pytest.mark.parametrize(
    ("convolution", "named"),
    [
        (_shortened(11), "1x1"),
        (_shortened(8), "1x1"),
        (_shortened(16), "depthwise"),
        (_winograd, "3x3"),
        (_winograd, "depthwise"),
        (_fourier, "3x3"),
        (_unordered, "1x1"),
    ],
    ids=["TF32", "bfloat16", "two bfloat16", "Winograd", "Winograd depthwise", "FFT", "half"],
)
def test_a_process_that_computes_otherwise_is_refused(
    convolution: Callable[..., Tensor], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    guard.check.__wrapped__("cpu")
    monkeypatch.setattr(F, "conv2d", convolution)
    with pytest.raises(UnsupportedError, match=rf"float32 {named}"):
        guard.check.__wrapped__("cpu")


@pytest.mark.parametrize("operation", ["__matmul__", "__truediv__", "round_"])
def test_an_operation_that_is_not_ieee_is_refused(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {
        "__matmul__": lambda a, b: torch.bmm(a.bfloat16(), b.bfloat16()).to(a.dtype),
        "__truediv__": lambda a, b: a * b.reciprocal(),
        "round_": lambda a: a.sign().mul_((a.abs() + 0.5).floor()),
    }
    monkeypatch.setattr(torch.Tensor, operation, wrong[operation])
    with pytest.raises(UnsupportedError, match=r"product|division|rounding"):
        guard.check.__wrapped__("cpu")
