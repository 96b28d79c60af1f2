"""The order in which latents are coded: the lattices s1, s2 and s3, and their 2 + 3 + 6 steps, as data.

y (C, H, W)                       s3: every position of y; 6 steps code the 8 - 2 channel groups left at each position
  | channel group g of 8 keeps one phase of each 2x2 cell
s2 (C, H/2, W/2)                  3 steps code the 4 - 1 groups left
  | channel group g of 4 keeps one phase of each 2x2 cell
s1 (C, H/4, W/4)                  2 steps

In every step, exactly one channel group is coded at each position of the step's lattice. So a step with G groups codes
a tensor (B, C/G, h, w), and a small table says which group belongs to which position. Source: official
src/models/base.py (get_mask_for_s2, get_mask_for_rec_s2, get_mask_two_parts, get_mask_four_parts,
get_mask_eight_parts).

Some functions have two implementations that give the same values. One moves values by strides and indices, and is the
faster one. The other (`masked`) multiplies whole planes by 0 and 1. Its backward pass is several times as fast, so
training uses it. `put` returns a new tensor, and `put_` overwrites its first argument.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


@dataclass(frozen=True)
class Lattice:
    """A sublattice of twice the spacing.

    Group g of the channels is taken from the position phases[g] = (row, column) of every 2x2 cell.
    """

    phases: tuple[tuple[int, int], ...]

    def down(self, x: Tensor, masked: bool = False) -> Tensor:
        """Take the values on the lattice: x (B, C, H, W) -> (B, C, H/2, W/2)."""
        if masked:
            cells = _cells(x)
            return _planes((cells * self._taken(cells)).sum(4).sum(2))  # faster on a CPU than both at once
        groups = x.chunk(len(self.phases), dim=1)
        return torch.cat(
            [group[:, :, row::2, col::2] for group, (row, col) in zip(groups, self.phases, strict=True)], dim=1
        )

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """A copy of x (B, C, H, W) with `values` (B, C, H/2, W/2) on the lattice."""
        cells = _cells(x)
        return _joined(torch.where(self._taken(cells), _rows(values)[:, :, None, :, None], cells))

    def put_(self, x: Tensor, values: Tensor) -> Tensor:
        """As `put`, but x itself is overwritten and returned."""
        size = x.shape[1] // len(self.phases)
        for group, (row, col) in enumerate(self.phases):
            channels = slice(group * size, (group + 1) * size)
            x[:, channels, row::2, col::2] = values[:, channels]
        return x

    def up(self, values: Tensor, masked: bool = False) -> Tensor:
        """Values (B, C, H/2, W/2) on the finer lattice (B, C, H, W), zero elsewhere."""
        if masked:
            cells = _rows(values)[:, :, None, :, None]
            return _joined(cells * self._taken(cells))
        batch, channels, height, width = values.shape
        return self.put_(_zeros(values, batch, channels, 2 * height, 2 * width), values)

    def _taken(self, cells: Tensor) -> Tensor:
        """Which values of cells (..., C) are on the lattice: (2, 1, 2, C) bool."""
        return _phase_mask(self.phases, cells.shape[-1], cells.device)


S2 = Lattice(((0, 0), (1, 1), (0, 1), (1, 0)) * 2)
S1 = Lattice(((0, 0), (0, 1), (1, 0), (1, 1)))


@dataclass(frozen=True)
class Step:
    """One coding step on the lattice of `scale` (1, 2 or 3).

    At position (row, col) it codes the channel group pattern[row][col]. The pattern repeats over the lattice.
    """

    scale: int
    groups: int
    pattern: tuple[tuple[int, ...], ...]

    def table(self, height: int, width: int, device: torch.device) -> Tensor:
        """The coded group of every position: (height, width) int64."""
        side = len(self.pattern)
        pattern = _lookup(chain.from_iterable(self.pattern), torch.arange(side * side, device=device)).view(side, side)
        return pattern.repeat(-(-height // side), -(-width // side))[:height, :width]

    def select(self, x: Tensor, masked: bool = False) -> Tensor:
        """Take the values of x (B, C, h, w) that this step codes: (B, C/G, h, w)."""
        if masked:
            groups = _rows(x).unflatten(3, (self.groups, -1))
            return _planes((groups * self._mask(groups)).sum(3))
        grouped = x.unflatten(1, (self.groups, -1))
        return grouped.gather(1, self._index(grouped.shape, x.device)).squeeze(1)

    def put(self, x: Tensor, values: Tensor) -> Tensor:
        """A copy of x (B, C, h, w) in which `values` (B, C/G, h, w) replace those that this step codes.

        This is the inverse of `select`.
        """
        groups = _rows(x).unflatten(3, (self.groups, -1))
        return _planes(torch.where(self._mask(groups), _rows(values)[:, :, :, None], groups).flatten(3))

    def put_(self, x: Tensor, values: Tensor) -> Tensor:
        """As `put`, but x itself is overwritten and returned."""
        grouped = x.unflatten(1, (self.groups, -1))
        grouped.scatter_(1, self._index(grouped.shape, x.device), values.unsqueeze(1))
        return x

    def _mask(self, groups: Tensor) -> Tensor:
        """Which of groups (B, h, w, G, C/G) are coded: (h, w, G, 1) bool."""
        _, height, width, count, _ = groups.shape
        return _group_mask(self.pattern, height, width, count, groups.device)

    def _index(self, shape: torch.Size, device: torch.device) -> Tensor:
        batch, _, channels, height, width = shape
        return self.table(height, width, device).expand(batch, 1, channels, height, width)


def _kept(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep the last results of a function, so that a mask is not made again at each training step; never write to one.

    A compiler gets the function itself: it makes constants or a part of a kernel of it.
    """
    cached = lru_cache(maxsize=64)(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with torch.inference_mode(False):  # training could not use an inference tensor
            return cached(*args, **kwargs)  # type: ignore[arg-type]

    return call


@_kept
def _group_mask(
    pattern: tuple[tuple[int, ...], ...], height: int, width: int, groups: int, device: torch.device
) -> Tensor:
    """See `Step._mask`."""
    table = Step(0, groups, pattern).table(height, width, device)
    return (table[:, :, None] == torch.arange(groups, device=device))[..., None]


@_kept
def _phase_mask(phases: tuple[tuple[int, int], ...], channels: int, device: torch.device) -> Tensor:
    """See `Lattice._taken`."""
    group = torch.arange(channels, device=device) // (channels // len(phases))
    rows, columns = (_lookup((phase[axis] for phase in phases), group) for axis in range(2))
    side = torch.arange(2, device=device)
    return (side[:, None, None, None] == rows) & (side[:, None] == columns)


def _lookup(numbers: Iterable[int], places: Tensor) -> Tensor:
    """numbers[places], for up to 16 numbers below 8, which fit into one integer with 3 bits each.

    An integer is passed to a GPU kernel as an argument. A tensor made from a list would have to be copied to the GPU,
    and the host would wait until the GPU has finished its earlier work.
    """
    packed = sum(number << 3 * place for place, number in enumerate(numbers))
    return (torch.full_like(places, packed) >> 3 * places).bitwise_and_(7)


def _rows(x: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h, w, C), a view."""
    return x.permute(0, 2, 3, 1)


def _planes(x: Tensor) -> Tensor:
    """(B, h, w, C) -> (B, C, h, w), a view."""
    return x.permute(0, 3, 1, 2)


def _cells(x: Tensor) -> Tensor:
    """(B, C, 2h, 2w) -> (B, h, 2, w, 2, C)."""
    return _rows(x).unflatten(2, (-1, 2)).unflatten(1, (-1, 2))


def _joined(cells: Tensor) -> Tensor:
    """The inverse of `_cells`."""
    return _planes(cells.flatten(3, 4).flatten(1, 2))


def _zeros(like: Tensor, batch: int, channels: int, height: int, width: int) -> Tensor:
    """Zeros (B, C, H, W) in the channels-last memory layout, which all tensors of the networks have."""
    return like.new_zeros(batch, height, width, channels).permute(0, 3, 1, 2)


def _step(scale: int, cells: Sequence[Sequence[tuple[int, int]]], order: Sequence[int], side: int) -> Step:
    """The step in which group g codes the positions cells[order[g]] of each side x side pattern."""
    pattern = [[-1] * side for _ in range(side)]
    for group, cell in enumerate(order):
        for row, col in cells[cell]:
            pattern[row][col] = group
    return Step(scale, len(order), tuple(map(tuple, pattern)))


_TWO = (((0, 0), (1, 1)), ((0, 1), (1, 0)))
_FOUR = (((0, 0),), ((0, 1),), ((1, 0),), ((1, 1),))
_EIGHT = (
    ((0, 0), (2, 2)), ((0, 2), (2, 0)), ((1, 1), (3, 3)), ((1, 3), (3, 1)),
    ((0, 1), (2, 3)), ((0, 3), (2, 1)), ((1, 0), (3, 2)), ((1, 2), (3, 0)),
)  # fmt: skip

STEPS_S1 = tuple(_step(1, _TWO, order, 2) for order in ((0, 1), (1, 0)))
STEPS_S2 = tuple(_step(2, _FOUR, order, 2) for order in ((3, 2, 1, 0), (2, 3, 0, 1), (1, 0, 3, 2)))
STEPS_S3 = tuple(
    _step(3, _EIGHT, order, 4)
    for order in (
        (2, 4, 6, 0, 3, 5, 7, 1), (3, 5, 7, 1, 2, 4, 6, 0), (4, 6, 0, 2, 5, 7, 1, 3),
        (5, 7, 1, 3, 4, 6, 0, 2), (6, 0, 2, 4, 7, 1, 3, 5), (7, 1, 3, 5, 6, 0, 2, 4),
    )
)  # fmt: skip
STEPS = (*STEPS_S1, *STEPS_S2, *STEPS_S3)


def lattices(y: Tensor, masked: bool = False) -> dict[int, Tensor]:
    """y (B, C, H, W) on the lattices of the scales 1, 2 and 3."""
    s2 = S2.down(y, masked)
    return {1: S1.down(s2, masked), 2: s2, 3: y}


def displaced_source(channels: int, height: int, width: int, device: torch.device) -> Tensor:
    """Where the official models read the hyper parameters of s2 that s1 has not used.

    Returns (C, h * w) int64 for an s2 plane of h x w: for each position, the flat position in the y plane (2h x 2w)
    from which its value is read. The positions that s1 holds read position 0 and must be overwritten. The official
    masks of s1 do not describe what s1 really holds (base.py: get_mask_for_s1, get_s2_hyper_with_mask). Therefore most
    of these values are read next to the position at which they are used. The networks were trained with that.
    """
    # According to the official masks, s1 took the position (row, col) of each 4x4 block of y for channel group g. All
    # these rows belong to the first s2 row of a block.
    claimed = ((0, 0), (1, 1), (0, 1), (1, 0), (0, 2), (1, 3), (0, 3), (1, 2))
    group = channels // 8
    plane = torch.arange(4 * height * width, device=device).view(2 * height, 2 * width)
    source = torch.zeros(channels, height // 2, 2, width, dtype=torch.int64, device=device)
    for g, ((row, col), (_, claimed_col)) in enumerate(zip(S2.phases, claimed, strict=True)):
        first, second = plane[row::4, col::2], plane[row + 2 :: 4, col::2]
        taken = torch.cat((first[:, 1 - claimed_col // 2 :: 2], second), dim=1)
        free_row, free_col = S1.phases[g // 2]
        channel = source[g * group : (g + 1) * group]
        # In row-major order, half a row comes before a whole one, or a whole row before half a one.
        halves = taken.split((width // 2, width) if free_row == 0 else (width, width // 2), dim=1)
        channel[:, :, free_row, 1 - free_col :: 2] = halves[free_row]
        channel[:, :, 1 - free_row] = halves[1 - free_row]
    return source.flatten(1)
