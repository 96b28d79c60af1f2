"""Choose the stream of a file: the learned stream, or a lossless one if that is better.

The model was trained to minimise bits + lambda(q) x squared error. A lossless stream has no error, so it is better
where its bits are fewer than that sum. Three rules refine this:

- The lossless stream may have at most CAP times the bits of the learned stream, so that a noisy picture does not become
  a huge file. At the best quality this limit does not hold for a picture whose PSNR would be below LEAST_PSNR.
- Streams are compared at every QUALITY_STEP-th quality up to the one that is asked for. If the lossless stream is
  better at one of them, it is used at all higher ones, so that quality never falls when q rises.
- A photograph is recognised by the lossless size of a small part of it (`min_size`), before more is computed.

A picture of one colour is always lossless.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpcmref import lossless
from hpcmref.format.container import Coding
from hpcmref.picture.images import Picture

CAP = 2.0
QUALITY_STEP = 16
LEAST_PSNR = 30.0

_TILE, _TILES = 64, 16
_WIDEST = 16383  # the largest width of a WebP file
_SMOOTH = 100.0
"""A `_roughness` up to which the shipped model far exceeds LEAST_PSNR at its best quality. Measured: 38 dB for
a photograph of roughness 330, and 24 dB for pixel art of roughness 880."""


class Trial(NamedTuple):
    """A learned stream. size: bytes of its payload and header. error: squared error of all visible samples, 0..255."""

    size: int
    error: float


@dataclass(frozen=True, eq=False)
class Choice:
    """The choice between the possible streams of one picture.

    lambdas: bits per squared error and pixel at the model's quality anchors; empty for a model of one rate.
    qualities: how many qualities the model has.
    trial: a function that returns the learned stream at a quality. It is slow, so it is called as seldom as possible.
    """

    picture: Picture
    lambdas: tuple[float, ...]
    qualities: int
    trial: Callable[[int], Trial]

    @functools.cached_property
    def stream(self) -> tuple[Coding, bytes]:
        """The lossless stream of the visible pixels."""
        return lossless.pack(visible(self.picture))

    def is_lossless(self, quality: int, size: int) -> bool:
        """Return whether the lossless stream is better at a quality. size: that of the learned stream, see `Trial`."""
        best = quality == self.qualities - 1 and self.qualities > 1
        if best and _roughness(self.picture.pixels) > _SMOOTH and self._psnr(self.trial(quality).error) < LEAST_PSNR:
            return True
        # Sizes rise with quality, but not strictly: 5 % and 32 bytes allow for that.
        if min_size(self.picture) > CAP * 1.05 * size + 32 or len(self.stream[1]) > CAP * 1.05 * size + 32:
            return False
        compared = range(0, quality + 1, QUALITY_STEP)
        return any(self._wins(each) for each in ([quality] if best else []) + [*reversed(compared)])

    def _wins(self, quality: int) -> bool:
        own = len(self.stream[1])
        learned = self.trial(quality)
        samples_of_a_pixel = 3
        return own <= CAP * learned.size and 8 * own <= (
            8 * learned.size + lambda_of(self.lambdas, quality, self.qualities) * learned.error / samples_of_a_pixel
        )

    def _psnr(self, error: float) -> float:
        return psnr_of(error, 3 * visible_pixels(self.picture))


def is_flat(picture: Picture) -> bool:
    """Return whether all pixels of the picture have the same colour."""
    return bool((picture.pixels == picture.pixels[0, 0]).all())


def lambda_of(lambdas: tuple[float, ...], quality: int, qualities: int) -> float:
    """Return the lambda of a quality, interpolated between the anchors in the log domain, as the model's gains are.

    lambdas: the values at the rate anchors; without any, the result is 0. qualities: how many qualities the model has.
    """
    if not lambdas:
        return 0.0
    place = quality * (len(lambdas) - 1) / max(qualities - 1, 1)
    return float(np.exp(np.interp(place, range(len(lambdas)), np.log(lambdas))))


def psnr_of(error: float, samples: int) -> float:
    """Return the PSNR in dB of a sum of squared errors over samples of 0..255. It is infinite for an error of 0."""
    return 10 * math.log10(255**2 * samples / error) if error else math.inf


def visible_pixels(picture: Picture) -> int:
    """Count the pixels with an alpha above 0. If there are none, count all pixels."""
    alpha = picture.extras.alpha
    count = picture.pixels.shape[0] * picture.pixels.shape[1] if alpha is None else int(np.count_nonzero(alpha))
    return count or picture.pixels.shape[0] * picture.pixels.shape[1]


def visible(picture: Picture) -> Picture:
    """Return the picture with black instead of the colours that were filled in under an alpha of 0.

    A lossless stream needs fewer bits for black than for the smooth colours that suit a learned stream.
    """
    alpha = picture.extras.alpha
    if alpha is None or not picture.is_filled:
        return picture
    return replace(picture, pixels=np.where(alpha[..., None] > 0, picture.pixels, np.uint8(0)))


def min_size(picture: Picture) -> float:
    """Estimate a lower bound in bytes for the lossless stream of the picture, from at most _TILES small tiles of it.

    The tiles are compressed together with WebP, and the result is scaled up to all pixels. A photograph hardly repeats
    itself, so its real size is near that: the estimate is divided by 1.25. If less than half of the blocks of 2 x 2
    pixels in the tiles are distinct (drawings, text), the picture may repeat what the tiles contain, so the estimate is
    divided by 4.
    """
    tiles = _sample(picture.pixels)
    file = io.BytesIO()
    Image.fromarray(tiles[..., 0] if picture.grey else tiles).save(file, "WEBP", lossless=True, quality=0, method=0)
    whole, part = picture.pixels.shape[0] * picture.pixels.shape[1], tiles.shape[0] * tiles.shape[1]
    return len(file.getvalue()) * whole / part / (1.25 if _variety(tiles) > 0.5 else 4)


def _sample(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return tiles from all over the picture, concatenated vertically, or the whole of a small picture."""
    height, width = pixels.shape[:2]
    if height * width <= _TILES * _TILE**2 or min(height, width) < _TILE:
        return pixels[: max(1, min(_WIDEST, _TILES * _TILE**2 // width)), :_WIDEST]
    side = round(math.sqrt(_TILES))
    rows = np.linspace(0, height - _TILE, side).astype(int)
    columns = np.linspace(0, width - _TILE, side).astype(int)
    return np.concatenate([pixels[y : y + _TILE, x : x + _TILE] for y in rows for x in columns])


def _variety(pixels: NDArray[np.uint8]) -> float:
    """Return the share of distinct blocks among all blocks of 2 x 2 pixels, 0 to 1. Blocks are compared by a hash."""
    height, width = (side // 2 * 2 for side in pixels.shape[:2])
    if not height or not width:
        return 0.0
    whole = pixels[:height, :width].astype(np.uint64)
    colours = (whole[..., 0] * 65599 + whole[..., 1] * 257 + whole[..., 2]) % 1000003
    squares = ((colours[::2, ::2] * 7919 + colours[1::2, ::2]) * 7907 + colours[::2, 1::2]) * 7901 + colours[1::2, 1::2]
    return len(np.unique(squares)) / int(squares.size)


def _roughness(pixels: NDArray[np.uint8]) -> float:
    """Return the mean square of the difference between a sample and the average of its four neighbours."""
    if min(pixels.shape[:2]) < 3:
        return math.inf
    total = 0.0
    for top in range(1, len(pixels) - 1, 256):  # in parts, to save memory
        part = pixels[top - 1 : top + 257].astype(np.int16)
        around = part[:-2, 1:-1] + part[2:, 1:-1] + part[1:-1, :-2] + part[1:-1, 2:]
        total += float(np.square(4 * part[1:-1, 1:-1] - around, dtype=np.int32).sum(dtype=np.float64)) / 16
    return total / max(1, (len(pixels) - 2) * (pixels.shape[1] - 2) * 3)
