"""Apply local functions to one horizontal strip after the other, so that big images fit into memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

POSITIONS = 2**14
"""Positions of the 1/16 latent lattice in a strip.

That is 4 megapixels, for which convolutions need a few hundred megabytes.
"""


def in_strips(
    function: Callable[..., Tensor],
    *inputs: Tensor,
    halo: int,
    unit: int = 1,
    positions: int = POSITIONS,
    into: Tensor | None = None,
    whole: bool = False,
) -> Tensor:
    """function(*inputs), computed in strips of about `positions` positions if the inputs have more.

    inputs: (B, C, h, w), all of the same height. The function must give a result with a fixed number of rows for every
    row of its inputs, and it must be local: a row of the result depends on at most `halo` units above and below, where
    a unit is `unit` rows. Strips begin at multiples of a unit. Then strips give the same result as the whole image,
    except for the order of float sums.

    into: a tensor of the shape and type of the result, which strips overwrite. If halo is 0, it may be one of the
    inputs.
    whole: compute everything at once, whatever the size, and overwrite nothing, as gradients need it.
    """

    def results(*parts: Tensor) -> tuple[Tensor]:
        return (function(*parts),)

    return all_in_strips(results, *inputs, halo=halo, unit=unit, positions=positions, into=(into,), whole=whole)[0]


def all_in_strips(
    function: Callable[..., tuple[Tensor, ...]],
    *inputs: Tensor,
    halo: int,
    unit: int = 1,
    positions: int = POSITIONS,
    into: Sequence[Tensor | None],
    whole: bool = False,
) -> tuple[Tensor, ...]:
    """As `in_strips`, for a function with several results. into: one for each result."""
    height, width = inputs[0].shape[2:]
    units = -(-height // unit)
    step = max(1, positions // (unit * width))
    if whole or step >= units:
        return function(*inputs)
    planes = list(into)
    for start in range(0, units, step):
        stop = min(start + step, units)
        top, bottom = unit * max(0, start - halo), min(unit * (stop + halo), height)
        parts = function(*(x[:, :, top:bottom] for x in inputs))
        planes = [
            _placed(plane, part, (unit * start, min(unit * stop, height)), (top, bottom), height)
            for plane, part in zip(planes, parts, strict=True)
        ]
    return tuple(plane for plane in planes if plane is not None)


def _placed(into: Tensor | None, part: Tensor, wanted: tuple[int, int], known: tuple[int, int], height: int) -> Tensor:
    """Copy a part of a result into the plane of the whole result, which is made if it is None, and return it.

    known: the rows of the inputs that the part was computed from, of `height` rows; wanted: those that count.
    """
    top, bottom = known

    def row_of(row: int) -> int:
        return row * part.shape[2] // (bottom - top)

    if into is None:
        layout = torch.channels_last if part.is_contiguous(memory_format=torch.channels_last) else None
        shape = (*part.shape[:2], row_of(height), part.shape[3])
        into = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=layout)
    assert into.dtype == part.dtype
    first, last = wanted
    into[:, :, row_of(first) : row_of(last)] = part[:, :, row_of(first - top) : row_of(last - top)]
    return into
