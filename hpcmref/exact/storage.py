"""The entropy path as a model file stores it: the integers that the exact layers compute with.

A convolution is stored as its integer weight and bias (`layers.integer_weights`), in the narrowest of int8, int16 and
int32. Everything else is stored as float32. When a model is loaded, the integers are multiplied by powers of two and
become float32 numbers, from which `attach` makes the same integers again. So a stored model has the same exact layers
as the model from which it was stored, bit for bit.
"""

import torch
from torch import Tensor, nn

from hpcmref.errors import CheckpointError
from hpcmref.exact.convert import Convolution, Grids
from hpcmref.exact.layers import BOUNDS, EXPONENTS, float_weights, grid, integer_weights
from hpcmref.model.context import CrossAttentionCell
from hpcmref.model.hpcm import EntropyPath

Shapes = dict[str, dict[str, tuple[int, ...]]]
"""Module name -> name of a grid -> its shape."""


def stored(entropy: EntropyPath, grids: Grids) -> dict[str, Tensor]:
    """The tensors of `entropy` as a file holds them, under their names in its state_dict and in their shapes there.

    Weights and biases of convolutions are integers, in the narrowest of int8, int16 and int32 that holds them. All
    other tensors are float32. grids: as `calibrate` makes them. Raises CheckpointError if they lack a convolution.
    """
    tensors = {name: tensor.detach().cpu().float() for name, tensor in entropy.state_dict().items()}
    for name, layer in _convolutions(entropy).items():
        inputs, outputs = _grids_of(layer, grids.get(name, {}), name)
        weight, bias = integer_weights(layer, inputs, outputs)
        tensors |= {f"{name}.weight": _narrowed(weight), f"{name}.bias": _narrowed(bias)}
    return tensors


def restored(entropy: EntropyPath, tensors: dict[str, Tensor], grids: Grids) -> dict[str, Tensor]:
    """The inverse of `stored`: float32 tensors by their names in the state_dict.

    entropy: only its layers' types and sizes are used, so it may be on the meta device. Raises CheckpointError if a
    grid is damaged, or an integer has more bits than float32 holds.
    """
    result = dict(tensors)
    for name, layer in _convolutions(entropy).items():
        keys = f"{name}.weight", f"{name}.bias"
        inputs, outputs = _grids_of(layer, grids.get(name, {}), name)
        exact = float_weights(layer, tensors[keys[0]], tensors[keys[1]], inputs, outputs)
        for key, values in zip(keys, exact, strict=True):
            result[key] = values.float()
            if not torch.equal(result[key].double(), values):
                raise CheckpointError(f"{key} is damaged: float32 cannot hold its integers.")
    return result


def grid_shapes(entropy: EntropyPath) -> Shapes:
    """The shapes of the grids that a file must hold for `entropy`, which may be on the meta device."""
    shapes: Shapes = {}
    for name, module in entropy.named_modules():
        if isinstance(module, Convolution):
            shapes[name] = {"input": (module.in_channels,), "output": (module.out_channels,), "limit": ()}
        elif isinstance(module, CrossAttentionCell):
            channels = (module.conv_q.out_channels,)
            shapes[f"{name}.attend"] = {"query": channels, "key": channels, "value": channels, "limits": (2,)}
    return shapes


def check_grids(entropy: EntropyPath, grids: Grids) -> None:
    """Raise CheckpointError unless all grids of `entropy` are present and hold integers in range."""
    for name, shapes in grid_shapes(entropy).items():
        for key, shape in shapes.items():
            low, high = (1, BOUNDS[torch.float32] - 1) if key.startswith("limit") else (-EXPONENTS, EXPONENTS)
            grid(grids.get(name, {}), key, shape, low, high, name)


def convolution_names(entropy: EntropyPath) -> set[str]:
    """The names of the tensors that are stored as integers."""
    return {f"{name}.{kind}" for name in _convolutions(entropy) for kind in ("weight", "bias")}


def _convolutions(entropy: EntropyPath) -> dict[str, nn.Conv2d | nn.ConvTranspose2d]:
    return {name: module for name, module in entropy.named_modules() if isinstance(module, Convolution)}


def _grids_of(layer: Convolution, grids: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    limits = -EXPONENTS, EXPONENTS, name
    return (
        grid(grids, "input", (layer.in_channels,), *limits),
        grid(grids, "output", (layer.out_channels,), *limits),
    )


def _narrowed(integers: Tensor) -> Tensor:
    for dtype in (torch.int8, torch.int16):
        if integers.abs().max() <= torch.iinfo(dtype).max:
            return integers.to(dtype)
    return integers.to(torch.int32)
