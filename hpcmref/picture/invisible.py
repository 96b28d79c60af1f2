"""Replace the colours of invisible pixels (alpha 0) by colours that take few bits.

They become a smooth continuation of the visible colours. The image is halved again and again, each time as the average
of the visible pixels in squares of 2 x 2. Each invisible pixel gets the average of the smallest square around it that
has visible pixels ("push and pull", Gortler et al., The Lumigraph, 1996). At the border of the visible area the colours
are continued, so that there is no edge to code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def filled(pixels: NDArray[Any], alpha: NDArray[Any]) -> NDArray[Any]:
    """Replace the colours of the pixels (H, W, C) uint8 where alpha (H, W) is 0. All other pixels stay exactly equal.

    An image that is invisible everywhere becomes black.
    """
    visible = alpha > 0
    if visible.all():
        return pixels
    weights = visible.astype(np.float32)[..., None]
    smooth = _continued(pixels * weights, weights)
    return np.where(visible[..., None], pixels, np.rint(smooth).clip(0, 255).astype(np.uint8))


def _continued(sums: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Compute colours (H, W, C) float32 for all pixels.

    sums: weighted colours (H, W, C) float32. weights: (H, W, 1), 0 for invisible pixels and else 1.
    """
    height, width = sums.shape[:2]
    own: NDArray[Any] = sums / np.maximum(weights, 1e-6)
    if weights.all() or height == width == 1:
        return own
    coarse = _continued(*_halved(sums, weights))
    return np.where(weights > 0, own, _doubled(coarse)[:height, :width])


def _halved(sums: NDArray[Any], weights: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the average of the visible pixels in each square of 2 x 2, and 1 if a square has any, else 0."""
    height, width = (side + side % 2 for side in sums.shape[:2])
    folded = []
    for each in (sums, weights):
        padded = np.zeros((height, width, each.shape[2]), np.float32)
        padded[: each.shape[0], : each.shape[1]] = each
        folded.append(padded.reshape(height // 2, 2, width // 2, 2, -1).sum(axis=(1, 3)))
    total, count = folded
    return total / np.maximum(count, 1e-6), (count > 0).astype(np.float32)


def _doubled(coarse: NDArray[Any]) -> NDArray[Any]:
    """Interpolate linearly to twice as many rows and columns."""
    for axis in (0, 1):
        before, after = _shifted(coarse, axis, -1), _shifted(coarse, axis, 1)
        pair = np.stack([0.75 * coarse + 0.25 * before, 0.75 * coarse + 0.25 * after], axis=axis + 1)
        shape = list(coarse.shape)
        shape[axis] *= 2
        coarse = pair.reshape(shape)
    return coarse


def _shifted(plane: NDArray[Any], axis: int, by: int) -> NDArray[Any]:
    """Return for each value its neighbour at the distance `by` along an axis, or the value itself at the border."""
    index = np.clip(np.arange(plane.shape[axis]) + by, 0, plane.shape[axis] - 1)
    return np.take(plane, index, axis=axis)
