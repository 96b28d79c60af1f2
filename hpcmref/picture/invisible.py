"""Colours of pixels that nobody sees (alpha 0): replace them by what costs the fewest bits.

A smooth continuation of the visible colours: the image is averaged over ever larger squares of visible pixels, and each
invisible pixel takes the average of the smallest square around it that has any ("push and pull", Gortler et al.,
The Lumigraph, 1996). At the border of what is visible the colours are continued, so that no halo is coded there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def filled(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Pixels (H, W, C) uint8 whose colours where alpha (H, W) is 0 continue the others; those stay exactly as they are.

    An image that is invisible everywhere becomes black.
    """
    visible = alpha > 0
    if visible.all():
        return pixels
    weights = visible.astype(np.float32)[..., None]
    smooth = _continued(pixels * weights, weights)
    return np.where(visible[..., None], pixels, np.rint(smooth).clip(0, 255).astype(np.uint8))


def _continued(sums: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Colours (H, W, C) float32 everywhere, of sums of colours (H, W, C) and of weights (H, W, 1) in 0..1."""
    height, width = sums.shape[:2]
    own: NDArray[Any] = sums / np.maximum(weights, 1e-6)
    if weights.all() or height == width == 1:
        return own
    coarse = _continued(*_halved(sums, weights))
    return np.where(weights > 0, own, _doubled(coarse)[:height, :width])


def _halved(sums: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Averages of the visible pixels in squares of 2 x 2, and whether a square has any."""
    height, width = (side + side % 2 for side in sums.shape[:2])
    folded = []
    for each in (sums, weights):
        padded = np.zeros((height, width, each.shape[2]), np.float32)
        padded[: each.shape[0], : each.shape[1]] = each
        folded.append(padded.reshape(height // 2, 2, width // 2, 2, -1).sum(axis=(1, 3)))
    total, count = folded
    return total / np.maximum(count, 1e-6), (count > 0).astype(np.float32)


def _doubled(coarse: NDArray[Any]) -> NDArray[Any]:
    """Twice as many rows and columns, interpolated linearly."""
    for axis in (0, 1):
        before, after = _shifted(coarse, axis, -1), _shifted(coarse, axis, 1)
        pair = np.stack([0.75 * coarse + 0.25 * before, 0.75 * coarse + 0.25 * after], axis=axis + 1)
        shape = list(coarse.shape)
        shape[axis] *= 2
        coarse = pair.reshape(shape)
    return coarse


def _shifted(plane: NDArray[Any], axis: int, by: int) -> NDArray[Any]:
    """The neighbour of each value along an axis; at the border itself."""
    index = np.clip(np.arange(plane.shape[axis]) + by, 0, plane.shape[axis] - 1)
    return np.take(plane, index, axis=axis)
